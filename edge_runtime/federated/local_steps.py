"""One plan's training: so many AdamW steps on the device's own sequences, one lease a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.federated.optimizer import AdamW, State, adamw_step, clip_by_global_norm
from edge_runtime.federated.trainer import LORA_A, LORA_B, Trainer
from edge_runtime.formats.layout import AdapterLayout, Factors, effective_pairs
from edge_runtime.formats.messages import Plan, Reason

MAX_GRADIENT_NORM = 1.0
CORE = ".core"
_SUFFIX = {"a": LORA_A, "b": LORA_B, "core": CORE}

Batch = tuple[NDArray[np.int32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Trained:
    """What the steps came to.

    Attributes:
        delta: New minus old, of the factors that the phase trains.
        loss_before: Mean token loss at the first step's batch, before the step; nats.
        loss_after: The same at the last step's batch.
        tokens: Predictions that were trained on.
        step_s: Median seconds of a step, without waiting for the lease.
    """

    delta: Factors
    loss_before: float
    loss_after: float
    steps: int
    tokens: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the steps run under.

    Attributes:
        lease: Grants one step; false when it was given up (``stopping`` or ``late`` said so).
        clock: Seconds, monotonic.
        stopping: The device was told to end.
        received_s: When the plan came, on that clock.
        expected_step_s: From earlier plans; 0 when unknown.
    """

    lease: Callable[[Callable[[], bool]], AbstractContextManager[bool]]
    clock: Callable[[], float]
    stopping: Callable[[], bool]
    received_s: float
    expected_step_s: float = 0.0


def train_locally(
    trainer: Trainer,
    layout: AdapterLayout,
    plan: Plan,
    factors: Factors,
    batches: Iterator[Batch],
    conditions: Conditions,
) -> Trained | Reason:
    """Run a plan's steps; equal arguments give equal deltas.

    Args:
        trainer: Loss and gradients.
        layout: The federation's adapter.
        plan: Steps, phase and learning rates.
        factors: At the plan's rank; left as they are.
        batches: At least one a step.
        conditions: Lease, clock and deadline.

    Returns:
        What was trained; DEADLINE as soon as the deadline is out of reach, BUSY when the device was told to end.

    Raises:
        BackendError: The runtime failed, or a loss or gradient is not finite.
    """
    current, state = dict(factors), State()
    times: list[float] = []
    losses: list[float] = []
    tokens = 0

    def too_late() -> bool:
        step_s = statistics.median(times) if times else conditions.expected_step_s
        return conditions.clock() - conditions.received_s + (plan.steps - len(times)) * step_s > plan.deadline_s

    for _ in range(plan.steps):
        if too_late():
            return Reason.DEADLINE
        with conditions.lease(lambda: conditions.stopping() or too_late()) as granted:
            if conditions.stopping():
                return Reason.BUSY
            if not granted:
                return Reason.DEADLINE
            started_s = conditions.clock()
            loss_sum, count, gradients = _loss_and_gradients(trainer, layout, plan, current, next(batches))
            current, state = _move(plan, current, gradients, count, state)
            times.append(conditions.clock() - started_s)
        losses.append(loss_sum / max(count, 1))
        tokens += count
    delta = {name: current[name] - factors[name] for name in _trained_names(layout, plan)}
    return Trained(delta, losses[0], losses[-1], plan.steps, tokens, statistics.median(times))


def score_locally(
    trainer: Trainer, layout: AdapterLayout, factors: Factors, batches: Iterator[Batch], conditions: Conditions
) -> tuple[float, int] | Reason:
    """Summed loss (nats) and number of predictions of all batches, one lease a batch; BUSY when told to end."""
    effective = _effective(layout, factors)
    loss_sum, tokens = 0.0, 0
    for batch in batches:
        with conditions.lease(conditions.stopping) as granted:
            if not granted or conditions.stopping():
                return Reason.BUSY
            for ids, mask in _micro_batches(batch, trainer.batch_sequences):
                part, count = trainer.loss(ids, mask, effective, layout.scale)
                loss_sum, tokens = loss_sum + part, tokens + count
    return loss_sum, tokens


def _loss_and_gradients(
    trainer: Trainer, layout: AdapterLayout, plan: Plan, factors: Factors, batch: Batch
) -> tuple[float, int, Factors]:
    """Summed loss, count, and gradients of the factors that the phase trains, core included."""
    effective = _effective(layout, factors)
    # The trainer knows lora_A and lora_B alone: a core reaches it multiplied into lora_B.
    groups = {"b" if group == "core" else group for group in plan.phase.groups}
    wanted = [f"{module.name}{_SUFFIX[group]}" for module in layout.modules for group in sorted(groups)]
    loss_sum, count, total = 0.0, 0, Factors()
    for ids, mask in _micro_batches(batch, trainer.batch_sequences):
        part, part_count, gradients = trainer.loss_and_gradients(ids, mask, effective, layout.scale, wanted=wanted)
        loss_sum, count = loss_sum + part, count + part_count
        total = {name: total[name] + gradients[name] if total else gradients[name] for name in wanted}
    return loss_sum, count, _through_core(layout, plan, factors, total)


def _through_core(layout: AdapterLayout, plan: Plan, factors: Factors, gradients: Factors) -> Factors:
    """Gradients of the effective lora_B = lora_B core, passed on to whichever of the two is trained."""
    found: Factors = {}
    for module in layout.modules:
        core = factors.get(f"{module.name}{CORE}")
        for group in plan.phase.groups:
            name = f"{module.name}{_SUFFIX[group]}"
            if group == "core":
                found[name] = factors[f"{module.name}{LORA_B}"].T @ gradients[f"{module.name}{LORA_B}"]
            elif group == "b" and core is not None:
                found[name] = gradients[name] @ core.T
            else:
                found[name] = gradients[name]
    return found


def _move(plan: Plan, factors: Factors, gradients: Factors, count: int, state: State) -> tuple[Factors, State]:
    """One AdamW step down the mean loss, lora_B at its own learning rate."""
    mean = {name: gradient / np.float32(max(count, 1)) for name, gradient in gradients.items()}
    clipped, _ = clip_by_global_norm(mean, MAX_GRADIENT_NORM)
    moved = dict(factors)
    for is_b, learning_rate in ((False, plan.learning_rate), (True, plan.learning_rate_b)):
        chosen = {name: gradient for name, gradient in clipped.items() if name.endswith(LORA_B) == is_b}
        moved, state = adamw_step(AdamW(learning_rate, weight_decay=plan.weight_decay), moved, chosen, state)
    return moved, state


def _effective(layout: AdapterLayout, factors: Factors) -> Factors:
    pairs = effective_pairs(layout, factors)
    return {f"{name}{half}": pair[i] for name, pair in pairs.items() for i, half in enumerate((LORA_A, LORA_B))}


def _micro_batches(batch: Batch, most: int) -> Iterator[Batch]:
    ids, mask = batch
    for start in range(0, len(ids), most):
        yield ids[start : start + most], mask[start : start + most]


def _trained_names(layout: AdapterLayout, plan: Plan) -> list[str]:
    return [f"{module.name}{_SUFFIX[group]}" for module in layout.modules for group in plan.phase.groups]
