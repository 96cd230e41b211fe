"""Folding updates one by one into a weighted mean that does not depend on their order.

Values become integers of 2**-36 before they are weighed and summed, so that addition is exact: any order of
arrival, any grouping and any restart give the same bits, and the memory is one int64 a value however many
devices answer. Each rank segment is averaged over the devices that trained it; a device of a smaller rank does
not pull the larger ranks towards zero (arXiv:2602.13486 describes that collapse).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.codec import chunks, largest_magnitude
from edge_runtime.formats.layout import AdapterLayout, Factors

FRACTION_BITS = 36
LARGEST_VALUE = 8.0  # |value| stays below
LARGEST_TOTAL_WEIGHT = 1 << 23  # 2**3 * 2**36 * 2**23 = 2**62: a sum fits int64

_UNIT = 2.0**FRACTION_BITS


class Mean(NamedTuple):
    """A weighted mean, segment by segment.

    Attributes:
        vector: float64 (N,) at r_max; zeros in a segment without contributors.
        weights: Sum of the contributors' weights of each segment; 0: nobody trained it, it must stay as it is.
        contributors: Devices of each segment.
    """

    vector: NDArray[np.float64]
    weights: tuple[int, ...]
    contributors: tuple[int, ...]


class Accumulator:
    """Weighted sums of updates of nested ranks, exact in fixed point.

    Args:
        layout: The federation's adapter.
        groups: Groups of factors that the phase trains, as in ``Phase.groups``.

    Attributes:
        count: Updates folded so far.
    """

    def __init__(self, layout: AdapterLayout, groups: Sequence[str]) -> None:
        self.layout, self.groups, self.count = layout, tuple(groups), 0
        self._sizes = layout.segment_sizes(self.groups, layout.max_rank)
        self._sums = np.zeros(sum(self._sizes), np.int64)
        self._squares = [0] * len(self._sizes)  # weighted, in units of 2**-72
        self._weights = [0] * len(self._sizes)
        self._contributors = [0] * len(self._sizes)

    def fold(self, vector: NDArray[np.float32], rank: int, weight: int) -> None:
        """Add one update; it may be forgotten afterwards.

        Args:
            vector: float32 (n,), n = ``layout.size(groups, rank)``, each |value| < 8.
            rank: The end of a rank segment.
            weight: Whole, at least 1.

        Raises:
            ValueError: Not such a vector, or the weights of a segment would exceed 2**23; nothing was added then.
        """
        sizes = self.layout.segment_sizes(self.groups, rank)
        if vector.dtype != np.float32 or vector.shape != (sum(sizes),):
            raise ValueError(f"{vector.dtype} {vector.shape}: float32 ({sum(sizes)},) is needed at rank {rank}")
        if not largest_magnitude(vector) < LARGEST_VALUE:
            raise ValueError(f"values must be finite and smaller than {LARGEST_VALUE:g}")
        if type(weight) is not int or not 1 <= weight <= LARGEST_TOTAL_WEIGHT - max(self._weights[: len(sizes)]):
            raise ValueError(f"weight {weight}: from 1, and all together at most {LARGEST_TOTAL_WEIGHT}")
        self.count += 1
        for index, (start, stop) in enumerate(_spans(sizes)):
            square = sum(self._add(vector, chunk, weight) for chunk in chunks(start, stop))
            self._squares[index] += weight * square
            self._weights[index] += weight
            self._contributors[index] += 1

    def merge(self, other: Accumulator) -> None:
        """Add everything that another accumulator of the same adapter and groups has folded.

        Raises:
            ValueError: Another adapter or other groups, or weights above 2**23; nothing was added then.
        """
        if other.groups != self.groups or other.layout != self.layout:
            raise ValueError("accumulators of different adapters or groups")
        weights = [mine + theirs for mine, theirs in zip(self._weights, other._weights, strict=True)]
        if max(weights) > LARGEST_TOTAL_WEIGHT:
            raise ValueError(f"weights of {max(weights)} are more than {LARGEST_TOTAL_WEIGHT}")
        self._sums += other._sums
        self._weights, self.count = weights, self.count + other.count
        self._squares = [mine + theirs for mine, theirs in zip(self._squares, other._squares, strict=True)]
        self._contributors = [a + b for a, b in zip(self._contributors, other._contributors, strict=True)]

    def mean(self) -> Mean:
        """The weighted mean of each segment over its contributors; within 2**-37 of the exact one, plus float64."""
        vector = np.zeros(self._sums.size, np.float64)
        for (start, stop), weight in zip(_spans(self._sizes), self._weights, strict=True):
            if weight:
                np.divide(self._sums[start:stop], weight * _UNIT, out=vector[start:stop])
        return Mean(vector, tuple(self._weights), tuple(self._contributors))

    def dispersion(self) -> float:
        """How much the updates disagree: 1 - |mean|² / weighted mean of |update|², in [0, 1].

        0: all the same; near 1: they cancel out. Summed over the segments that have contributors; 0 without any.
        """
        agreed = spread = 0.0
        for index, (start, stop) in enumerate(_spans(self._sizes)):
            if weight := self._weights[index]:
                agreed += squared_norm(self._sums[start:stop]) / (weight * weight)
                spread += self._squares[index] / weight
        return min(max(1.0 - agreed / spread, 0.0), 1.0) if spread else 0.0

    def _add(self, vector: NDArray[np.float32], chunk: slice, weight: int) -> int:
        """Add a chunk; the sum of its squares in units of 2**-72, which depends on the vector alone."""
        values = vector[chunk].astype(np.float64)
        values *= _UNIT
        np.rint(values, out=values)
        codes = values.astype(np.int64)
        codes *= weight
        self._sums[chunk] += codes
        return int(np.square(values, out=values).sum())


def group_median(groups: Sequence[Accumulator]) -> Mean:
    """Median of means over accumulators, one a group: see ``median_of_means``.

    Raises:
        ValueError: No groups, or of different adapters or phases.
    """
    if not groups or any(one.groups != groups[0].groups or one.layout != groups[0].layout for one in groups):
        raise ValueError("one accumulator a group, all of one adapter and phase")
    sizes = groups[0].layout.segment_sizes(groups[0].groups, groups[0].layout.max_rank)
    return median_of_means([one.mean() for one in groups], sizes)


def median_of_means(means: Sequence[Mean], sizes: Sequence[int]) -> Mean:
    """The coordinate-wise median of the groups' means, every group counting the same.

    Withstands liars as long as fewer than half of the groups hold one; with more, as with large groups and many
    liars, it is no better than a mean. A segment to which no majority of the groups contributed has no such
    guarantee, and stays as it is: weight 0. Source: Yin et al. 2018, arXiv:1803.01498, over groups.

    Args:
        means: One a group, of one adapter and phase; at least one.
        sizes: Values of each segment.
    """
    vector = np.zeros(sum(sizes), np.float64)
    weights, contributors = [0] * len(sizes), [0] * len(sizes)
    for index, (start, stop) in enumerate(_spans(sizes)):
        present = [one for one in means if one.weights[index]]
        if 2 * len(present) <= len(means):
            continue
        weights[index] = sum(one.weights[index] for one in present)
        contributors[index] = sum(one.contributors[index] for one in present)
        for chunk in chunks(start, stop):
            vector[chunk] = np.median([one.vector[chunk] for one in present], axis=0)
    return Mean(vector, tuple(weights), tuple(contributors))


def assign_groups(nodes: Sequence[int], groups: int, seed: int) -> dict[int, int]:
    """Deal nodes into groups whose sizes differ by at most one.

    Which group a node gets follows from the hash of the seed and its number: with a new seed each round no node
    can choose its neighbours.

    Args:
        nodes: Different numbers.
        groups: How many, at least 1.
        seed: Of the round.

    Returns:
        Node to group, in [0, groups).
    """
    dealt = sorted(nodes, key=lambda node: hashlib.sha256(f"{seed} {node}".encode("ascii")).digest())
    return {node: place % groups for place, node in enumerate(dealt)}


def refactor_for_core(factors: Mapping[str, NDArray[np.float32]]) -> Factors:
    """Orthonormal lora_A and lora_B, and the core between them, with the same product (to float32).

    Training the core alone is then well conditioned, and its mean is exact (Fed-SB, arXiv:2502.15436). The first
    p columns span what the first p spanned; a prefix becomes the projection of the whole update on its span.
    Where lora_B is zero its columns are arbitrary: warm up in phase b first.

    Args:
        factors: ``<module>.lora_A`` (r, in), ``<module>.lora_B`` (out, r), r at most in and out, and perhaps
            ``<module>.core`` (r, r).

    Raises:
        ValueError: The rank is larger than a module.
    """
    changed: Factors = {}
    for module in _modules(factors):
        lora_a, lora_b = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
        rank = lora_a.shape[0]
        if rank > min(lora_a.shape[1], lora_b.shape[0]):
            raise ValueError(f"{module}: rank {rank} is larger than {lora_b.shape[0]} x {lora_a.shape[1]}")
        core = factors.get(f"{module}.core", np.eye(rank, dtype=np.float32)).astype(np.float64)
        left, left_triangle = np.linalg.qr(lora_b.astype(np.float64))
        right, right_triangle = np.linalg.qr(lora_a.T.astype(np.float64))
        changed[f"{module}.lora_A"] = np.ascontiguousarray(right.T, np.float32)
        changed[f"{module}.lora_B"] = left.astype(np.float32)
        changed[f"{module}.core"] = (left_triangle @ core @ right_triangle.T).astype(np.float32)
    return changed


def fold_core(factors: Mapping[str, NDArray[np.float32]]) -> Factors:
    """The plain adapter of the same product (to float32): the core goes into lora_B, as in ``effective_pairs``.

    The whole product stays the same; that of a prefix does not.
    """
    folded = {name: value.copy() for name, value in factors.items() if not name.endswith(".core")}
    for module in _modules(factors):
        if (core := factors.get(f"{module}.core")) is not None:
            lora_b = factors[f"{module}.lora_B"].astype(np.float64)
            folded[f"{module}.lora_B"] = (lora_b @ core.astype(np.float64)).astype(np.float32)
    return folded


def stack(
    pairs: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], weights: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One module's exact mean product as a wider adapter (FLoRA, arXiv:2409.05976).

    The rank grows with every device, so the result must be merged into the base: only for a base in floating
    point, never for a frozen 4-bit one.

    Args:
        pairs: (lora_A (r_i, in), lora_B (out, r_i)) of each device.
        weights: Of each device.

    Returns:
        (lora_A (sum r_i, in), lora_B (out, sum r_i)).
    """
    total = sum(weights)
    lora_a = np.concatenate([lora_a for lora_a, _ in pairs])
    scaled = [lora_b * np.float32(weight / total) for (_, lora_b), weight in zip(pairs, weights, strict=True)]
    return lora_a, np.concatenate(scaled, axis=1)


def squared_norm(vector: NDArray[np.float32] | NDArray[np.int64] | NDArray[np.float64]) -> float:
    """Sum of squares in float64, of the bits of the vector alone: no BLAS, whose threads change the order."""
    return math.fsum(float(np.square(vector[chunk].astype(np.float64)).sum()) for chunk in chunks(0, vector.size))


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    stops = np.cumsum(sizes).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _modules(factors: Mapping[str, NDArray[np.float32]]) -> list[str]:
    return [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
