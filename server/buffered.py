"""Asynchronous rounds (FedBuff, arXiv:2106.06639): devices work all the time, and every few replies are committed.

A reply counts less the more rounds were committed since its plan was made. One that trained a factor while another
was frozen, and whose frozen factor has changed since, is dropped: its product was never in the model. With
alternating phases that is nearly everything under way at a change, so ``ffa`` and ``both`` suit this mode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from edge_runtime.formats.layout import GROUPS, Phase
from server.collecting import Collected, Folding, Work, message_bytes, needs_factors, plan_for
from server.committing import commit_round, offer_candidate
from server.conflicts import WEIGHT_UNIT
from server.federation import Federation, change_basis
from server.gates import Refusal
from server.greeting import Greeter
from server.plan import choose_phase
from server.selection import Device, choose_deadline_s, select_cohort
from server.transport import Arrival

MOST_UNDONE = 5
_POLL_S = 0.05
_PAUSE_S = 10.0  # before a device that gave no update is asked again

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One plan under way."""

    device: Device
    work: Work
    end_s: float


@dataclass(slots=True)
class _Buffer:
    """The commit that is being filled."""

    federation: Federation
    collected: Collected
    folding: Folding
    reason: str
    apart: bool
    asked: int = 0
    asked_by_name: dict[str, int] = field(default_factory=dict)

    @property
    def phase(self) -> Phase:
        return self.folding.work.phase


def run_buffered(
    federation: Federation, greeter: Greeter, report: Callable[[Mapping[str, Any]], None] = lambda record: None
) -> bool:
    """Commit until the last round.

    Returns:
        Whether it got there; False when no update came for as long as the configuration is patient, or the loss
        gate undid MOST_UNDONE commits in a row.
    """
    config, under_way = federation.config, dict[str, _Asked]()
    buffer, heard_s, undone = _open_buffer(federation, {}), federation.clock(), 0
    while federation.number < config.rounds and undone < MOST_UNDONE:
        _fill(federation, greeter, buffer, under_way)
        arrivals = federation.transport.pull(list(under_way))
        before = len(buffer.collected.folded)
        for arrival in arrivals:
            _take(federation, buffer, under_way, arrival)
        _drop_overdue(federation, buffer, under_way)
        heard_s = federation.clock() if len(buffer.collected.folded) > before else heard_s
        if len(buffer.collected.folded) >= config.mode.buffer:
            buffer.folding.close()
            work, reason, apart = buffer.folding.work, buffer.reason, buffer.apart
            if commit_round(federation, buffer.collected, buffer.asked, work, reason, apart):
                report(federation.record)
                offer_candidate(federation)
                buffer, undone = _open_buffer(federation, {}), 0
            else:
                # The same number again: an attempt that was asked for already would be answered as before.
                buffer, undone = _open_buffer(federation, buffer.asked_by_name), undone + 1
        elif federation.clock() - heard_s > config.cohort.patience_s + config.cohort.longest_deadline_s:
            return False
        elif not arrivals:
            federation.sleep(_POLL_S)
    return federation.number >= config.rounds


def discounted(weight: int, staleness: int) -> int:
    """A weight after ``staleness`` commits, in units of 1 / WEIGHT_UNIT: times 1 / sqrt(1 + staleness)."""
    return max(1, round(WEIGHT_UNIT * weight / sqrt(1 + staleness)))


def _open_buffer(federation: Federation, asked_by_name: dict[str, int]) -> _Buffer:
    number = federation.number + 1
    phase, reason, apart = choose_phase(federation.config, number, federation.drift)
    change_basis(federation, phase)
    work = Work(number, 0, phase, federation.config.cohort.longest_deadline_s, federation.state.versions)
    collected = Collected()
    folding = Folding(federation, collected, [], work)
    return _Buffer(federation, collected, folding, reason, apart, asked_by_name=asked_by_name)


def _fill(federation: Federation, greeter: Greeter, buffer: _Buffer, under_way: dict[str, _Asked]) -> None:
    """Give work to as many free devices as may work at once."""
    config = federation.config
    busy = {asked.device.name for asked in under_way.values()}
    free = [device for device in greeter.present(federation) if device.name not in busy]
    wanted = config.cohort.selected - len(under_way)
    number = federation.number + 1
    for device in select_cohort(config, number, free, federation.clock(), buffer.asked_by_name)[: max(wanted, 0)]:
        attempt = buffer.asked_by_name.get(device.name, 0)
        buffer.asked_by_name[device.name] = attempt + 1
        work = Work(number, attempt, buffer.phase, choose_deadline_s(config, [device]), federation.state.versions)
        _send(federation, buffer, under_way, device, work)


def _send(federation: Federation, buffer: _Buffer, under_way: dict[str, _Asked], device: Device, work: Work) -> None:
    envelope = plan_for(federation, device, work)
    end_s = federation.clock() + work.deadline_s
    ids = federation.transport.push([(device.node, envelope)], work.deadline_s + 60.0, f"round-{work.number}")
    under_way[ids[0]] = _Asked(device, work, end_s)
    buffer.collected.bytes_down += message_bytes(envelope)
    buffer.asked += 1


def _take(federation: Federation, buffer: _Buffer, under_way: dict[str, _Asked], arrival: Arrival) -> None:
    asked = under_way.pop(arrival.message_id, None)
    if asked is None:
        return
    device, work = asked.device, asked.work
    if arrival.envelope is not None:
        buffer.collected.bytes_up += message_bytes(arrival.envelope)
        if needs_factors(device, arrival.envelope):
            if work.number == federation.number + 1:
                _send(federation, buffer, under_way, device, work)
            return
    staleness = federation.number + 1 - work.number
    if arrival.envelope is not None and arrival.envelope.kind == "update":
        if staleness > federation.config.mode.max_staleness:
            buffer.folding.refuse(device, work, Refusal.STALE)
            return
        if work.phase is not buffer.phase or _frozen_changed(federation, asked):
            buffer.folding.refuse(device, work, Refusal.VERSION)
            return
    folded = len(buffer.collected.folded)
    buffer.folding.take(device, work, arrival, lambda weight: discounted(weight, staleness))
    if len(buffer.collected.folded) > folded:
        # Its next plan may come before the commit; without this it would add the older residual a second time.
        device.folded_plan = buffer.collected.folded[-1][1].plan_id
    else:
        device.not_before_s = max(device.not_before_s, federation.clock() + _PAUSE_S)


def _frozen_changed(federation: Federation, asked: _Asked) -> bool:
    """Whether a factor that the reply's training held fixed is another one now."""
    now = federation.state.versions
    frozen = [group for group in GROUPS if group not in asked.work.phase.groups]
    return any(asked.work.versions.get(group) != now.get(group) for group in frozen)


def _drop_overdue(federation: Federation, buffer: _Buffer, under_way: dict[str, _Asked]) -> None:
    now_s = federation.clock()
    for message_id in [key for key, asked in under_way.items() if asked.end_s < now_s]:
        asked = under_way.pop(message_id)
        buffer.folding.lose(asked.device, asked.work, "deadline")
