"""What a round does: its phase, and each device's plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from edge_runtime.formats.envelope import Envelope, seal
from edge_runtime.formats.layout import AdapterLayout, Phase
from edge_runtime.formats.messages import MaskPlan, Plan, ScorePlan
from server.adapter_state import AdapterState
from server.config import FederationConfig
from server.selection import Device


@dataclass(frozen=True, slots=True)
class Drift:
    """What the phase rule looks at.

    Attributes:
        phase: Of the last committed round, or None at the start.
        dispersion: Of that round's deltas: 0 when all devices moved alike, 1 when they had nothing in common.
        apart: Whether the rule has separated the factors already.
        streak: Rounds of this phase in a row.
    """

    phase: Phase | None = None
    dispersion: float = 0.0
    apart: bool = False
    streak: int = 0


def choose_phase(config: FederationConfig, number: int, last: Drift) -> tuple[Phase, str, bool]:
    """(phase, why, whether the factors are trained apart from now on) of round ``number`` (from 1).

    ``alternating`` trains lora_B in the warm-up, because lora_B starts at zero and lora_A has no gradient then, and
    takes turns after it. ``auto`` trains both together while devices move alike, which is faster, and takes turns
    once their deltas disperse, because the product of two means is not the mean of the products.
    """
    phases = config.phases
    schedule = phases.schedule
    if schedule == "both":
        return Phase.BOTH, "schedule", False
    if schedule == "ffa":
        return Phase.B, "schedule", True
    if schedule == "core" and number > phases.warmup_rounds:
        return Phase.CORE, "schedule", True
    if schedule == "auto" and not last.apart:
        if last.phase is None or last.dispersion <= phases.dispersion:
            return Phase.BOTH, f"dispersion {last.dispersion:.3f} <= {phases.dispersion:g}", False
        return _other(last.phase), f"dispersion {last.dispersion:.3f} > {phases.dispersion:g}", True
    if schedule != "auto" and number <= phases.warmup_rounds:
        return Phase.B, "warm-up", True
    warmed_up = schedule != "auto" and number == phases.warmup_rounds + 1
    if last.phase in (Phase.A, Phase.B) and last.streak < phases.turn_rounds and not warmed_up:
        return last.phase, f"{last.streak + 1} of {phases.turn_rounds} in turn", True
    return _other(last.phase), f"1 of {phases.turn_rounds} in turn", True


def plan_id(config: FederationConfig, layout: AdapterLayout, number: int, attempt: int, device: str) -> str:
    """The same work has the same id, so that a device answers a repeated plan with the same bytes."""
    text = json.dumps([config.name, layout.digest, config.seed, number, attempt, device])
    return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    config: FederationConfig,
    state: AdapterState,
    device: Device,
    number: int,
    phase: Phase,
    deadline_s: float,
    *,
    attempt: int = 0,
    mask: MaskPlan | None = None,
    noise_std: float = 0.0,
) -> Envelope:
    """One device's work in a round, with the factors that it does not hold."""
    local, rank = config.local, device.rank
    parts, payload, digest = state.bring(rank, device.held)
    plan = Plan(
        federation=config.name,
        layout_digest=state.layout.digest,
        round=number,
        plan_id=plan_id(config, state.layout, number, attempt, device.name),
        phase=phase,
        rank=rank,
        steps=local.steps,
        batch_sequences=local.batch_sequences,
        sequence_tokens=local.sequence_tokens,
        learning_rate=local.learning_rate,
        learning_rate_b=local.learning_rate_b,
        weight_decay=local.weight_decay,
        seed=config.seed,
        data_seed=_data_seed(config.seed, number, device.name),
        codec=config.codec.up,
        residual_decay=config.codec.residual_decay,
        weight_cap=local.weight_cap if local.weight == "sequences" else 1,
        clip_norm=config.privacy.clip_norm,
        noise_std=noise_std,
        folded=device.folded_plan,
        deadline_s=deadline_s,
        mask=mask,
        parts=parts,
        payload_sha256=digest,
    )
    return seal(plan, payload)


def make_score_plan(config: FederationConfig, state: AdapterState, device: Device, number: int) -> Envelope:
    """Ask a device for the adapter's loss on its held-out sequences."""
    parts, payload, digest = state.bring(device.rank, device.held)
    plan = ScorePlan(
        federation=config.name,
        layout_digest=state.layout.digest,
        round=number,
        rank=device.rank,
        seed=config.seed,
        sequence_tokens=config.local.sequence_tokens,
        most_sequences=config.evaluation.most_sequences,
        parts=parts,
        payload_sha256=digest,
    )
    return seal(plan, payload)


def _other(phase: Phase | None) -> Phase:
    return Phase.A if phase is Phase.B else Phase.B


def _data_seed(seed: int, number: int, device: str) -> int:
    digest = hashlib.sha256(json.dumps([seed, number, device]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
