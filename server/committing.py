"""Ending a round: apply its mean, make it durable, evaluate, tell."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.formats.envelope import unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import Phase
from edge_runtime.formats.messages import Score
from server.aggregation import Mean
from server.collecting import Collected, Conversation, Work, needs_factors
from server.federation import Federation, adapter_digest, save_federation, write_candidate, write_devices
from server.gates import Refusal
from server.masked import move_scales
from server.noise import add_noise
from server.plan import Drift, make_score_plan
from server.selection import Device

log = logging.getLogger(__name__)


def commit_round(
    federation: Federation, collected: Collected, planned: int, work: Work, reason: str, apart: bool
) -> bool:
    """Apply the mean of a round that reached its quorum.

    Args:
        federation: Moves to ``work.number``.
        collected: With a mean.
        planned: Devices that were asked.
        work: What they were asked for.
        reason: Why this phase, for the ledger.
        apart: What the phase rule remembers.

    Returns:
        False when the loss gate undid it: the federation is as it was.
    """
    if collected.mean is None:
        raise ValueError("a round without an update cannot be committed")
    started_s, number = federation.clock(), work.number
    before = federation.state.copy(), federation.optimizer.state()
    released = add_noise(federation, collected, work)
    norm = _apply(federation, released, work.phase)
    if not _passes_loss_gate(federation, collected):
        before[0].newest = federation.state.newest  # devices hold what was undone: its versions are used up
        federation.state = before[0]
        federation.optimizer.load_state(before[1])
        return False
    if federation.config.secure.enabled:
        move_scales(federation, collected, released, work)
    federation.norm_gate.accept(work.phase.value, collected.norms)
    for device, update in collected.folded:
        device.folded_plan = update.plan_id
    federation.number = number
    last = federation.drift
    streak = last.streak + 1 if last.phase is work.phase else 1
    federation.drift = Drift(work.phase, collected.dispersion, apart, streak)
    if decay := federation.config.optimizer.average:
        federation.state.average(decay)
    federation.record = _record(federation, collected, planned, work, reason, norm)
    save_federation(federation)
    federation.record["seconds"]["commit"] = round(federation.clock() - started_s, 4)
    _tell(federation, [device for device, _ in collected.folded])
    return True


def finish_interrupted(federation: Federation, devices: Sequence[Device]) -> bool:
    """Do what a server that died after a round's checkpoint had left to do for it, before the next round.

    Args:
        federation: Resumed.
        devices: Connected now; those whose update is in the round evaluate it.

    Returns:
        Whether the round's record was missing in the ledger.
    """
    number, records = federation.number, federation.ledger.records()
    told = [record for record in records if record.get("event") == "round" and record["round"] == number]
    if told:
        federation.record = told[-1]
        federation.loss = federation.record["held_out_loss"] or federation.loss  # measured after the checkpoint
    elif number:
        folded = [device for device in devices if (device.last_round, device.last_outcome) == (number, "folded")]
        _tell(federation, folded)
    if number and not any(record.get("event") == "candidate" and record["round"] == number for record in records):
        offer_candidate(federation)
    return bool(number) and not told


def offer_candidate(federation: Federation) -> None:
    """Write the committed adapter for the gate, when its round is one for it."""
    number, every = federation.number, federation.config.candidate_every
    if number == federation.config.rounds or (every and number % every == 0):
        write_candidate(federation, federation.record["held_out_loss"])


def evaluate(federation: Federation, devices: Sequence[Device], counted: Collected) -> float | None:
    """Mean held-out loss of the committed adapter on the given devices' own text, nats a token; None: no answer.

    Args:
        federation: Between two rounds.
        devices: Those to ask.
        counted: Its bytes grow: whoever evaluates an adapter holds it then, and the next plan is smaller by it.
    """
    config, state, number = federation.config, federation.state, federation.number
    talk = Conversation(federation, counted, f"score-{number}", config.cohort.shortest_deadline_s)
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
        if score.round != number:
            log.warning("score of %s refused: of round %d", device.name, score.round)
            continue
        device.held = state.versions
        scores.append((device.name, score))
    for _, score in sorted(scores, key=lambda entry: entry[0]):
        loss_sum, tokens = loss_sum + score.loss_sum, tokens + score.tokens
    return round(loss_sum / tokens, 6) if tokens else None


def _passes_loss_gate(federation: Federation, collected: Collected) -> bool:
    """Whether the devices of the round find the new adapter hardly worse than the last one on their held-out text."""
    rise, last = federation.config.gates.loss_rise, federation.loss
    if not rise or last is None:
        return True
    loss = evaluate(federation, [device for device, _ in collected.folded], collected)
    if loss is None or loss <= last * (1.0 + rise):
        return True
    collected.refused[Refusal.LOSS.value] += len(collected.folded)
    log.warning("round %d: held-out loss %.4f after %.4f; undone", federation.number + 1, loss, last)
    return False


def _tell(federation: Federation, folded: Sequence[Device]) -> None:
    """Evaluate a committed round when it is due, and write its record."""
    record, every = federation.record, federation.config.evaluation.every
    if every and federation.number % every == 0:
        counted = Collected()
        record["held_out_loss"] = evaluate(federation, folded, counted)
        federation.loss = record["held_out_loss"] or federation.loss
        record["bytes_up"] += counted.bytes_up
        record["bytes_down"] += counted.bytes_down
    federation.ledger.append(record)
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


def _record(
    federation: Federation, collected: Collected, planned: int, work: Work, reason: str, norm: float
) -> dict[str, Any]:
    tokens = sum(update.tokens for _, update in collected.folded)

    def mean_loss(name: str) -> float | None:
        total = sum(getattr(update, name) * update.tokens for _, update in collected.folded)
        return round(total / tokens, 6) if tokens else None

    return {
        "event": "round",
        "round": federation.number,
        "attempt": work.attempt,
        "phase": work.phase.value,
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
        "epsilon": round(federation.accountant.epsilon(), 4) if federation.accountant else None,
        "seconds": {name: round(value, 4) for name, value in collected.seconds.items()},
        "versions": federation.state.versions,
        "adapter_sha256": adapter_digest(federation),
        "time": federation.clock(),
    }
