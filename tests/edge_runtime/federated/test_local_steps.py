"""A plan's steps against torch: the same AdamW on the same loss, with PyTorch's own gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_runtime.federated.local_steps import Conditions, Trained, score_locally, train_locally
from edge_runtime.formats.broadcast import initial_vector
from edge_runtime.formats.envelope import unseal
from edge_runtime.formats.layout import AdapterLayout, Factors, Phase
from edge_runtime.formats.messages import Plan, Reason
from tests.edge_runtime.fakes import VOCAB_SIZE
from tests.edge_runtime.federated.device import SEED, Clock, LinearTrainer, granted, make_plan, small_layout, table

LAYOUT = small_layout()
Batch = tuple[np.ndarray, np.ndarray]


def plan_of(**changes: object) -> Plan:
    return replace(unseal(make_plan(LAYOUT), Plan), **changes)  # type: ignore[arg-type]


def factors_with(core: bool) -> Factors:
    rng = np.random.default_rng(3)
    factors: Factors = {}
    for group in ("a", "b", "core") if core else ("a", "b"):
        vector = initial_vector(LAYOUT, group, 4, SEED)
        factors |= LAYOUT.unflatten((vector + rng.normal(0, 0.3, vector.size)).astype(np.float32), (group,), 4)
    return factors


def batches_of(count: int, rows: int = 5) -> list[Batch]:
    rng = np.random.default_rng(8)
    tokens = [rng.integers(0, VOCAB_SIZE, (rows, 16)).astype(np.int32) for _ in range(count)]
    return [(ids, (rng.random(ids.shape) < 0.8).astype(np.float32)) for ids in tokens]


def conditions(clock: Callable[[], float] = lambda: 0.0, **changes: object) -> Conditions:
    values = {"lease": granted, "clock": clock, "stopping": lambda: False, "received_s": clock()}
    return Conditions(**(values | changes))  # type: ignore[arg-type]


def torch_loss(factors: dict[str, torch.Tensor], layout: AdapterLayout, batch: Batch) -> torch.Tensor:
    """Mean loss of a whole batch; the core stands between the two factors."""
    ids, mask = batch
    inputs = torch.tensor(table("embedding", 32)[ids[:, :-1].ravel()])
    weights = torch.tensor(mask[:, :-1].ravel().astype(np.float64))
    total = torch.zeros((), dtype=torch.float64)
    for module in layout.modules:
        lora_a, lora_b = factors[f"{module.name}.lora_A"], factors[f"{module.name}.lora_B"]
        between = factors.get(f"{module.name}.core", torch.eye(lora_a.shape[0], dtype=torch.float64))
        wished = torch.tensor(table(module.name, module.out_features)[ids[:, 1:].ravel()])
        error = layout.scale * inputs @ lora_a.T @ between.T @ lora_b.T - wished
        total = total + 0.5 * ((error**2).sum(1) * weights).sum()
    return total / weights.sum()


@pytest.mark.parametrize(
    ("phase", "core"),
    [
        (Phase.A, False),
        (Phase.B, False),
        (Phase.BOTH, False),
        (Phase.CORE, True),
        (Phase.A, True),
        (Phase.B, True),
    ],
)
def test_steps_equal_torchs_adamw_with_one_learning_rate_a_factor(phase: Phase, core: bool) -> None:
    plan = plan_of(phase=phase, steps=4, weight_decay=0.1, learning_rate=0.01, learning_rate_b=0.03)
    factors, batches = factors_with(core), batches_of(4)
    found = train_locally(LinearTrainer(), LAYOUT, plan, factors, iter(batches), conditions())
    assert isinstance(found, Trained)

    suffixes = {"a": ".lora_A", "b": ".lora_B", "core": ".core"}
    tensors = {name: torch.tensor(value.astype(np.float64)) for name, value in factors.items()}
    trained = [name for name in tensors if name.endswith(tuple(suffixes[group] for group in phase.groups))]
    assert set(found.delta) == set(trained)
    for name in trained:
        tensors[name].requires_grad_()
    rates = {True: plan.learning_rate_b, False: plan.learning_rate}
    groups = [{"params": [tensors[name]], "lr": rates[name.endswith(".lora_B")]} for name in trained]
    optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = torch_loss(tensors, LAYOUT, batch)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_([tensors[name] for name in trained], 1.0)
        optimizer.step()
    assert found.loss_before == pytest.approx(losses[0], rel=1e-6)
    assert found.loss_after == pytest.approx(losses[-1], rel=1e-6)
    for name in trained:
        # Float32 factors against float64 ones; measured at most 2.1e-7 over all cases.
        np.testing.assert_allclose(found.delta[name], tensors[name].detach().numpy() - factors[name], rtol=0, atol=4e-7)


def test_micro_batches_make_no_difference_but_rounding() -> None:
    plan, batches = plan_of(phase=Phase.BOTH), batches_of(3)
    whole = train_locally(
        LinearTrainer(batch_sequences=5), LAYOUT, plan, factors_with(False), iter(batches), conditions()
    )
    parts = train_locally(
        LinearTrainer(batch_sequences=2), LAYOUT, plan, factors_with(False), iter(batches), conditions()
    )
    assert isinstance(whole, Trained) and isinstance(parts, Trained)
    assert whole.tokens == parts.tokens == int(sum(mask[:, :-1].sum() for _, mask in batches))
    for name, value in whole.delta.items():
        np.testing.assert_allclose(parts.delta[name], value, rtol=0, atol=6e-8)  # measured 3e-8


def test_equal_arguments_give_equal_bytes_and_leave_the_factors_alone() -> None:
    factors = factors_with(False)
    before = {name: value.tobytes() for name, value in factors.items()}
    results = [
        train_locally(LinearTrainer(), LAYOUT, plan_of(phase=Phase.BOTH), factors, iter(batches_of(3)), conditions())
        for _ in range(2)
    ]
    first, second = ({name: value.tobytes() for name, value in found.delta.items()} for found in results)  # type: ignore[union-attr]
    assert first == second
    assert before == {name: value.tobytes() for name, value in factors.items()}


def test_only_gradients_that_the_phase_needs_are_asked_for() -> None:
    trainer = LinearTrainer()
    train_locally(trainer, LAYOUT, plan_of(phase=Phase.CORE), factors_with(True), iter(batches_of(3)), conditions())
    for _, wanted in trainer.calls:
        assert wanted is not None and all(name.endswith(".lora_B") for name in wanted)


def test_one_lease_is_taken_a_step() -> None:
    held = []
    trainer = LinearTrainer(batch_sequences=2)
    trainer.on_step = lambda: held.append(leases[-1])
    leases: list[int] = []

    @contextlib.contextmanager
    def lease(give_up: Callable[[], bool]) -> Iterator[bool]:
        leases.append(len(leases))
        yield True

    train_locally(trainer, LAYOUT, plan_of(steps=3), factors_with(False), iter(batches_of(3)), conditions(lease=lease))
    assert leases == [0, 1, 2]
    assert held == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # five rows in micro-batches of two


def test_a_deadline_that_is_known_to_be_too_short_costs_no_step() -> None:
    trainer, plan = LinearTrainer(), plan_of(steps=10, deadline_s=60.0)
    known = conditions(expected_step_s=6.1)
    assert train_locally(trainer, LAYOUT, plan, factors_with(False), iter([]), known) is Reason.DEADLINE
    assert trainer.calls == []


def test_a_deadline_goes_out_of_reach_when_the_steps_are_slow() -> None:
    clock, trainer = Clock(), LinearTrainer(batch_sequences=5)

    def slow() -> None:
        clock.now += 20.0

    trainer.on_step = slow
    found = train_locally(
        trainer, LAYOUT, plan_of(steps=4, deadline_s=60.0), factors_with(False), iter(batches_of(4)), conditions(clock)
    )
    assert found is Reason.DEADLINE and len(trainer.calls) == 1


def test_waiting_for_the_lease_counts_against_the_deadline_and_not_as_speed() -> None:
    clock, trainer = Clock(), LinearTrainer(batch_sequences=5)

    @contextlib.contextmanager
    def slow_lease(give_up: Callable[[], bool]) -> Iterator[bool]:
        clock.now += 10.0
        yield not give_up()

    def step() -> None:
        clock.now += 1.0

    trainer.on_step = step
    plan = plan_of(steps=4, deadline_s=100.0)
    found = train_locally(
        trainer, LAYOUT, plan, factors_with(False), iter(batches_of(4)), conditions(clock, lease=slow_lease)
    )
    assert isinstance(found, Trained) and found.step_s == 1.0
    late = train_locally(
        trainer,
        LAYOUT,
        replace(plan, deadline_s=31.0),
        factors_with(False),
        iter(batches_of(4)),
        conditions(clock, lease=slow_lease),
    )
    assert late is Reason.DEADLINE


def test_a_device_that_is_told_to_end_finishes_the_step_and_no_more() -> None:
    trainer = LinearTrainer(batch_sequences=5)
    told = conditions(stopping=lambda: len(trainer.calls) >= 2)
    found = train_locally(trainer, LAYOUT, plan_of(steps=9), factors_with(False), iter(batches_of(9)), told)
    assert found is Reason.BUSY and len(trainer.calls) == 2


def test_a_score_is_the_loss_of_every_batch() -> None:
    factors, batches = factors_with(True), batches_of(3)
    found = score_locally(LinearTrainer(), LAYOUT, factors, iter(batches), conditions())
    assert not isinstance(found, Reason)
    tensors = {name: torch.tensor(value.astype(np.float64)) for name, value in factors.items()}
    counts = [float(mask[:, :-1].sum()) for _, mask in batches]
    expected = sum(torch_loss(tensors, LAYOUT, batch).item() * n for batch, n in zip(batches, counts, strict=True))
    assert found[0] == pytest.approx(expected, rel=1e-6)
    assert found[1] == sum(counts)
