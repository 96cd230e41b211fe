"""What an update must pass before it is folded; a refusal costs its sender the round, and nobody else anything.

``admit`` trusts no field of the reply: what the server asked for decides, and the norm is computed from the
decoded values. A device that means harm can still send a plausible wrong update; ``group_median`` is for that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.codec import Codec, decode_unchecked, encoded_bytes, largest_magnitude
from edge_runtime.formats.envelope import Envelope, sha256, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout, Phase
from edge_runtime.formats.messages import Update
from server.aggregation import LARGEST_VALUE, squared_norm


class Refusal(StrEnum):
    """Why an update was not folded; the ledger counts them by these names."""

    KIND = "kind"  # no update
    MALFORMED = "malformed"  # a field is missing, unknown, of the wrong type or out of range
    STALE = "stale"  # of another round
    REPLAY = "replay"  # of this round, answering another plan
    DUPLICATE = "duplicate"  # this plan's answer is folded already
    BASE = "base"
    LAYOUT = "layout"
    PHASE = "phase"
    RANK = "rank"
    CODEC = "codec"
    WEIGHT = "weight"
    DIGEST = "digest"  # the payload is not what the header says
    SHAPE = "shape"  # the payload is not as long as the plan's rank and codec make it
    SCALE = "scale"  # a block's scale is negative or not finite
    FINITE = "finite"
    RANGE = "range"  # a value of 8 or more
    NORM = "norm"
    LOSS = "loss"  # the round's adapter was worse on held-out text than the one before
    VERSION = "version"  # trained against a frozen factor that has changed since (buffered rounds)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the server asked one device for.

    Attributes:
        plan_id: Of the plan it was sent.
        weight_cap: Largest weight.
        max_norm: Largest norm of the update; 0: none.
        answered: An answer to this plan was admitted before.
    """

    layout: AdapterLayout
    round: int
    plan_id: str
    phase: Phase
    rank: int
    codec: Codec
    weight_cap: int
    max_norm: float = 0.0
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """An update that may be folded.

    Attributes:
        update: The header.
        vector: float32 (n,) of the phase's groups at the plan's rank, finite, each |value| < 8.
        norm: Of the vector, as decoded.
    """

    update: Update
    vector: NDArray[np.float32]
    norm: float


def admit(envelope: Envelope, expected: Expected) -> Admitted | Refusal:
    """Check a reply, cheapest and most general first; never raises, whatever the envelope holds."""
    if envelope.kind != Update.__name__.lower():
        return Refusal.KIND
    try:
        update = unseal(envelope, Update)
    except MessageError:
        return Refusal.MALFORMED
    refusal = _check_header(update, expected)
    if refusal is not None:
        return refusal
    if sha256(envelope.payload) != update.payload_sha256:
        return Refusal.DIGEST
    sizes = expected.layout.segment_sizes(expected.phase.groups, expected.rank)
    if len(envelope.payload) != encoded_bytes(sizes, expected.codec):
        return Refusal.SHAPE
    try:
        vector = decode_unchecked(envelope.payload, sizes, expected.codec)
    except MessageError:
        return Refusal.SCALE
    return _check_values(update, vector, expected.max_norm)


class NormGate:
    """A bound on norms that follows what honest devices send: a multiple of the median of recent rounds.

    Norms of a round are added together when it commits, and whole rounds are forgotten together, so that the
    bound depends on no order of arrival.

    Args:
        factor: The multiple; 0: no running bound.
        floor: The running bound is at least this.
        max_norm: A fixed bound beside it; 0: none.
    """

    WINDOW = 64  # replies, at least, once there were so many
    FEWEST = 5  # replies before there is a running bound

    def __init__(self, factor: float, floor: float, max_norm: float = 0.0) -> None:
        self.factor, self.floor, self.max_norm = factor, floor, max_norm
        self._rounds: dict[str, list[list[float]]] = {}

    def bound(self, key: str) -> float:
        """Largest norm to admit now; 0: any.

        Args:
            key: Norms of different keys are not compared: the phase's value.
        """
        norms = [norm for batch in self._rounds.get(key, []) for norm in batch]
        running = 0.0
        if self.factor and len(norms) >= self.FEWEST:
            running = max(self.factor * statistics.median(norms), self.floor)
        return min((bound for bound in (running, self.max_norm) if bound), default=0.0)

    def accept(self, key: str, norms: Iterable[float]) -> None:
        """Add the norms of a round's admitted updates, in any order."""
        batch = sorted(norms)
        if len(batch) > self.WINDOW:  # evenly spaced ranks keep its median, whoever came first
            batch = [batch[(2 * place + 1) * len(batch) // (2 * self.WINDOW)] for place in range(self.WINDOW)]
        rounds = [*self._rounds.get(key, []), *([batch] if batch else [])]
        while sum(map(len, rounds[1:])) >= self.WINDOW:
            rounds = rounds[1:]
        self._rounds[key] = rounds

    def state(self) -> dict[str, list[list[float]]]:
        """Plain JSON values for a checkpoint."""
        return {key: [list(batch) for batch in rounds] for key, rounds in self._rounds.items()}

    def load_state(self, state: Mapping[str, Iterable[Iterable[float]]]) -> None:
        """Continue where ``state()`` was taken."""
        self._rounds = {key: [[float(norm) for norm in batch] for batch in rounds] for key, rounds in state.items()}


def _check_header(update: Update, expected: Expected) -> Refusal | None:
    checks = (
        (Refusal.STALE, update.round == expected.round),
        (Refusal.REPLAY, update.plan_id == expected.plan_id),
        (Refusal.DUPLICATE, not expected.answered),
        (Refusal.BASE, update.base_digest == expected.layout.base_digest),
        (Refusal.LAYOUT, update.layout_digest == expected.layout.digest),
        (Refusal.PHASE, update.phase is expected.phase),
        (Refusal.RANK, update.rank == expected.rank),
        (Refusal.CODEC, update.codec is expected.codec),
        (Refusal.WEIGHT, update.weight <= expected.weight_cap),
    )
    return next((refusal for refusal, passed in checks if not passed), None)


def _check_values(update: Update, vector: NDArray[np.float32], max_norm: float) -> Admitted | Refusal:
    largest = largest_magnitude(vector)
    if not math.isfinite(largest):
        return Refusal.FINITE
    if largest >= LARGEST_VALUE:
        return Refusal.RANGE
    norm = math.sqrt(squared_norm(vector))
    if max_norm and norm > max_norm:
        return Refusal.NORM
    return Admitted(update, vector, norm)
