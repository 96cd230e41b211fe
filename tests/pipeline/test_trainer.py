"""The one training loop: against torch's own optimizer and schedule, and against itself after a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import LambdaLR

from pipeline.distillation.losses import next_token_loss
from pipeline.distillation.trainer import (
    TrainPlan,
    batch_rows,
    computes_bf16,
    discard_checkpoint,
    learning_rate,
    train,
)
from tests.pipeline.conftest import VOCABULARY, MakeModel

PLAN = TrainPlan(
    steps=11, batch_sequences=3, learning_rate=3e-3, weight_decay=0.05, warmup_ratio=0.2, bf16=False, seed=5,
    checkpoint_every_steps=3,
)  # fmt: skip
SEQUENCES = np.random.default_rng(2).integers(0, VOCABULARY, (10, 16)).astype(np.int32)


def test_steps_are_those_of_adamw_under_the_schedule(make_model: MakeModel, tmp_path: Path) -> None:
    model, reference = _model(make_model), _model(make_model)
    _train(model, tmp_path)
    decayed = [p for p in reference.parameters() if p.ndim >= 2]
    kept = [p for p in reference.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": PLAN.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PLAN.learning_rate, betas=(0.9, 0.95), eps=1e-8)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, PLAN) / PLAN.learning_rate)
    reference.train()
    for step in range(PLAN.steps):
        tokens = torch.from_numpy(SEQUENCES[batch_rows(step, 10, 3, PLAN.seed)].astype(np.int64))
        optimizer.zero_grad()
        reference(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    moved = _model(make_model)
    for (name, found), expected, start in zip(
        model.named_parameters(), reference.parameters(), moved.parameters(), strict=True
    ):
        assert float((expected - start).detach().abs().max()) > 1e-3, f"{name} did not move"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("killed_at", [2, 4, 7, 11])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_killed_run_ends_with_the_same_bits(
    make_model: MakeModel, tmp_path: Path, killed_at: int, bf16: bool
) -> None:
    plan = replace(PLAN, bf16=bf16)
    undisturbed = _model(make_model)
    history = _train(undisturbed, tmp_path / "a", plan)
    with pytest.raises(KeyboardInterrupt):
        _train(_model(make_model), tmp_path / "b", plan, dies_at=killed_at)
    resumed, seen = _model(make_model), []
    assert _train(resumed, tmp_path / "b", plan, seen=seen) == history
    assert len(seen) == plan.steps - (killed_at - 1) // 3 * 3, "it went on after the last checkpoint"
    assert _same(undisturbed, resumed) and not resumed.training


def test_killed_twice_between_the_same_checkpoints(make_model: MakeModel, tmp_path: Path) -> None:
    undisturbed, resumed = _model(make_model), _model(make_model)
    _train(undisturbed, tmp_path / "a")
    for steps in (5, 2):
        with pytest.raises(KeyboardInterrupt):
            _train(_model(make_model), tmp_path / "b", dies_at=steps)
    _train(resumed, tmp_path / "b")
    assert _same(undisturbed, resumed)


def test_a_checkpoint_cut_while_it_was_written_is_not_read(make_model: MakeModel, tmp_path: Path) -> None:
    undisturbed, resumed = _model(make_model), _model(make_model)
    _train(undisturbed, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        _train(_model(make_model), tmp_path / "b", dies_at=5)
    (tmp_path / "b" / "state.partial").write_bytes(b"half")
    _train(resumed, tmp_path / "b")
    assert _same(undisturbed, resumed)
    discard_checkpoint(tmp_path / "b")
    discard_checkpoint(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "test: loss nan"), (math.inf, "test: loss inf"), (1e38, "gradient norm inf")]
)
def test_a_loss_that_is_not_finite_ends_training(
    make_model: MakeModel, tmp_path: Path, value: float, message: str
) -> None:
    model = _model(make_model)
    before = [parameter.clone() for parameter in model.parameters()]

    def broken(logits: torch.Tensor, _rows: NDArray[np.int64], tokens: torch.Tensor) -> torch.Tensor:
        return next_token_loss(logits, tokens) * value

    with pytest.raises(FloatingPointError, match=message):
        train(model, SEQUENCES, broken, PLAN, tmp_path, "test")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def test_training_learns(make_model: MakeModel, tmp_path: Path) -> None:
    history = _train(_model(make_model), tmp_path, replace(PLAN, steps=60))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert [entry["step"] for entry in history] == list(range(1, 61))


@pytest.mark.parametrize(("sequences", "batch"), [(10, 3), (7, 7), (5, 8), (4, 1)])
def test_every_sequence_once_an_epoch(sequences: int, batch: int) -> None:
    epochs, steps = 6, 6 * sequences
    visited, other_seed = (
        np.concatenate([batch_rows(step, sequences, batch, seed) for step in range(steps)])[:steps].reshape(epochs, -1)
        for seed in (3, 4)
    )
    assert (np.sort(visited, axis=1) == np.arange(sequences)).all()
    assert len({tuple(order) for order in visited.tolist()}) > 1, "each epoch has an order of its own"
    assert not np.array_equal(visited, other_seed)


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    plan = replace(PLAN, steps=100, warmup_ratio=0.1, learning_rate=1.0)
    rates = [learning_rate(step, plan) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-12)
    assert rates[10] == max(rates) == 1.0 and all(later < now for now, later in pairwise(rates[10:]))
    assert math.isclose(learning_rate(100, plan), 0.1) and math.isclose(learning_rate(55, plan), 0.55)
    assert learning_rate(0, replace(plan, warmup_ratio=0.0)) == 1.0


def test_bf16_is_asked_of_the_processor() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert computes_bf16() is ("avx512_bf16" in flags or "amx_bf16" in flags)


def _model(make_model: MakeModel) -> Any:
    return make_model("llama", num_hidden_layers=1, tie_word_embeddings=True)


def _train(
    model: Any, checkpoint: Path, plan: TrainPlan = PLAN, *, dies_at: int | None = None, seen: list[int] | None = None
) -> list[dict[str, float]]:
    steps = [] if seen is None else seen

    def loss(logits: torch.Tensor, rows: NDArray[np.int64], tokens: torch.Tensor) -> torch.Tensor:
        steps.append(len(rows))
        if len(steps) == dies_at:
            raise KeyboardInterrupt
        return next_token_loss(logits, tokens)

    return train(model, SEQUENCES, loss, plan, checkpoint, "test")


def _same(model: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
