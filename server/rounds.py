"""The round loop: choose, ask, collect, apply, make durable, tell. One thread, any number of devices.

A round is committed by its checkpoint. Whatever dies before that is asked again after a resume: the same plans with
the same ids, which devices that had already trained answer with the same bytes. The ledger follows the checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edge_runtime.formats.envelope import unseal
from edge_runtime.formats.errors import MessageError, SevenfoldError
from edge_runtime.formats.layout import Phase
from edge_runtime.formats.messages import Score
from server.aggregation import Mean
from server.collecting import Collected, Conversation, collect_plain, needs_factors
from server.federation import Federation, adapter_digest, new_optimizer, save_federation, write_candidate, write_devices
from server.gates import Refusal
from server.greeting import Greeter
from server.plan import Drift, choose_phase, make_score_plan
from server.selection import Device, choose_deadline_s, select_cohort

MOST_ATTEMPTS = 5

log = logging.getLogger(__name__)


class FederationError(SevenfoldError):
    """A federation that cannot go on: too few devices, for too long."""


def run_federation(federation: Federation, report: Callable[[Mapping[str, Any]], None] = lambda record: None) -> None:
    """Run every round that is left, then write the last candidate.

    Args:
        federation: New or resumed.
        report: Called with the ledger record of each committed round.

    Raises:
        FederationError: Fewer devices than the quorum, after waiting as long as the configuration says.
    """
    config, greeter = federation.config, Greeter()
    devices = greeter.wait_for(federation, config.cohort.size, config.cohort.patience_s)
    if federation.number == 0 and config.evaluation.every:
        loss = _evaluate(federation, devices, 0)
        federation.ledger.append({"event": "baseline", "time": federation.clock(), "held_out_loss": loss})
    while federation.number < config.rounds:
        _one_round(federation, greeter)
        report(federation.record)
        every = config.candidate_every
        if federation.number == config.rounds or (every and federation.number % every == 0):
            write_candidate(federation, federation.record["held_out_loss"])
    federation.ledger.append({"event": "end", "time": federation.clock(), "round": federation.number})


def _one_round(federation: Federation, greeter: Greeter) -> None:
    """Attempt the next round until one attempt reaches the quorum."""
    config, number = federation.config, federation.number + 1
    failed: set[str] = set()
    for attempt in range(MOST_ATTEMPTS):
        devices = greeter.wait_for(federation, config.cohort.quorum, config.cohort.patience_s)
        cohort = select_cohort(config, number, devices, federation.clock(), failed)
        if len(cohort) < config.cohort.quorum:
            _wait_for_declined(federation, devices)
            cohort = select_cohort(config, number, devices, federation.clock())
        if len(cohort) >= config.cohort.quorum:
            phase, reason, apart = choose_phase(config, number, federation.drift)
            _change_basis(federation, phase)
            collected = collect_plain(federation, cohort, number, attempt, phase, choose_deadline_s(config, cohort))
            if len(collected.folded) >= config.cohort.quorum:
                _commit(federation, collected, cohort, number, attempt, phase, reason, apart)
                return
            why = f"{len(collected.folded)} of {config.cohort.quorum} updates"
            why += (
                f", declined {dict(collected.declined)}, refused {dict(collected.refused)}, lost {len(collected.lost)}"
            )
            failed = {device.name for device in cohort} - {device.name for device, _ in collected.folded}
            if collected.refused[Refusal.NORM] * 2 > len(cohort):
                # Most devices moved farther than before: the bound is out of date, not the devices.
                federation.norm_gate.load_state({})
                why += "; the bound on norms starts anew"
        else:
            why = f"{len(cohort)} of {config.cohort.quorum} devices ready, {len(greeter.turned_away)} turned away"
        log.warning("round %d, attempt %d: %s", number, attempt, why)
        event = {"event": "abandoned", "time": federation.clock(), "round": number, "attempt": attempt, "reason": why}
        federation.ledger.append(event)
        write_devices(federation)
    raise FederationError(
        f"round {number}: no quorum in {MOST_ATTEMPTS} attempts ({why}); `resume` when devices are back"
    )


def _commit(
    federation: Federation,
    collected: Collected,
    cohort: list[Device],
    number: int,
    attempt: int,
    phase: Phase,
    reason: str,
    apart: bool,
) -> None:
    """Apply the mean, make it durable, then evaluate and tell."""
    started_s = federation.clock()
    assert collected.mean is not None  # a quorum was folded
    norm = _apply(federation, collected.mean, phase)
    for device, update in collected.folded:
        device.folded_plan = update.plan_id
    federation.number = number
    federation.drift = Drift(phase, collected.dispersion, apart)
    federation.record = _record(federation, collected, len(cohort), attempt, phase, reason, norm)
    save_federation(federation)
    collected.seconds["commit"] = federation.clock() - started_s
    if (every := federation.config.evaluation.every) and number % every == 0:
        federation.record["held_out_loss"] = _evaluate(federation, [device for device, _ in collected.folded], number)
    federation.record["seconds"] = {name: round(value, 4) for name, value in collected.seconds.items()}
    federation.ledger.append(federation.record)
    write_devices(federation)


def _apply(federation: Federation, mean: Mean, phase: Phase) -> float:
    """Step the optimizer on every group of the phase; the norm of what changed."""
    layout, changed = federation.layout, 0.0
    for group, part in layout.split(mean.vector, phase.groups, layout.max_rank).items():
        ends = np.cumsum(layout.segment_sizes((group,), layout.max_rank))
        idle = [slice(start, end) for start, end, w in zip((0, *ends), ends, mean.weights, strict=False) if not w]
        change = federation.optimizer.step(group, part, idle)
        federation.state.apply(group, change)
        changed += float(change @ change)
    return math.sqrt(changed)


def _change_basis(federation: Federation, phase: Phase) -> None:
    """Enter or leave the core phase; a repeated attempt finds it done."""
    inside = "core" in federation.state.snapshots
    if phase is Phase.CORE and not inside:
        federation.state.enter_core()
        federation.optimizer = new_optimizer(federation.config)  # moments of another basis mean nothing
    elif phase is not Phase.CORE and inside:
        federation.state.leave_core()
        federation.optimizer = new_optimizer(federation.config)  # moments of another basis mean nothing


def _record(
    federation: Federation, collected: Collected, planned: int, attempt: int, phase: Phase, reason: str, norm: float
) -> dict[str, Any]:
    tokens = sum(update.tokens for _, update in collected.folded)

    def mean_loss(name: str) -> float | None:
        total = sum(getattr(update, name) * update.tokens for _, update in collected.folded)
        return round(total / tokens, 6) if tokens else None

    return {
        "event": "round",
        "round": federation.number,
        "attempt": attempt,
        "phase": phase.value,
        "phase_reason": reason,
        "planned": planned,
        "folded": len(collected.folded),
        "declined": dict(sorted(collected.declined.items())),
        "refused": dict(sorted(collected.refused.items())),
        "lost": len(collected.lost),
        "bytes_up": collected.bytes_up,
        "bytes_down": collected.bytes_down,
        "loss_before": mean_loss("loss_before"),
        "loss_after": mean_loss("loss_after"),
        "held_out_loss": None,
        "dispersion": round(collected.dispersion, 6),
        "update_norm": norm,
        "epsilon": None,
        "seconds": {},
        "versions": federation.state.versions,
        "adapter_sha256": adapter_digest(federation),
        "time": federation.clock(),
    }


def _evaluate(federation: Federation, devices: list[Device], number: int) -> float | None:
    """Mean held-out loss of the committed adapter on the given devices' own text, nats a token; None: no answer."""
    config, state = federation.config, federation.state
    talk = Conversation(federation, Collected(), f"score-{number}", config.cohort.shortest_deadline_s)
    talk.send([(device, make_score_plan(config, state, device, number)) for device in devices])
    loss_sum, tokens = 0.0, 0
    scores = []
    for device, arrival in talk.arrivals():
        if arrival.envelope is not None and needs_factors(device, arrival.envelope):
            talk.send([(device, make_score_plan(config, state, device, number))])
        if arrival.envelope is None or arrival.envelope.kind != "score":
            continue
        try:
            score = unseal(arrival.envelope, Score)
        except MessageError as error:
            log.warning("score of %s refused: %s", device.name, error)
            continue
        device.held = state.versions
        scores.append((device.name, score))
    for _, score in sorted(scores, key=lambda entry: entry[0]):
        loss_sum, tokens = loss_sum + score.loss_sum, tokens + score.tokens
    return round(loss_sum / tokens, 6) if tokens else None


def _wait_for_declined(federation: Federation, devices: list[Device]) -> None:
    """Sleep until the devices that asked for a pause may be called again, at most as long as we are patient."""
    now_s = federation.clock()
    pauses = sorted(device.not_before_s - now_s for device in devices if device.not_before_s > now_s)
    if pauses:
        federation.sleep(min(pauses[-1], federation.config.cohort.patience_s))
