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
from server.federation import Federation, adapter_digest, save_federation, write_devices
from server.plan import Drift, make_score_plan
from server.selection import Device

log = logging.getLogger(__name__)


def commit_round(
    federation: Federation, collected: Collected, planned: int, work: Work, reason: str, apart: bool
) -> None:
    """Apply the mean of a round that reached its quorum.

    Args:
        federation: Moves to ``work.number``.
        collected: With a mean.
        planned: Devices that were asked.
        work: What they were asked for.
        reason: Why this phase, for the ledger.
        apart: What the phase rule remembers.
    """
    if collected.mean is None:
        raise ValueError("a round without an update cannot be committed")
    started_s, number = federation.clock(), work.number
    norm = _apply(federation, collected.mean, work.phase)
    for device, update in collected.folded:
        device.folded_plan = update.plan_id
    federation.number = number
    federation.drift = Drift(work.phase, collected.dispersion, apart)
    federation.record = _record(federation, collected, planned, work, reason, norm)
    save_federation(federation)
    collected.seconds["commit"] = federation.clock() - started_s
    if (every := federation.config.evaluation.every) and number % every == 0:
        federation.record["held_out_loss"] = evaluate(federation, [device for device, _ in collected.folded])
    federation.record["seconds"] = {name: round(value, 4) for name, value in collected.seconds.items()}
    federation.ledger.append(federation.record)
    write_devices(federation)


def evaluate(federation: Federation, devices: Sequence[Device]) -> float | None:
    """Mean held-out loss of the committed adapter on the given devices' own text, nats a token; None: no answer."""
    config, state, number = federation.config, federation.state, federation.number
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
        "epsilon": None,
        "seconds": {},
        "versions": federation.state.versions,
        "adapter_sha256": adapter_digest(federation),
        "time": federation.clock(),
    }
