"""Training in codes: what it multiplies by is what is stored, and it brings the model nearer to itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.distillation import trainer
from pipeline.distillation.batches import Batch, LossSum, Sequences
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.hidden_losses import hidden_term
from pipeline.distillation.objectives import LossSettings, hidden_and_head, signal_objective
from pipeline.distillation.signals import OnlineSource
from pipeline.distillation.trainer import TrainPlan, train
from pipeline.quantization.grid import Grid
from pipeline.quantization.qad import QuantizedStudent, fake_quantized, quantized_objective, trained_codes
from pipeline.quantization.scales import quantize_weighted

from .conftest import VOCABULARY, MakeModel
from .quantization_cases import divergence

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (12, 24)).astype(np.int32)
PLAN = TrainPlan(
    steps=12, batch_sequences=4, learning_rate=0.02, weight_decay=0.0, warmup_ratio=0.05, bf16=False, seed=1,
    checkpoint_every_steps=5,
)  # fmt: skip


def _student(model: Any, grid: Grid) -> QuantizedStudent:
    model = copy.deepcopy(model)
    matrices = {name: value for name, value in model.named_parameters() if value.ndim == 2}
    codes = {name: quantize_weighted(value.detach(), None, grid) for name, value in matrices.items()}
    return QuantizedStudent(model, codes, dict.fromkeys(codes, grid))


def _train(student: QuantizedStudent, teacher: Any, folder: Path, plan: TrainPlan = PLAN, hidden: float = 0.0) -> Any:
    source = OnlineSource.open(teacher, bf16=False)
    term = hidden_term(student.student, teacher, hidden, len(teacher.model.layers)) if hidden else None
    objective = quantized_objective(signal_objective(source, LossSettings(LossKind.FORWARD_KL), term))
    return train(student, objective, Sequences(TOKENS), plan, folder, "test")


@pytest.mark.parametrize("grid", [Grid(4, 32, True), Grid(4, 32, False), Grid(8, 32, True), Grid(4, 48, True)], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_it_starts_from_the_codes_and_ends_in_the_codes_it_computed_with(
    make_model: MakeModel, tmp_path: Path, grid: Grid, tied: bool
) -> None:
    teacher = make_model("qwen2", tie_word_embeddings=tied, num_hidden_layers=2)
    student = _student(teacher, grid)
    before = trained_codes(student)
    for name, tensor in before.items():
        expected = quantize_weighted(teacher.get_parameter(name).detach(), None, grid)
        assert (tensor.packed == expected.packed).all() and (tensor.scales == expected.scales).all()
    _train(student, teacher, tmp_path, replace(PLAN, learning_rate=0.06))  # fast enough to leave codes behind
    after = trained_codes(student)
    with torch.no_grad():
        multiplied = fake_quantized(student)
    for name, tensor in after.items():
        assert (torch.from_numpy(dequantize(tensor)) == multiplied[name]).all()
        assert not grid.positive_scales or tensor.scales.min() > 0
    assert any((after[name].packed != before[name].packed).any() for name in after)
    assert any((after[name].scales != before[name].scales).any() for name in after)
    assert len(after) == 1 + 2 * 7 + (not tied)


def test_the_objective_sees_code_times_scale_everywhere(make_model: MakeModel) -> None:
    teacher = make_model(tie_word_embeddings=True, num_hidden_layers=2)
    student = _student(teacher, Grid(4, 32, True))
    seen: dict[str, torch.Tensor] = {}

    def look(model: Any, batch: Batch) -> LossSum:
        seen.update({name: value.detach().clone() for name, value in model.named_parameters()})
        hidden, head = hidden_and_head(model, batch.tokens)
        seen["hidden"], seen["head"] = hidden, head
        return LossSum(hidden.sum(), torch.ones(()))

    batch = Batch(np.arange(2), torch.from_numpy(TOKENS[:2].astype(np.int64)), torch.ones(2, 24, dtype=torch.bool))
    quantized_objective(look)(student, batch)
    codes = trained_codes(student)
    plain = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, tensor in codes.items():
            plain.get_parameter(name).copy_(torch.from_numpy(dequantize(tensor)))
        expected = plain.model(batch.tokens).last_hidden_state
    assert (seen["hidden"] == expected).all() and (seen["head"] == plain.lm_head.weight).all()


def test_training_brings_it_nearer_to_its_float_self(make_model: MakeModel, tmp_path: Path) -> None:
    teacher = make_model(tie_word_embeddings=True, num_hidden_layers=2)
    student = _student(teacher, Grid(4, 32, True))
    before = divergence(teacher, trained_codes(student), TOKENS)
    frozen = {name: value.clone() for name, value in teacher.named_parameters() if value.ndim < 2}
    _train(student, teacher, tmp_path)
    assert divergence(teacher, trained_codes(student), TOKENS) < 0.75 * before
    assert all((student.student.get_parameter(name) == value).all() for name, value in frozen.items())


def test_hidden_states_of_the_dequantized_model_count_with_their_weight(make_model: MakeModel, tmp_path: Path) -> None:
    """The first step's loss of all sequences, against transformers' own ``hidden_states``: 2 (1 - cosine) a layer."""
    teacher, plan = (
        make_model(tie_word_embeddings=True, num_hidden_layers=3),
        replace(PLAN, steps=1, batch_sequences=12),
    )
    student, ids = _student(teacher, Grid(4, 32, True)), torch.from_numpy(TOKENS.astype(np.int64))
    found = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, value in fake_quantized(student).items():
            found.get_parameter(name).copy_(value)
        ours, theirs = (model(ids, output_hidden_states=True).hidden_states[1:] for model in (found, teacher))
    cosines = [torch.cosine_similarity(*states, dim=-1).double().mean() for states in zip(ours, theirs, strict=True)]
    expected = 2 * (1 - float(np.mean(cosines)))
    losses = [
        _train(_student(teacher, Grid(4, 32, True)), teacher, tmp_path / str(weight), plan, weight)[0]["loss"]
        for weight in (0.0, 10.0)
    ]
    assert losses[1] - losses[0] == pytest.approx(10 * expected, rel=1e-4)


def test_gradients_pass_rounding_and_stop_where_codes_end() -> None:
    """Against autograd through ``code + (place - code of the step before)``, which has the same gradient."""
    grid, start = Grid(4, 4, True), torch.tensor([[0.5, 0.25]])
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1, 8))
    tensor = QuantizedTensor.of_codes(np.zeros((1, 8), np.int8), start.half().numpy(), 4, 8)
    student = QuantizedStudent(_WithConfig(model), {"weight": tensor}, {"weight": grid})
    places = torch.tensor([[0.3, -2.6, 7.4, 9.0, -9.0, -8.4, 1.5, 0.0]])
    student.student.weight.data = places.clone()
    weights = torch.arange(1.0, 9.0)
    (fake_quantized(student)["weight"] * weights).sum().backward()
    scales = start.repeat_interleave(4, dim=1)
    inside = torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 1])
    assert (student.student.weight.grad == weights * scales * inside).all()
    codes = places.round().clamp(-8, 7)
    of_scale = (weights * codes).view(1, 2, 4).sum(-1) * start * 0.2
    torch.testing.assert_close(next(iter(student.growth.values())).grad, of_scale)


def test_a_run_that_was_killed_ends_with_the_same_codes(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_model(tie_word_embeddings=True, num_hidden_layers=2)
    whole = _student(teacher, Grid(4, 32, True))
    _train(whole, teacher, tmp_path / "whole")
    take, cut = trainer._take_step, _student(teacher, Grid(4, 32, True))

    def stop(training: Any, step: int, batches: Any) -> dict[str, float]:
        if step == 8:
            raise KeyboardInterrupt
        return take(training, step, batches)

    monkeypatch.setattr(trainer, "_take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        _train(cut, teacher, tmp_path / "cut")
    monkeypatch.setattr(trainer, "_take_step", take)
    again = _student(teacher, Grid(4, 32, True))
    _train(again, teacher, tmp_path / "cut")
    for name, tensor in trained_codes(whole).items():
        found = trained_codes(again)[name]
        assert (found.packed == tensor.packed).all() and (found.scales == tensor.scales).all()


class _WithConfig(torch.nn.Module):
    """The one matrix of a test as a model."""

    config = None

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.weight = inner.weight
