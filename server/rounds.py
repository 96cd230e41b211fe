"""The round loop: choose, ask, collect, apply, make durable, tell. One thread, any number of devices.

A round is committed by its checkpoint. Whatever dies before that is asked again after a resume: the same plans with
the same ids, which devices that had already trained answer with the same bytes. The ledger follows the checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.formats.errors import SevenfoldError
from server.buffered import run_buffered
from server.collecting import Collected, Work, collect_plain
from server.committing import commit_round, evaluate, finish_interrupted, offer_candidate
from server.federation import Federation, change_basis, write_devices
from server.gates import Refusal
from server.greeting import Greeter
from server.masked import collect_masked
from server.plan import choose_phase
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
        federation.loss = evaluate(federation, devices, Collected())
        baseline = {"event": "baseline", "time": federation.clock(), "held_out_loss": federation.loss}
        federation.ledger.append(baseline)
    if finish_interrupted(federation, devices):
        report(federation.record)
    if config.mode.name == "buffered" and not run_buffered(federation, greeter, report):
        raise FederationError(
            f"round {federation.number + 1}: no update that could be committed; `resume` when devices are back"
        )
    while federation.number < config.rounds:
        _one_round(federation, greeter)
        report(federation.record)
        offer_candidate(federation)
    federation.ledger.append({"event": "end", "time": federation.clock(), "round": federation.number})


def _one_round(federation: Federation, greeter: Greeter) -> None:
    """Attempt the next round until one attempt reaches the quorum."""
    config, number = federation.config, federation.number + 1
    failed = Counter[str]()
    for attempt in range(MOST_ATTEMPTS):
        devices = greeter.wait_for(federation, config.cohort.quorum, config.cohort.patience_s)
        cohort = select_cohort(config, number, devices, federation.clock(), failed)
        if len(cohort) < config.cohort.quorum:
            _wait_for_declined(federation, devices, config.cohort.quorum - len(cohort))
            cohort = select_cohort(config, number, devices, federation.clock(), failed)
        if len(cohort) >= config.cohort.quorum:
            phase, reason, apart = choose_phase(config, number, federation.drift)
            change_basis(federation, phase)
            work = Work(
                number,
                _attempt(federation, number, attempt),
                phase,
                choose_deadline_s(config, cohort),
                federation.state.versions,
            )
            collected = (
                collect_masked(federation, cohort, work, os.urandom)
                if config.secure.enabled
                else collect_plain(federation, cohort, work)
            )
            if collected.mean is not None and len(collected.folded) >= config.cohort.quorum:
                if commit_round(federation, collected, len(cohort), work, reason, apart):
                    return
                collected.folded.clear()
            why = f"{len(collected.folded)} of {config.cohort.quorum} updates"
            why += (
                f", declined {dict(collected.declined)}, refused {dict(collected.refused)}, lost {len(collected.lost)}"
            )
            failed.update({device.name for device in cohort} - {device.name for device, _ in collected.folded})
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


def _attempt(federation: Federation, number: int, attempt: int) -> int:
    """A masked attempt is never repeated, not even by a resumed server: it is noted before it starts."""
    if not federation.config.secure.enabled:
        return attempt
    before = [record for record in federation.ledger.records() if record.get("event") == "attempt"]
    attempt = sum(record.get("round") == number for record in before)
    federation.ledger.append({"event": "attempt", "time": federation.clock(), "round": number, "attempt": attempt})
    return attempt


def _wait_for_declined(federation: Federation, devices: list[Device], missing: int) -> None:
    """Sleep until so many of the devices that asked for a pause may be called again, at most as long as we wait."""
    now_s = federation.clock()
    pauses = sorted(device.not_before_s - now_s for device in devices if device.not_before_s > now_s)
    if pauses:
        federation.sleep(min(pauses[: max(missing, 1)][-1], federation.config.cohort.patience_s))
