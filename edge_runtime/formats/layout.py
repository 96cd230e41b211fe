"""The federation's adapter as one flat vector that every machine cuts in the same way.

An adapter of rank r_max is trained by devices of different ranks: a phone trains the first 4 ranks of the
adapter whose first 32 a mini-PC trains. The ranks are cut into segments, (0, 4], (4, 32], and a vector holds one
segment after the other, so that the vector of a smaller rank is a prefix of the larger one's. Each segment is
encoded, averaged and masked on its own, over the devices that trained it.

Within a segment, modules come in the order of their names, and in each module the rows of ``lora_A``, then the
columns of ``lora_B``, or the border of the core that the segment adds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Factors = dict[str, NDArray[np.float32]]


class Phase(StrEnum):
    """What a round trains; everything else stays as it is."""

    A = "a"
    B = "b"
    BOTH = "both"
    CORE = "core"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of factors that it trains."""
        return ("a", "b") if self is Phase.BOTH else (self.value,)


GROUPS = ("a", "b", "core")
_SUFFIXES = {"a": ".lora_A", "b": ".lora_B", "core": ".core"}


@dataclass(frozen=True, slots=True)
class Module:
    """A projection of the decoder that carries an adapter."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """What a federation trains: the update of module m is ``scale * lora_B [core] lora_A``.

    Attributes:
        base_digest: The base's digest, as in a package's manifest.
        modules: In the order of their names.
        ranks: Ends of the rank segments, growing; the last is r_max.
        alpha: The scale is alpha / r_max for every prefix.
    """

    base_digest: str
    modules: tuple[Module, ...]
    ranks: tuple[int, ...]
    alpha: float

    def __post_init__(self) -> None:
        names = [module.name for module in self.modules]
        if not names or names != sorted(set(names)):
            raise ValueError("modules must be sorted by name and different")
        if not self.ranks or any(low >= high for low, high in pairwise((0, *self.ranks))):
            raise ValueError(f"ranks must grow from 1, got {self.ranks}")

    @property
    def max_rank(self) -> int:
        """r_max."""
        return self.ranks[-1]

    @property
    def scale(self) -> float:
        """alpha / r_max."""
        return self.alpha / self.max_rank

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything above: two machines with the same digest cut vectors in the same way."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """Plain values, as a message holds them."""
        modules = [[module.name, module.in_features, module.out_features] for module in self.modules]
        return {
            "base_digest": self.base_digest,
            "modules": modules,
            "ranks": list(self.ranks),
            "alpha": float(self.alpha),
        }

    def segment_sizes(self, groups: Sequence[str], rank: int) -> tuple[int, ...]:
        """Number of values of each rank segment up to ``rank``, which must be the end of one."""
        return tuple(
            sum(self._values(module, group, low, high) for module in self.modules for group in groups)
            for low, high in self._spans(rank)
        )

    def size(self, groups: Sequence[str], rank: int) -> int:
        """Length of the vector."""
        return sum(self.segment_sizes(groups, rank))

    def flatten(
        self, factors: Mapping[str, NDArray[np.float32]], groups: Sequence[str], rank: int
    ) -> NDArray[np.float32]:
        """The vector (n,) of the first ``rank`` ranks of the named groups.

        Args:
            factors: ``<module>.lora_A`` (r, in), ``<module>.lora_B`` (out, r), ``<module>.core`` (r, r) with r of
                at least ``rank``.
            groups: From GROUPS.
            rank: The end of a segment.
        """
        vector = np.empty(self.size(groups, rank), np.float32)
        for start, stop, name, group, span in self._places(groups, rank):
            vector[start:stop] = np.concatenate([part.ravel() for part in _parts(factors[name], group, *span)])
        return vector

    def unflatten(self, vector: NDArray[np.float32], groups: Sequence[str], rank: int) -> Factors:
        """Inverse of ``flatten``: new factors of exactly ``rank`` ranks.

        Raises:
            ValueError: The vector is not of their length.
        """
        if vector.shape != (self.size(groups, rank),):
            raise ValueError(f"{vector.shape} values for {self.size(groups, rank)} of {groups} at rank {rank}")
        factors = {
            f"{module.name}{_SUFFIXES[group]}": np.zeros(_shape(module, group, rank), np.float32)
            for module in self.modules
            for group in groups
        }
        for start, _, name, group, span in self._places(groups, rank):
            for part in _parts(factors[name], group, *span):
                part[...] = vector[start : start + part.size].reshape(part.shape)
                start += part.size
        return factors

    def split(self, vector: NDArray[Any], groups: Sequence[str], rank: int) -> dict[str, NDArray[Any]]:
        """One vector a group out of the vector of several, values and dtype untouched."""
        parts: dict[str, list[NDArray[Any]]] = {group: [] for group in groups}
        for start, stop, _, group, _ in self._places(groups, rank):
            parts[group].append(vector[start:stop])
        return {group: np.concatenate(found) for group, found in parts.items()}

    def prefix(self, factors: Mapping[str, NDArray[np.float32]], rank: int) -> Factors:
        """The first ``rank`` ranks of every factor, copied."""
        cut = {}
        for name, value in factors.items():
            if name.endswith(".lora_A"):
                cut[name] = value[:rank].copy()
            else:
                cut[name] = value[:rank, :rank].copy() if name.endswith(".core") else value[:, :rank].copy()
        return cut

    def _spans(self, rank: int) -> list[tuple[int, int]]:
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is not one of {self.ranks}")
        return list(pairwise((0, *self.ranks[: self.ranks.index(rank) + 1])))

    def _values(self, module: Module, group: str, low: int, high: int) -> int:
        if group == "core":
            return high * high - low * low
        return (high - low) * (module.in_features if group == "a" else module.out_features)

    def _places(self, groups: Sequence[str], rank: int) -> Iterator[tuple[int, int, str, str, tuple[int, int]]]:
        """(start, stop, factor, group, (low, high)) of every stretch of the vector."""
        start = 0
        for low, high in self._spans(rank):
            for module in self.modules:
                for group in groups:
                    stop = start + self._values(module, group, low, high)
                    yield start, stop, f"{module.name}{_SUFFIXES[group]}", group, (low, high)
                    start = stop


def initial_factors(layout: AdapterLayout, seed: int) -> Factors:
    """Round 0: lora_A uniform in ±1/sqrt(in), as PEFT starts it, lora_B zero: derived, never sent.

    The raw stream of PCG64 is fixed by NumPy's compatibility policy; the distributions on top of it are not.
    """
    factors: Factors = {}
    for index, module in enumerate(layout.modules):
        raw = np.random.PCG64([seed, index]).random_raw(layout.max_rank * module.in_features)
        unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        bound = np.float32(1.0 / np.sqrt(module.in_features))
        factors[f"{module.name}.lora_A"] = (unit * bound).reshape(layout.max_rank, module.in_features)
        factors[f"{module.name}.lora_B"] = np.zeros((module.out_features, layout.max_rank), np.float32)
    return factors


def effective_pairs(
    layout: AdapterLayout, factors: Mapping[str, NDArray[np.float32]]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Module to (lora_a, lora_b) as a runtime takes them: a core is multiplied into lora_b."""
    pairs = {}
    for module in layout.modules:
        lora_a, lora_b = factors[f"{module.name}.lora_A"], factors[f"{module.name}.lora_B"]
        core = factors.get(f"{module.name}.core")
        pairs[module.name] = (lora_a, lora_b if core is None else lora_b @ core)
    return pairs


def _shape(module: Module, group: str, rank: int) -> tuple[int, int]:
    return {"a": (rank, module.in_features), "b": (module.out_features, rank), "core": (rank, rank)}[group]


def _parts(factor: NDArray[np.float32], group: str, low: int, high: int) -> list[NDArray[np.float32]]:
    """Views of what a segment adds to a factor; lora_B goes rank by rank, like lora_A."""
    if group == "a":
        return [factor[low:high]]
    if group == "b":
        return [factor.T[low:high]]
    return [factor[low:high, :high], factor[:low, low:high]]
