"""The hidden-state loss beside the other: against transformers' own hidden states, one pass of the teacher, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch, LossSum
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.hidden_losses import HiddenTerm, hidden_term, kept_states, projected
from pipeline.distillation.objectives import LossSettings, Objective, signal_objective
from pipeline.distillation.signals import OnlineSource
from pipeline.distillation.trainer import TrainPlan, train
from tests.pipeline.conftest import CLASSES, VOCABULARY, MakeModel
from tests.pipeline.exact_model import ANSWERS, PLAN, SEQUENCES

KL = LossSettings(LossKind.FORWARD_KL, chunk_tokens=7)
WIDER = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 4}
_RANDOM = np.random.default_rng(4)
TOKENS = torch.from_numpy(_RANDOM.integers(0, VOCABULARY, (3, 12)))
COUNTS = torch.from_numpy(_RANDOM.random((3, 12)) < 0.4)
BATCH = Batch(np.arange(3), TOKENS, COUNTS)


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 4}, WIDER], ids=["same width", "wider"])
def test_loss_and_gradients_are_those_of_transformers_hidden_states(
    make_model: MakeModel, architecture: str, sizes: dict[str, int]
) -> None:
    student, reference = (make_model(architecture, num_hidden_layers=2) for _ in range(2))
    teacher = make_model(architecture, **sizes)
    term = hidden_term(student, teacher, 0.7, pairs=2)
    assert term.pairs == ((0, 1), (1, 3))
    with projected(student, term, seed=1), projected(reference, term, seed=1):
        maps = list(getattr(reference, "hidden_projections", [torch.eye(64), torch.eye(64)]))
        assert all(weights.shape == (teacher.config.hidden_size, 64) for weights in maps)
        loss = signal_objective(OnlineSource.open(teacher, bf16=False), KL, term)(student, BATCH)
        expected = _expected(reference, teacher, maps, 0.7)
        assert float(loss.weight) == int(COUNTS.sum())
        torch.testing.assert_close(loss.total / loss.weight, expected, rtol=1e-5, atol=0)
        (loss.total / loss.weight).backward()
        expected.backward()
        for (name, found), wanted in zip(student.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=2e-4, atol=2e-7, msg=lambda t, n=name: f"{n}: {t}")
        assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_runs_once_for_both(make_model: MakeModel) -> None:
    student, teacher = make_model(num_hidden_layers=2), make_model(**WIDER)
    source, passes = OnlineSource.open(teacher, bf16=False), []
    teacher.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    term = hidden_term(student, teacher, 1.0, pairs=1)
    with projected(student, term, seed=1):
        signal_objective(source, KL, term)(student, BATCH)
    assert len(passes) == 1


def test_only_the_layers_asked_for_are_kept_and_nothing_stays_behind(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=3)
    expected = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    with kept_states(model, (0, 2)) as states:
        model(input_ids=TOKENS)
    assert list(states) == [0, 2] and all(torch.equal(states[layer], expected[layer + 1]) for layer in states)
    states.clear()
    model(input_ids=TOKENS)
    assert not states


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by Dynamo's own look
@pytest.mark.parametrize("change", [{"micro_sequences": 1}, {"compile": True}, {"recompute": True}], ids=str)
def test_however_it_is_computed_the_student_is_the_same(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    compile_really = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_really(function, backend="eager", **options)
    )
    plans = [replace(PLAN, steps=3), replace(PLAN, steps=3, **change)]
    students = [_train(make_model, tmp_path / str(number), plan) for number, plan in enumerate(plans)]
    for found, expected in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)


def test_a_killed_run_ends_with_the_same_bits_and_its_states_hold_the_projections(
    make_model: MakeModel, tmp_path: Path
) -> None:
    undisturbed = _train(make_model, tmp_path / "a", PLAN)
    with pytest.raises(KeyboardInterrupt):
        _train(make_model, tmp_path / "b", PLAN, dies_at=5)
    with safe_open(tmp_path / "b" / "state-00000003.safetensors", framework="pt") as state:
        names = [name for name in state.keys() if "hidden_projections" in name]  # noqa: SIM118
    kinds = ("exp_avg", "exp_avg_sq", "parameter", "step")
    assert sorted(names) == [f"{kind}.hidden_projections.{number}" for kind in kinds for number in (0, 1)]
    resumed = _train(make_model, tmp_path / "b", PLAN)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))


def test_the_students_checkpoint_has_no_projection(make_model: MakeModel, tmp_path: Path) -> None:
    student = _train(make_model, tmp_path / "a", replace(PLAN, steps=1))
    assert list(student.state_dict()) == list(make_model(num_hidden_layers=2).state_dict())
    student.save_pretrained(tmp_path / "student")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(input_ids=TOKENS).logits, student(input_ids=TOKENS).logits)


def test_states_come_nearer(make_model: MakeModel, tmp_path: Path) -> None:
    """Than with the other loss alone."""
    teacher = make_model(num_hidden_layers=4)
    source, plan, apart = OnlineSource.open(teacher, bf16=False), replace(PLAN, steps=40), []
    for weight in (0.0, 5.0):
        student = make_model(num_hidden_layers=2)
        term = hidden_term(student, teacher, weight, pairs=1) if weight else None
        train(student, signal_objective(source, KL, term), SEQUENCES, plan, tmp_path / str(weight), "test")
        apart.append(_last_apart(student, teacher))
    assert apart[1] < 0.8 * apart[0]


@pytest.mark.parametrize(("layers", "pairs"), [(2, 3), (5, 1)])
def test_depths_that_do_not_fit_are_one_line(make_model: MakeModel, layers: int, pairs: int) -> None:
    with pytest.raises(UserError, match=rf"^distill.hidden_layers: got '{pairs} pairs of {layers} and 4 layers'"):
        hidden_term(make_model(num_hidden_layers=layers), make_model(num_hidden_layers=4), 1.0, pairs)


def _expected(student: Any, teacher: Any, maps: list[torch.Tensor], weight: float) -> torch.Tensor:
    """KL of the logits plus the weighted distance, from whole outputs; the layers are written out."""
    ours = student(input_ids=TOKENS, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(input_ids=TOKENS, output_hidden_states=True)
    log_q, log_p = (out.logits.log_softmax(-1)[COUNTS] for out in (ours, theirs))
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    distances = [
        _distance(ours.hidden_states[mine][COUNTS] @ weights.T, theirs.hidden_states[its][COUNTS])
        for (mine, its), weights in zip(((1, 2), (2, 4)), maps, strict=True)
    ]
    return kl + weight * torch.stack(distances).mean()


def _distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return 2 * (1 - functional.cosine_similarity(student, teacher, dim=-1)).mean()


def _last_apart(student: Any, teacher: Any) -> float:
    """How far the last states of what was learned from are apart."""
    tokens = torch.from_numpy(ANSWERS.tokens.astype(np.int64))
    with torch.no_grad():
        return float(
            _distance(*(m(input_ids=tokens, output_hidden_states=True).hidden_states[-1] for m in (student, teacher)))
        )


def _train(make_model: MakeModel, checkpoint: Path, plan: TrainPlan, dies_at: int | None = None) -> Any:
    student, teacher = make_model(num_hidden_layers=2), make_model(**WIDER)
    term = hidden_term(student, teacher, 0.5, pairs=2)
    objective = _dying(signal_objective(OnlineSource.open(teacher, bf16=False), KL, term), dies_at)
    with projected(student, term, seed=3):
        train(student, objective, ANSWERS, plan, checkpoint, "test", identity=str(term))
    return student


def _dying(objective: Objective, step: int | None) -> Callable[[Any, Batch], LossSum]:
    def objective_until(model: Any, batch: Batch) -> LossSum:
        if batch.step == step:
            raise KeyboardInterrupt
        return objective(model, batch)

    return objective_until


def test_what_names_the_run_does_not_hold_the_teacher(make_model: MakeModel) -> None:
    assert str(HiddenTerm(make_model(), 0.5, ((0, 1),))) == "HiddenTerm(weight=0.5, pairs=((0, 1),))"
