"""One round's replies: asked for, judged, added to integer sums and forgotten, in whatever order they come."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.formats.envelope import Envelope, header_text, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import Phase
from edge_runtime.formats.messages import Decline, Reason, Update
from server.aggregation import Accumulator, Mean, assign_groups, group_median
from server.federation import Federation
from server.gates import Admitted, Expected, Refusal, admit
from server.plan import make_plan, plan_id
from server.selection import Device
from server.transport import Arrival

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.02, 1.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Collected:
    """What a round's replies came to.

    Attributes:
        mean: At rank r_max, or None while nothing is folded.
        folded: Devices whose update is in the mean, with the update's header.
        lost: Devices that did not answer in time, or whose node went away.
        largest_share: Of one device in a segment's mean, by which central noise is scaled.
        seconds: Where the time went.
    """

    mean: Mean | None = None
    dispersion: float = 0.0
    folded: list[tuple[Device, Update]] = field(default_factory=list)
    declined: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[Device] = field(default_factory=list)
    largest_share: float = 0.0
    norms: list[float] = field(default_factory=list)
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
        clock, pause_s = self.federation.clock, _SHORTEST_POLL_S
        while self.pending and clock() < self.end_s:
            started_s = clock()
            arrived = self.federation.transport.pull(list(self.pending))
            self.collected.seconds["wait"] += clock() - started_s
            for arrival in arrived:
                if (device := self.pending.pop(arrival.message_id, None)) is not None:
                    if arrival.envelope is not None:
                        self.collected.bytes_up += message_bytes(arrival.envelope)
                    yield device, arrival
            pause_s = _SHORTEST_POLL_S if arrived else min(pause_s * 1.5, _LONGEST_POLL_S)
            if self.pending and not arrived:
                self.federation.sleep(min(pause_s, max(self.end_s - clock(), 0.0)))
                self.collected.seconds["wait"] += pause_s


def collect_plain(
    federation: Federation, cohort: Sequence[Device], number: int, attempt: int, phase: Phase, deadline_s: float
) -> Collected:
    """Run the cohort through a round in which the server sees every update, one at a time."""
    config, collected = federation.config, Collected()
    sums = _Sums(federation, cohort, number, phase)
    talk = Conversation(federation, collected, f"round-{number}", deadline_s)
    versions = federation.state.versions

    def plan(device: Device) -> Envelope:
        return make_plan(
            config,
            federation.state,
            device,
            number,
            phase,
            deadline_s,
            attempt=attempt,
            noise_std=_noise_std(federation),
        )

    talk.send([(device, plan(device)) for device in cohort])
    for device, arrival in talk.arrivals():
        if arrival.envelope is None:
            collected.lost.append(device)
            device.outcome(number, f"lost:{arrival.error}"[:60])
        elif needs_factors(device, arrival.envelope):
            talk.send([(device, plan(device))])
        elif arrival.envelope.kind == "decline":
            _declined(federation, collected, device, arrival.envelope, number)
        else:
            device.held = dict(versions)
            started_s = federation.clock()
            _fold(federation, collected, sums, device, arrival.envelope, number, attempt, phase)
            collected.seconds["fold"] += federation.clock() - started_s
        if len(collected.folded) >= config.cohort.size:
            break
    for device in talk.pending.values():
        collected.lost.append(device)
        device.outcome(number, "lost:deadline" if len(collected.folded) < config.cohort.size else "lost:surplus")
    federation.norm_gate.accept(phase.value, collected.norms)
    if collected.folded:
        sums.close(collected)
    return collected


class _Sums:
    """The accumulators of a round: one, or one a group of devices for the median of their means."""

    def __init__(self, federation: Federation, cohort: Sequence[Device], number: int, phase: Phase) -> None:
        robust, layout = federation.config.robust, federation.layout
        count = robust.groups if robust.method == "group_median" else 1
        self.groups = assign_groups([device.node for device in cohort], count, federation.config.seed + number)
        self.sums = [Accumulator(layout, phase.groups) for _ in range(count)]
        self.largest_weight = 0

    def fold(self, device: Device, admitted: Admitted) -> None:
        weight = admitted.update.weight
        self.sums[self.groups[device.node]].fold(admitted.vector, device.rank, weight)
        self.largest_weight = max(self.largest_weight, weight)

    def close(self, collected: Collected) -> None:
        """Mean, dispersion and the largest share that one device has in a segment."""
        used = [accumulator for accumulator in self.sums if accumulator.count]
        whole = used[0]
        collected.mean = whole.mean() if len(self.sums) == 1 else group_median(used)
        for accumulator in used[1:]:
            whole.merge(accumulator)
        collected.dispersion = whole.dispersion()
        collected.largest_share = self.largest_weight / min((w for w in whole.mean().weights if w), default=1)


def _fold(
    federation: Federation,
    collected: Collected,
    sums: _Sums,
    device: Device,
    envelope: Envelope,
    number: int,
    attempt: int,
    phase: Phase,
) -> None:
    config = federation.config
    expected = Expected(
        layout=federation.layout,
        round=number,
        phase=phase,
        rank=device.rank,
        codec=config.codec.up,
        weight_cap=config.local.weight_cap if config.local.weight == "sequences" else 1,
        max_norm=federation.norm_gate.bound(phase.value),
        plan_id=plan_id(config, federation.layout, number, attempt, device.name),
    )
    admitted = admit(envelope, expected)
    if isinstance(admitted, Refusal):
        collected.refused[admitted.value] += 1
        device.outcome(number, f"refused:{admitted.value}")
        log.warning("round %d: update of %s refused: %s", number, device.name, admitted.value)
        return
    sums.fold(device, admitted)
    collected.norms.append(admitted.norm)
    device.step_s = admitted.update.step_s or device.step_s
    device.outcome(number, "folded")
    collected.folded.append((device, admitted.update))


def needs_factors(device: Device, envelope: Envelope) -> bool:
    """Whether a device lacks a part that it was believed to hold; it is believed to hold none then."""
    missing = envelope.kind == "decline" and envelope.header.get("reason") == Reason.FACTORS and bool(device.held)
    if missing:
        device.held = {}
    return missing


def _declined(federation: Federation, collected: Collected, device: Device, envelope: Envelope, number: int) -> None:
    """Note a decline."""
    try:
        decline = unseal(envelope, Decline)
    except MessageError:
        collected.refused[Refusal.MALFORMED.value] += 1
        device.outcome(number, "refused:malformed")
        return
    collected.declined[decline.reason.value] += 1
    device.not_before_s = federation.clock() + decline.retry_after_s
    device.outcome(number, f"declined:{decline.reason.value}")


def _noise_std(federation: Federation) -> float:
    privacy, cohort = federation.config.privacy, federation.config.cohort
    if privacy.noise != "distributed":
        return 0.0
    # Each of at least `quorum` devices brings its share: variances add up to (multiplier x clip)^2.
    return float(privacy.noise_multiplier * privacy.clip_norm / np.sqrt(cohort.quorum))
