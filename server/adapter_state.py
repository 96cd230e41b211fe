"""What a federation has learned so far: the factors as devices hold them, and what rounding kept back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.broadcast import Snapshot, initial_vector, pack_parts, take_snapshot
from edge_runtime.formats.codec import Codec, decode
from edge_runtime.formats.envelope import sha256
from edge_runtime.formats.layout import AdapterLayout, Factors
from edge_runtime.formats.messages import Part
from server.aggregation import fold_core, refactor_for_core


@dataclass(slots=True)
class AdapterState:
    """The global adapter between two rounds.

    Attributes:
        snapshots: What is broadcast, by group (``a``, ``b``, and ``core`` while it is trained).
        values: What the snapshots decode to, (n,) float32 at rank r_max: the state that devices hold.
        residuals: What encoding kept back, (n,) float32; it enters the next change of the group.
        newest: The largest version so far.
        averages: Running means of the values, (n,) float32: the adapter that is offered, while devices train on.
        averaged: Rounds in them.
        brought: Parts, payload and its digest for each kind of device, so that a thousand plans share a few payloads.
    """

    layout: AdapterLayout
    seed: int
    codec: Codec
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    residuals: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    newest: int = 0
    averages: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    averaged: int = 0
    brought: dict[tuple[object, ...], tuple[tuple[Part, ...], bytes, str]] = field(default_factory=dict)

    @property
    def versions(self) -> dict[str, int]:
        """Version of every group."""
        return {group: snapshot.version for group, snapshot in self.snapshots.items()}

    def bring(self, rank: int, held: Mapping[str, int]) -> tuple[tuple[Part, ...], bytes, str]:
        """Parts, payload and its sha256 for a device of a rank that holds some versions."""
        kind = (rank, *(held.get(group) == version for group, version in self.versions.items()))
        if kind not in self.brought:
            parts, payload = pack_parts(self.layout, list(self.snapshots.values()), rank, held)
            self.brought[kind] = (parts, payload, sha256(payload))
        return self.brought[kind]

    def apply(self, group: str, change: NDArray[np.float64]) -> None:
        """Add a change (n,), and what earlier rounding kept back, to a group."""
        self._put(group, [self.residuals[group], change, self.values[group]])

    def copy(self) -> AdapterState:
        """A second state that changes by itself; arrays are replaced, never written to, and are shared."""
        return replace(
            self,
            snapshots=dict(self.snapshots),
            values=dict(self.values),
            residuals=dict(self.residuals),
            averages=dict(self.averages),
            brought={},
        )

    def average(self, decay: float) -> None:
        """Take the values after a round into the running means, of which the last rounds make up most.

        The weight of round t is (decay + 1) / (t + decay): polynomial-decay averaging, Shamir & Zhang 2013
        (arXiv:1212.1824), section 4.
        """
        self.averaged += 1
        weight = np.float32((decay + 1.0) / (self.averaged + decay))
        for group, value in self.values.items():
            before = self.averages.get(group, value)
            self.averages[group] = (before + weight * (value - before)).astype(np.float32)

    def factors(self, *, averaged: bool = False) -> Factors:
        """The factors as devices hold them, or their running means where there are any."""
        groups: Factors = {}
        for group, vector in (self.values | (self.averages if averaged else {})).items():
            groups |= self.layout.unflatten(vector, (group,), self.layout.max_rank)
        return groups

    def enter_core(self) -> None:
        """Turn lora_A and lora_B into fixed orthonormal bases and put their product into a core."""
        self._replace(refactor_for_core(self.factors()), ("a", "b", "core"))

    def leave_core(self) -> None:
        """Multiply the core into lora_B and forget it."""
        folded = fold_core(self.factors())
        for store in (self.snapshots, self.values, self.residuals):
            store.pop("core", None)
        self.brought = {}
        self._replace(folded, ("b",))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything but numbers, for a checkpoint."""
        raws = {f"raw.{g}": np.frombuffer(s.raw, np.uint8) for g, s in self.snapshots.items()}
        residuals = {f"residual.{group}": vector for group, vector in self.residuals.items()}
        return raws | residuals | {f"average.{group}": vector for group, vector in self.averages.items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of a checkpoint, plain JSON."""
        groups = {group: [s.version, s.codec.value] for group, s in self.snapshots.items()}
        return {
            "seed": self.seed,
            "codec": self.codec.value,
            "newest": self.newest,
            "averaged": self.averaged,
            "groups": groups,
        }

    def _replace(self, factors: Mapping[str, NDArray[np.float32]], groups: tuple[str, ...]) -> None:
        self.averages, self.averaged = {}, 0  # means of another basis mean nothing
        for group in groups:
            self._put(group, [self.layout.flatten(factors, (group,), self.layout.max_rank)])

    def _put(self, group: str, wanted: list[NDArray[Any]]) -> None:
        self.newest += 1
        self.snapshots[group], self.values[group], self.residuals[group] = take_snapshot(
            self.layout, group, self.newest, wanted, self.codec, self.seed
        )
        self.brought = {}


def start_state(layout: AdapterLayout, seed: int, codec: Codec) -> AdapterState:
    """Round 0: everything at version 0, derived from the seed."""
    state = AdapterState(layout, seed, codec)
    for group in ("a", "b"):
        state.snapshots[group] = Snapshot(group, 0, codec, b"")
        state.values[group] = initial_vector(layout, group, layout.max_rank, seed)
        state.residuals[group] = np.zeros(state.values[group].size, np.float32)
    return state


def restore_state(
    layout: AdapterLayout, arrays: Mapping[str, NDArray[Any]], numbers: Mapping[str, Any]
) -> AdapterState:
    """Inverse of ``arrays`` and ``numbers``."""
    state = AdapterState(layout, numbers["seed"], Codec(numbers["codec"]), newest=numbers["newest"])
    state.averaged = numbers["averaged"]
    for name, vector in arrays.items():
        if name.startswith("average."):
            state.averages[name.removeprefix("average.")] = np.asarray(vector, np.float32)
    for group, (version, codec) in numbers["groups"].items():
        raw = arrays[f"raw.{group}"].tobytes()
        state.snapshots[group] = Snapshot(group, version, Codec(codec), raw)
        state.values[group] = initial_vector(layout, group, layout.max_rank, state.seed)
        if version:
            sizes = layout.segment_sizes((group,), layout.max_rank)
            state.values[group] = state.values[group] + decode(raw, sizes, Codec(codec))
        state.residuals[group] = np.asarray(arrays[f"residual.{group}"], np.float32)
    return state
