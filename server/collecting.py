"""One round's replies: asked for, judged, added to integer sums and forgotten, in whatever order they come."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

from edge_runtime.formats.envelope import Envelope, header_text, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import Phase
from edge_runtime.formats.messages import Decline, Reason, Update
from server.aggregation import Accumulator, Mean, assign_groups, group_median
from server.federation import Federation
from server.gates import Expected, Refusal, admit
from server.plan import make_plan, plan_id
from server.selection import Device
from server.transport import Arrival, polling_pause_s

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Collected:
    """What a round's replies came to.

    Attributes:
        mean: At rank r_max, or None while nothing is folded.
        folded: Devices whose update is in the mean, with the update's header.
        lost: Devices that did not answer in time, or whose node went away.
        scales: What a code of a masked sum stood for, one a segment; empty without masks.
        seconds: Where the time went.
    """

    mean: Mean | None = None
    dispersion: float = 0.0
    folded: list[tuple[Device, Update]] = field(default_factory=list)
    declined: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[Device] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    scales: tuple[float, ...] = ()
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("push", "wait", "fold", "commit"), 0.0))


def message_bytes(envelope: Envelope) -> int:
    """Header and payload, as they are counted in both directions."""
    return len(header_text(envelope)) + len(envelope.payload)


class Conversation:
    """Messages of one exchange and whoever has not answered yet; counts bytes and time."""

    def __init__(self, federation: Federation, collected: Collected, group: str, deadline_s: float) -> None:
        self.federation, self.collected, self.group = federation, collected, group
        self.end_s = federation.clock() + deadline_s
        self.pending: dict[str, Device] = {}

    def send(self, messages: Sequence[tuple[Device, Envelope]]) -> None:
        """Push one message to each device."""
        started_s = self.federation.clock()
        pairs = [(device.node, envelope) for device, envelope in messages]
        ttl_s = max(self.end_s - started_s, 1.0) + 60.0
        ids = self.federation.transport.push(pairs, ttl_s, self.group)
        for message_id, (device, envelope) in zip(ids, messages, strict=True):
            self.pending[message_id] = device
            self.collected.bytes_down += message_bytes(envelope)
        self.collected.seconds["push"] += self.federation.clock() - started_s

    def arrivals(self) -> Iterable[tuple[Device, Arrival]]:
        """Replies as they come, until none is missing or time is up."""
        clock, last = self.federation.clock, False
        quiet_since_s = clock()
        while self.pending and not last:
            started_s = clock()
            last = started_s >= self.end_s  # one more look after the last pause
            arrived = self.federation.transport.pull(list(self.pending))
            self.collected.seconds["wait"] += clock() - started_s
            for arrival in arrived:
                if (device := self.pending.pop(arrival.message_id, None)) is not None:
                    if arrival.envelope is not None:
                        self.collected.bytes_up += message_bytes(arrival.envelope)
                    yield device, arrival
            if arrived:
                quiet_since_s = clock()
            elif self.pending:
                pause_s = min(polling_pause_s(clock() - quiet_since_s), max(self.end_s - clock(), 0.0))
                self.federation.sleep(pause_s)
                self.collected.seconds["wait"] += pause_s


@dataclass(frozen=True, slots=True)
class Work:
    """What devices were asked for, and from which versions of the factors they start."""

    number: int
    attempt: int
    phase: Phase
    deadline_s: float
    versions: Mapping[str, int]


def collect_plain(federation: Federation, cohort: Sequence[Device], work: Work) -> Collected:
    """Run the cohort through a round in which the server sees every update, one at a time."""
    collected = Collected()
    folding = Folding(federation, collected, cohort, work)
    talk = Conversation(federation, collected, f"round-{work.number}", work.deadline_s)
    talk.send([(device, plan_for(federation, device, work)) for device in cohort])
    for device, arrival in talk.arrivals():
        if arrival.envelope is not None and needs_factors(device, arrival.envelope):
            talk.send([(device, plan_for(federation, device, work))])
        else:
            folding.take(device, work, arrival)
        if len(collected.folded) >= federation.config.cohort.size:
            break
    enough = len(collected.folded) >= federation.config.cohort.size
    for device in talk.pending.values():
        folding.lose(device, work, "surplus" if enough else "deadline")
    folding.close()
    return collected


def plan_for(federation: Federation, device: Device, work: Work) -> Envelope:
    """One device's plan."""
    return make_plan(
        federation.config,
        federation.state,
        device,
        work.number,
        work.phase,
        work.deadline_s,
        attempt=work.attempt,
    )


def noise_share(federation: Federation) -> float:
    """Standard deviation of the noise that each device adds, when noise is distributed.

    At least ``quorum`` shares are in a sum: their variances add up to (multiplier x clip) squared.
    """
    privacy = federation.config.privacy
    if privacy.noise != "distributed":
        return 0.0
    return privacy.noise_multiplier * privacy.clip_norm / sqrt(federation.config.cohort.quorum)


def needs_factors(device: Device, envelope: Envelope) -> bool:
    """Whether a device lacks a part that it was believed to hold; it is believed to hold none then."""
    missing = envelope.kind == "decline" and envelope.header.get("reason") == Reason.FACTORS and bool(device.held)
    if missing:
        device.held = {}
    return missing


class Folding:
    """Judges replies and adds the good ones to integer sums: one, or one a group for the median of their means."""

    def __init__(self, federation: Federation, collected: Collected, cohort: Sequence[Device], work: Work) -> None:
        robust = federation.config.robust
        count = robust.groups if robust.method == "group_median" else 1
        self.federation, self.collected, self.work = federation, collected, work
        self.groups = assign_groups([device.node for device in cohort], count, federation.config.seed + work.number)
        self.sums = [Accumulator(federation.layout, work.phase.groups) for _ in range(count)]

    def take(self, device: Device, work: Work, arrival: Arrival, weight: Callable[[int], int] = int) -> None:
        """Judge one reply; ``weight`` turns the update's own weight into what it counts."""
        if arrival.envelope is None:
            self.lose(device, work, arrival.error)
        elif arrival.envelope.kind == "decline":
            self._decline(device, work, arrival.envelope)
        else:
            started_s = self.federation.clock()
            device.held = dict(work.versions)
            self._fold(device, work, arrival.envelope, weight)
            self.collected.seconds["fold"] += self.federation.clock() - started_s

    def lose(self, device: Device, work: Work, why: str) -> None:
        """Note a device that did not answer."""
        self.collected.lost.append(device)
        device.outcome(work.number, f"lost:{why}"[:60])

    def refuse(self, device: Device, work: Work, refusal: Refusal) -> None:
        """Note an update that was not folded."""
        self.collected.refused[refusal.value] += 1
        device.outcome(work.number, f"refused:{refusal.value}")
        log.warning("round %d: update of %s refused: %s", work.number, device.name, refusal.value)

    def close(self) -> None:
        """Mean and dispersion."""
        collected, used = self.collected, [accumulator for accumulator in self.sums if accumulator.count]
        if not used:
            return
        collected.mean = used[0].mean() if len(self.sums) == 1 else group_median(self.sums)
        for accumulator in used[1:]:
            used[0].merge(accumulator)
        # Updates without anything in common have 1 - 1 / n: told as a share of that, it means the same in any cohort.
        count = len(collected.folded)
        collected.dispersion = min(used[0].dispersion() / (1.0 - 1.0 / count), 1.0) if count > 1 else 0.0

    def _fold(self, device: Device, work: Work, envelope: Envelope, weight: Callable[[int], int]) -> None:
        federation, config = self.federation, self.federation.config
        expected = Expected(
            layout=federation.layout,
            round=work.number,
            phase=work.phase,
            rank=device.rank,
            codec=config.codec.up,
            weight_cap=config.local.weight_cap if config.local.weight == "sequences" else 1,
            max_norm=federation.norm_gate.bound(work.phase.value),
            plan_id=plan_id(config, federation.layout, work.number, work.attempt, device.name),
        )
        admitted = admit(envelope, expected)
        if isinstance(admitted, Refusal):
            self.refuse(device, work, admitted)
            return
        vector, bound = admitted.vector, config.privacy.clip_norm
        if bound and admitted.norm > bound:
            # The device clips before it encodes; what rounding added, or a liar, is cut here.
            vector = vector * np.float32(bound / admitted.norm)
        counted = weight(admitted.update.weight)
        self.sums[self.groups.get(device.node, 0)].fold(vector, device.rank, counted)
        self.collected.norms.append(admitted.norm)
        self.collected.folded.append((device, admitted.update))
        device.step_s = admitted.update.step_s or device.step_s
        device.outcome(work.number, "folded")

    def _decline(self, device: Device, work: Work, envelope: Envelope) -> None:
        try:
            decline = unseal(envelope, Decline)
        except MessageError:
            self.refuse(device, work, Refusal.MALFORMED)
            return
        self.collected.declined[decline.reason.value] += 1
        device.not_before_s = self.federation.clock() + decline.retry_after_s
        device.outcome(work.number, f"declined:{decline.reason.value}")
