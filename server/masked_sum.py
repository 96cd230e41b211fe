"""The sum of masked updates, in constant memory, and how its masks are taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.masking import (
    Field,
    add_stream,
    field_dtype,
    largest_sum,
    packed_bytes,
    signed_sum,
    unpack_bits,
)
from edge_runtime.formats.masking_keys import commitment, pair_key, public_bytes, segment_key
from edge_runtime.formats.masking_messages import Roster, split_payload
from edge_runtime.formats.messages import MaskPlan
from edge_runtime.formats.secret_sharing import join_shares, lagrange_weights


class MaskedAccumulator:
    """One sum modulo 2**bits of the segments that are sent; folded updates are forgotten.

    Args:
        roster: The session's members.
        sharers: Those that mask with each other.
        sizes: Values of each segment at rank r_max.
        mask: The session's plan.
        noise_std: Of the noise that each member adds.
    """

    def __init__(
        self, roster: Roster, sharers: Sequence[int], sizes: Sequence[int], mask: MaskPlan, noise_std: float
    ) -> None:
        self._roster, self._sharers, self._mask, self._noise_std = roster, tuple(sharers), mask, noise_std
        self._sizes = tuple(sizes)
        self._sent = self._sizes[: len(mask.scales)]
        self._values: Field = np.zeros(sum(self._sent), field_dtype(mask.bits))
        self._weights: dict[int, int] = {}

    def fold(self, place: int, payload: bytes, weight: int) -> None:
        """Add a member's masked update.

        Raises:
            MessageError: It is not of the length and form that its rank makes it; nothing was added.
        """
        sizes = self._sent[: self._roster.segments(place)]
        lengths = [packed_bytes(size, self._mask.bits) for size in sizes]
        parts = [
            unpack_bits(part, size, self._mask.bits)
            for part, size in zip(split_payload(payload, lengths), sizes, strict=True)
        ]
        start = 0
        for part in parts:
            self._values[start : start + part.size] += part.astype(self._values.dtype)
            start += part.size
        self._weights[place] = weight

    def opened(self) -> tuple[bool, ...]:
        """Which segments enough folded members train (``Roster.open_segments``)."""
        return self._roster.open_segments(self._sharers, sorted(self._weights), len(self._sent))

    def share_counts(self) -> list[int]:
        """How many shares a survivor reveals for each sharer, in order: of open segments' seeds, or of the key."""
        opened = self.opened()
        return [sum(opened[: self._roster.segments(place)]) if place in self._weights else 1 for place in self._sharers]

    def unmask(
        self, revealed: Mapping[int, Sequence[Sequence[bytes]]], commitments: Mapping[int, Sequence[str]]
    ) -> tuple[NDArray[np.int64], tuple[int, ...], tuple[int, ...]]:
        """The exact sum (N,), and the weight and the number of members of each segment; zeros where not opened.

        Args:
            revealed: By survivor, for each sharer in order its shares; as many survivors as the threshold.
            commitments: By sharer, of its seeds.

        Raises:
            MessageError: Shares that give other secrets than their owners had, or a sum out of range.
        """
        opened = self.opened()
        survivors = sorted(revealed)
        factors = lagrange_weights([place + 1 for place in survivors])
        for position, place in enumerate(self._sharers):
            columns = zip(*(revealed[survivor][position] for survivor in survivors), strict=True)
            secrets = [join_shares(column, factors) for column in columns]
            if place in self._weights:
                self._remove_own(place, secrets, opened, commitments[place])
            else:
                self._remove_pairs(place, secrets[0], opened)
        return self._open(opened)

    def _remove_own(self, place: int, seeds: Sequence[bytes], opened: Sequence[bool], known: Sequence[str]) -> None:
        segments = [s for s in range(min(len(opened), self._roster.segments(place))) if opened[s]]
        for segment, seed in zip(segments, seeds, strict=True):
            if commitment(seed) != known[segment]:
                raise MessageError(f"maskreveal: the shares of member {place}'s seed give another seed")
            key = segment_key(seed, segment, self._roster.digest)
            add_stream(self._segment(segment), key, subtract=True)

    def _remove_pairs(self, place: int, private: bytes, opened: Sequence[bool]) -> None:
        """Take away what the survivors masked with a lost member."""
        if public_bytes(private) != self._roster.members[place].mask_key:
            raise MessageError(f"maskreveal: the shares of member {place}'s key give another key")
        needed = max((segment + 1 for segment, is_open in enumerate(opened) if is_open), default=0)
        for survivor in self._weights:
            key = pair_key(private, self._roster.members[survivor].mask_key, self._roster.digest)
            both = min(self._roster.segments(place), self._roster.segments(survivor), needed)
            add_stream(self._values[: sum(self._sent[:both])], key, subtract=survivor < place)

    def _open(self, opened: Sequence[bool]) -> tuple[NDArray[np.int64], tuple[int, ...], tuple[int, ...]]:
        sums = np.zeros(sum(self._sizes), np.int64)
        weights, contributors = [0] * len(self._sizes), [0] * len(self._sizes)
        for segment, is_open in enumerate(opened):
            if is_open:
                folded = self._roster.covering(segment, self._weights)
                weights[segment] = sum(self._weights[place] for place in folded)
                contributors[segment] = len(folded)
                start = sum(self._sizes[:segment])
                exact = signed_sum(self._segment(segment), self._mask.bits)
                noise = self._noise_std / self._mask.scales[segment]
                limit = largest_sum(weights[segment], len(folded), self._mask.largest_code, noise)
                if max(int(exact.max(initial=0)), -int(exact.min(initial=0))) > limit:
                    raise MessageError(f"update: a sum beyond {limit}: a member sent a code out of range")
                sums[start : start + exact.size] = exact
        return sums, tuple(weights), tuple(contributors)

    def _segment(self, segment: int) -> Field:
        start = sum(self._sent[:segment])
        return self._values[start : start + self._sent[segment]]
