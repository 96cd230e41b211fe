"""From a trained delta to the bytes that leave the device, and what is kept back for the next round.

Order: the delta, plus what earlier encodings kept back, is clipped, so that clipping bounds everything the device
can add; then comes noise, then encoding. What was clipped away is gone. What encoding lost is pending until the
server says that it folded the reply; until then the next delta starts from the older residual.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.federated.local_steps import Trained
from edge_runtime.federated.secure import SecureSessions
from edge_runtime.federated.state import DeviceState
from edge_runtime.formats.codec import decode, encode
from edge_runtime.formats.envelope import Envelope, seal, sha256, write_fields
from edge_runtime.formats.layout import GROUPS, AdapterLayout, Factors
from edge_runtime.formats.masking import quantize_for_mask
from edge_runtime.formats.messages import Plan, ScorePlan, Update

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Work:
    """A plan with everything that decides its answer.

    Attributes:
        factors: At the plan's rank.
        digest: From ``work_digest``.
    """

    plan: Plan
    layout: AdapterLayout
    factors: Factors
    digest: str


def work_digest(plan: Plan, factors: Mapping[str, str]) -> str:
    """sha256 of what decides the answer: the same work, sent again, may have another deadline or leave parts out.

    Args:
        plan: As it came.
        factors: sha256 of each group's values.
    """
    fields = write_fields(plan)
    for name in ("folded", "deadline_s", "parts", "payload_sha256"):
        del fields[name]
    return hashlib.sha256(json.dumps([fields, dict(factors)], sort_keys=True).encode()).hexdigest()


def labels(plan: Plan | ScorePlan, layout: AdapterLayout) -> dict[str, str]:
    """What a stored vector must agree with before it is used with a plan."""
    return {"layout": layout.digest, "seed": str(plan.seed), "rank": str(plan.rank)}


def commit_residuals(state: DeviceState, plan: Plan, layout: AdapterLayout) -> None:
    """What was kept back of the reply that the plan names as folded counts from now on."""
    for group in GROUPS if plan.folded else ():
        wanted = {"plan_id": plan.folded, "layout": layout.digest}
        if state.load_vector(plan.federation, f"pending.{group}", wanted) is not None:
            state.promote_vector(plan.federation, f"pending.{group}", f"residual.{group}")


def answer(
    work: Work,
    trained: Trained,
    weight: int,
    base_digest: str,
    state: DeviceState,
    sessions: SecureSessions,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Envelope:
    """The update, after it and what it kept back are on the disk.

    Args:
        work: The plan.
        trained: What its steps came to.
        weight: Of this device's data.
        base_digest: Of the base it holds.
        state: Keeps residuals and the reply.
        sessions: Mask the update when the plan asks for it.
        random_bytes: Source of noise.

    Raises:
        MessageError: There is no masking session for this plan.
        ValueError: The update cannot be encoded, because training diverged.
    """
    plan, layout, groups = work.plan, work.layout, work.plan.phase.groups
    summed = layout.flatten(_with_residuals(work, trained.delta, state), groups, plan.rank)
    vector = clip_norm(summed, plan.clip_norm)
    payload, kept, norm = _encode(work, vector, weight, sessions, random_bytes)
    by_name = layout.unflatten(kept, groups, plan.rank)
    for group in groups:
        known = labels(plan, layout) | {"plan_id": plan.plan_id}
        state.save_vector(plan.federation, f"pending.{group}", layout.flatten(by_name, (group,), plan.rank), known)
    update = Update(
        plan_id=plan.plan_id,
        layout_digest=plan.layout_digest,
        base_digest=base_digest,
        round=plan.round,
        phase=plan.phase,
        rank=plan.rank,
        codec=plan.codec,
        weight=weight,
        steps=trained.steps,
        tokens=trained.tokens,
        loss_before=trained.loss_before,
        loss_after=trained.loss_after,
        norm=norm,
        step_s=trained.step_s,
        payload_sha256=sha256(payload),
    )
    reply = seal(update, payload)
    state.save_reply(plan.federation, plan.plan_id, work.digest, reply)
    return reply


def clip_norm(vector: Vector, most: float) -> Vector:
    """The vector, shortened to a Euclidean norm of at most ``most``; 0: as it is."""
    norm = _norm(vector)
    if most == 0 or norm <= most:
        return vector
    shorter = vector * np.float32(most / norm)
    # Rounding may leave the norm an ulp above the bound that privacy counts on.
    return shorter if _norm(shorter) <= most else shorter * np.float32(1 - 2.0**-20)


def _encode(
    work: Work, vector: Vector, weight: int, sessions: SecureSessions, random_bytes: Callable[[int], bytes]
) -> tuple[bytes, Vector, float]:
    """(payload, what it lost (n,), norm to report)."""
    plan = work.plan
    sizes = work.layout.segment_sizes(plan.phase.groups, plan.rank)
    if plan.mask is not None:
        codes, sent = quantize_for_mask(vector, sizes, plan.mask)
        return sessions.mask(plan, codes, sizes, weight), vector - sent, 0.0  # a norm would tell of one device
    # The plan's deviation is that of the weighted update, which is what enters the sum.
    noisy = vector + _noise(plan.noise_std, vector.size, random_bytes) / np.float32(weight)
    payload = encode(noisy, sizes, plan.codec)
    return payload, noisy - decode(payload, sizes, plan.codec), _norm(noisy)


def _with_residuals(work: Work, delta: Factors, state: DeviceState) -> Factors:
    """The delta plus what earlier encodings kept back."""
    plan, layout = work.plan, work.layout
    summed = dict(delta)
    for group in plan.phase.groups:
        stored = state.load_vector(plan.federation, f"residual.{group}", labels(plan, layout))
        if stored is not None and stored.vector.size == layout.size((group,), plan.rank):
            for name, kept in layout.unflatten(stored.vector, (group,), plan.rank).items():
                summed[name] = summed[name] + np.float32(plan.residual_decay) * kept
    return summed


def _noise(std: float, count: int, random_bytes: Callable[[int], bytes]) -> Vector:
    """Gaussian noise, never twice the same: two answers with equal noise would cancel it by their difference."""
    if std == 0:
        return np.zeros(count, np.float32)
    rng = np.random.default_rng(np.frombuffer(random_bytes(32), np.uint32))
    return (rng.standard_normal(count) * std).astype(np.float32)


def _norm(vector: Vector) -> float:
    return float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))
