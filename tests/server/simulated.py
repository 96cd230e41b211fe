"""Devices, a transport and a clock for tests of the round loop: no network, no threads, no waiting."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from edge_runtime.formats.broadcast import to_factors, unpack_parts
from edge_runtime.formats.envelope import Envelope, check_payload, header_text, seal, unseal
from edge_runtime.formats.messages import Profile
from server.config import FederationConfig, load_federation, with_overrides
from server.federation import Federation, open_federation
from server.fleet import DriftingDevice, simulated_layout
from server.transport import Arrival

SMALL = (
    "name=test", "package=none", "adapter.targets=[q_proj]", "adapter.ranks=[4]", "adapter.alpha=8", "local.steps=2",
    "local.learning_rate=1e-2", "local.learning_rate_b=1e-2", "rounds=3", "cohort.size=3", "cohort.quorum=2",
    "cohort.over_selection=1", "cohort.patience_s=60", "evaluation.every=0", "gates.norm_factor=0",
    "phases.schedule=alternating", "phases.warmup_rounds=2", "phases.turn_rounds=1", "candidate_every=0",
    "optimizer.name=fedavg", "optimizer.average=0",
)  # fmt: skip


@lru_cache(maxsize=1)
def _base() -> FederationConfig:
    return load_federation("default", SMALL)


def settings(*overrides: str) -> FederationConfig:
    """A small federation of three devices."""
    return with_overrides(_base(), overrides)


class Clock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s, self.slept = now_s, list[float]()

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


class Phone(DriftingDevice):
    """A simulated device of any rank that keeps the factors it got, and the envelopes it was asked with."""

    def __init__(self, index, layout, config, *, rank=None, drift=0.3):
        super().__init__(index, layout, config.seed, drift)
        self.rank, self.held, self.targets = rank or layout.max_rank, {}, {}
        self.asked: list[Envelope] = []
        self.starts: dict[str, dict] = {}

    def __call__(self, envelope):
        self.asked.append(envelope)
        reply = super().__call__(envelope)
        if envelope.kind == "hello":
            return seal(replace(unseal(reply, Profile), rank=self.rank))
        return reply

    def _received(self, envelope, plan):
        payload = check_payload(envelope, plan.payload_sha256)
        vectors = unpack_parts(self.layout, plan.parts, payload, plan.rank, plan.seed, self.held)
        if vectors is None:
            return None
        self.held = vectors
        factors = to_factors(self.layout, vectors, plan.rank)
        if envelope.kind == "plan":
            self.starts[plan.plan_id] = {name: value.copy() for name, value in factors.items()}
        return factors

    def _target(self, module):
        if module not in self.targets:
            self.targets[module] = super()._target(module)
        return self.targets[module]


class Wire:
    """A transport to functions.

    A device that returns None never answers; one that raises ConnectionError is gone.

    Args:
        devices: Node to device.
        delays_s: Node to the seconds before its replies are there.
        shuffle: Gives the order in which replies come.
    """

    def __init__(
        self,
        devices: Mapping[int, Callable[[Envelope], Envelope | None]],
        clock: Clock,
        delays_s: Mapping[int, float] | None = None,
        shuffle: np.random.Generator | None = None,
        at_once: int = 8,
    ) -> None:
        self.devices, self.clock, self.delays_s = dict(devices), clock, dict(delays_s or {})
        self.shuffle, self.at_once = shuffle, at_once
        self.sent: list[tuple[int, Envelope]] = []
        self.received: list[tuple[int, Envelope]] = []
        self.ids = map(str, itertools.count())
        self._waiting: dict[str, tuple[int, Envelope, float]] = {}

    def nodes(self) -> list[int]:
        return list(self.devices)

    def push(self, messages: Sequence[tuple[int, Envelope]], ttl_s: float, group: str) -> list[str]:
        assert ttl_s > 0 and group
        ids = []
        for node, envelope in messages:
            ids.append(next(self.ids))
            self._waiting[ids[-1]] = (node, envelope, self.clock() + self.delays_s.get(node, 0.0))
            self.sent.append((node, envelope))
        return ids

    def pull(self, message_ids: Collection[str]) -> list[Arrival]:
        wanted = [key for key in message_ids if key in self._waiting and self._waiting[key][2] <= self.clock()]
        if self.shuffle is not None:
            wanted = list(self.shuffle.permutation(wanted))
        arrivals = []
        for key in wanted:
            node, envelope, _ = self._waiting[key]
            try:
                reply = self.devices[node](envelope)
                if reply is None:
                    continue
                arrivals.append(Arrival(key, node, reply))
                self.received.append((node, reply))
            except (ConnectionError, KeyError):
                arrivals.append(Arrival(key, node, None, "gone"))
            del self._waiting[key]
            if len(arrivals) == self.at_once:
                break
        return arrivals


def phones(config: FederationConfig, ranks: Sequence[int | None] = (None, None, None)) -> dict[int, Phone]:
    """One phone a rank, from node 1; None: the largest."""
    layout = simulated_layout(config)
    return {node: Phone(node - 1, layout, config, rank=rank) for node, rank in enumerate(ranks, 1)}


def federate(config: FederationConfig, directory: Path, devices, **wiring) -> Federation:
    """A federation over a Wire, new or resumed."""
    clock = Clock()
    wire = Wire(devices, clock, **wiring)
    return open_federation(config, simulated_layout(config), directory, wire, clock=clock, sleep=clock.sleep)


def rounds_of(federation: Federation, *without: str) -> list[dict]:
    """The ledger's records of rounds, without what no two runs share."""
    records = [record for record in federation.ledger.records() if record["event"] == "round"]
    return [{k: v for k, v in record.items() if k not in ("seconds", "time", *without)} for record in records]


def events_of(federation: Federation, event: str) -> list[dict]:
    return [record for record in federation.ledger.records() if record["event"] == event]


def wire_bytes(envelopes) -> int:
    return sum(len(header_text(envelope).encode()) + len(envelope.payload) for envelope in envelopes)
