"""Codes distilled in rounds: each begins with what the one before stored, scales come last, kills change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.distillation import trainer
from pipeline.distillation.batches import Sequences
from pipeline.distillation.checkpoints import History
from pipeline.distillation.trainer import TrainPlan
from pipeline.quantization import distilled
from pipeline.quantization.calibration import load_model
from pipeline.quantization.distilled import Distillation, distil_codes
from pipeline.quantization.grid import Grid
from pipeline.quantization.scales import quantize_weighted
from pipeline.quantization.source import Checkpoint, open_checkpoint

from .conftest import VOCABULARY, MakeModel
from .quantization_cases import divergence

GRID = Grid(4, 32, True)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (12, 24)).astype(np.int32)
TRAINING = TrainPlan(
    steps=8, batch_sequences=12, learning_rate=0.04, weight_decay=0.0, warmup_ratio=0.05, bf16=False, seed=1,
    checkpoint_every_steps=3,
)  # fmt: skip
PLAN = Distillation(TRAINING, rounds=2, scale_steps=6)
Codes = Mapping[str, QuantizedTensor]


@pytest.fixture(scope="module")
def source(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("distilled")
    make_model(tie_word_embeddings=True, num_hidden_layers=2).save_pretrained(folder)
    return open_checkpoint(folder, 24, 32)


@pytest.fixture(scope="module")
def start(source: Checkpoint) -> Codes:
    model = load_model(source)
    return {name: quantize_weighted(model.get_parameter(name).detach(), None, GRID) for name in source.matrices}


def test_a_round_begins_in_what_the_round_before_stored(source: Checkpoint, start: Codes, tmp_path: Path) -> None:
    """All sequences are one batch, so that a step's loss is the divergence of the codes before it."""
    stops = [Distillation(TRAINING, 1, 0), replace(PLAN, scale_steps=0), PLAN]
    stored = [start] + [_distil(source, start, plan, tmp_path / str(index))[0] for index, plan in enumerate(stops)]
    history = _distil(source, start, PLAN, tmp_path / "seen")[1]
    assert [entry["step"] for entry in history] == list(range(1, 23))
    firsts = [history[step]["loss"] for step in (0, 8, 16)]
    diverging = [divergence(load_model(source), codes, TOKENS) for codes in stored]
    assert firsts == pytest.approx(diverging[:3], rel=1e-3, abs=1e-5), "losses are rounded to five digits"
    assert diverging[3] < diverging[1] < 0.8 * diverging[0]
    rates = [entry["learning_rate"] for entry in history]
    assert max(rates[:8]) == max(rates[8:16]) == 0.04 and max(rates[16:]) == 0.08


def test_scales_alone_leave_every_code_as_it_is(source: Checkpoint, start: Codes, tmp_path: Path) -> None:
    for plan in (Distillation(replace(TRAINING, steps=0), 3, 8), Distillation(TRAINING, 2, 8)):
        before = start
        if plan.training.steps:
            before, _ = _distil(source, start, replace(plan, scale_steps=0), tmp_path / "codes")
        after, _ = _distil(source, start, plan, tmp_path / f"scales-{plan.training.steps}")
        assert all((after[name].packed == before[name].packed).all() for name in start)
        assert all((after[name].scales != before[name].scales).any() for name in start)
        nearer = [divergence(load_model(source), codes, TOKENS) for codes in (after, before)]
        assert nearer[0] < 0.97 * nearer[1]


def test_hidden_states_count_with_their_weight(source: Checkpoint, start: Codes, tmp_path: Path) -> None:
    losses = [
        _distil(source, start, replace(PLAN, hidden_weight=weight), tmp_path / str(weight))[1][0]["loss"]
        for weight in (0.0, 10.0, 30.0)
    ]
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3) and losses[1] > losses[0]


@pytest.mark.parametrize("killed_at", [0, 5, 8, 13, 16, 20])
def test_a_run_killed_in_any_round_ends_with_the_same_codes(
    source: Checkpoint, start: Codes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole, expected = _distil(source, start, PLAN, tmp_path / "whole")
    taken, take = [0], trainer._take_step

    def stop(*arguments: Any) -> dict[str, float]:
        if taken[0] == killed_at:
            raise KeyboardInterrupt
        taken[0] += 1
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _distil(source, start, PLAN, tmp_path / "cut")
    _same(_distil(source, start, PLAN, tmp_path / "cut"), (whole, expected))


@pytest.mark.parametrize("what", ["save_weights", "discard_checkpoint", "write_json"])
@pytest.mark.parametrize("round_number", [1, 2, 3])
def test_a_run_killed_while_a_round_is_stored_ends_with_the_same_codes(
    source: Checkpoint, start: Codes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, round_number: int
) -> None:
    whole = _distil(source, start, PLAN, tmp_path / "whole")
    calls, real = [0], getattr(distilled, what)

    def stop(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == round_number:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distilled, what, stop)
        with pytest.raises(KeyboardInterrupt):
            _distil(source, start, PLAN, tmp_path / "cut")
    _same(_distil(source, start, PLAN, tmp_path / "cut"), whole)


def test_steps_are_told_through_all_rounds_and_one_result_is_kept(
    source: Checkpoint, start: Codes, tmp_path: Path
) -> None:
    told: list[int] = []
    distil_codes(source, start, dict.fromkeys(start, GRID), Sequences(TOKENS), PLAN, tmp_path, "test",
                 observe=lambda step, _: told.append(step))  # fmt: skip
    assert told == list(range(1, 23))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["round-3.safetensors"]


def _distil(source: Checkpoint, start: Codes, plan: Distillation, work: Path) -> tuple[Codes, History]:
    return distil_codes(source, start, dict.fromkeys(start, GRID), Sequences(TOKENS), plan, work, "test")


def _same(found: tuple[Codes, History], expected: tuple[Codes, History]) -> None:
    assert found[1] == expected[1]
    for name, tensor in expected[0].items():
        assert (found[0][name].packed == tensor.packed).all() and (found[0][name].scales == tensor.scales).all()
