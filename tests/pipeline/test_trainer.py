"""The one training loop: against torch's own optimizer and schedule, the whole batch, and itself after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.optim.lr_scheduler import LambdaLR

from edge_runtime.formats.errors import UserError
from pipeline.distillation import trainer
from pipeline.distillation.batches import Batch, LossSum, Sequences, batch_rows
from pipeline.distillation.checkpoints import History
from pipeline.distillation.correction import LoraSettings, add_lora, correct_teacher
from pipeline.distillation.from_config import computes_bf16
from pipeline.distillation.objectives import next_token_objective
from pipeline.distillation.trainer import TrainPlan, learning_rate, train
from tests.pipeline.conftest import MakeModel
from tests.pipeline.exact_model import ANSWERS, PLAN, SEQUENCES, TOKENS, UNEVEN, Exact


def test_steps_are_those_of_adamw_under_the_schedule(tmp_path: Path) -> None:
    model, reference, start = Exact(), Exact(), Exact()
    history = _train(model, tmp_path)
    optimizer = torch.optim.AdamW(_decayed_groups(reference), lr=PLAN.learning_rate, betas=(0.9, 0.95), eps=1e-8)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, PLAN) / PLAN.learning_rate)
    for step in range(PLAN.steps):
        tokens = torch.from_numpy(TOKENS[batch_rows(step, 10, 3, PLAN.seed)].astype(np.int64))
        optimizer.zero_grad()
        loss = _mean_loss(reference(tokens).logits, tokens, torch.ones_like(tokens, dtype=torch.bool))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        assert history[step]["loss"] == round(loss.item(), 5)
    for (name, found), expected, before in zip(
        model.named_parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        assert float((expected - before).detach().abs().max()) > 1e-3, f"{name} did not move"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("micro_sequences", [1, 2, 3])
def test_micro_batches_add_up_to_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_sequences: int
) -> None:
    """Gradients too, although the answers of each part are of very different length."""
    gradients = _record_gradients(monkeypatch)
    model, reference = Exact(), Exact()
    plan = replace(PLAN, micro_sequences=micro_sequences, steps=1, gradient_norm_max=1e9)
    history = _train(model, tmp_path, plan, sequences=ANSWERS)
    rows = batch_rows(0, 10, 3, PLAN.seed)
    tokens, counts = torch.from_numpy(TOKENS[rows].astype(np.int64)), torch.from_numpy(UNEVEN[rows])
    assert len({int(count) for count in counts[:, :-1].sum(1)}) == 3
    loss = _mean_loss(reference(tokens).logits, tokens, counts)
    loss.backward()
    assert history[0]["loss"] == round(loss.item(), 5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[-1][name], parameter.grad, rtol=1e-12, atol=1e-17)


def test_a_gradient_is_cut_to_its_length(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, seen = _record_gradients(monkeypatch), []
    plan = replace(PLAN, gradient_norm_max=0.01, steps=2)
    _train(_model(make_model), tmp_path, plan, observe=lambda _step, figures: seen.append(figures["gradient_norm"]))
    for found, before in zip(gradients, seen, strict=True):
        norm = float(torch.linalg.vector_norm(torch.cat([value.flatten() for value in found.values()])))
        assert before > 0.1 and math.isclose(norm, 0.01, rel_tol=1e-3)


def test_a_batch_in_which_nothing_counts_does_not_end_training(make_model: MakeModel, tmp_path: Path) -> None:
    nothing = Sequences(TOKENS, np.zeros_like(UNEVEN))
    model = _model(make_model)
    history = _train(model, tmp_path, replace(PLAN, steps=2), sequences=nothing)
    assert [entry["loss"] for entry in history] == [0.0, 0.0]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("killed_at", [2, 4, 7, 11])
@pytest.mark.parametrize(("bf16", "bf16_weights"), [(False, False), (True, False), (True, True)])
def test_a_killed_run_ends_with_the_same_bits(
    make_model: MakeModel, tmp_path: Path, killed_at: int, bf16: bool, bf16_weights: bool
) -> None:
    plan = replace(PLAN, bf16=bf16, bf16_weights=bf16_weights)
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


def test_dropout_is_resumed_and_the_callers_random_numbers_are_left_alone(
    make_model: MakeModel, tmp_path: Path
) -> None:
    lora = LoraSettings(rank=4, alpha=8, targets=("q_proj", "up_proj"), dropout=0.5)
    models = [add_lora(_model(make_model), lora) for _ in range(4)]
    torch.manual_seed(1)
    expected = torch.rand(3)
    for seed, (model, dies_at) in enumerate(zip(models[:3], (None, 8, None), strict=True)):
        torch.manual_seed(seed if seed != 1 else 1)  # what the caller drew before does not matter
        if dies_at is not None:
            with pytest.raises(KeyboardInterrupt):
                _train(model, tmp_path / "b", dies_at=dies_at)
            assert torch.equal(torch.rand(3), expected)
        else:
            _train(model, tmp_path / ("a" if seed == 0 else "b"))
    assert _same(models[0], models[2])
    _train(models[3], tmp_path / "c", replace(PLAN, seed=6))
    assert not _same(models[0], models[3])


def test_only_the_adapter_is_trained_and_kept(make_model: MakeModel, tmp_path: Path) -> None:
    """Against the same adapter under a hand-written loop."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    found, expected = (_peft(make_model, config) for _ in range(2))
    plan = replace(PLAN, steps=4, weight_decay=0.0)
    _train(found, tmp_path, plan)
    trained = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    expected.train()
    for step in range(plan.steps):
        tokens = torch.from_numpy(TOKENS[batch_rows(step, 10, 3, PLAN.seed)].astype(np.int64))
        optimizer.param_groups[0]["lr"] = learning_rate(step, plan)
        expected(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, parameter), reference in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, reference, rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    (state,) = tmp_path.iterdir()
    with safe_open(state, framework="pt") as file:
        names = list(file.keys())
        assert len(names) == 4 * len(trained) and all("lora_" in name for name in names)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=16, targets=("q_proj", "v_proj", "down_proj"))])
def test_a_corrected_teacher_is_an_ordinary_model_that_knows_the_text(
    make_model: MakeModel, tmp_path: Path, lora: LoraSettings | None
) -> None:
    teacher = _model(make_model)
    kind, names = type(teacher), list(teacher.state_dict())
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    before = teacher(input_ids=tokens, labels=tokens).loss.item()
    plan = replace(PLAN, steps=30, learning_rate=2e-2)
    corrected, history = correct_teacher(teacher, SEQUENCES, plan, tmp_path, lora=lora)
    after = corrected(input_ids=tokens, labels=tokens).loss.item()
    assert type(corrected) is kind and list(corrected.state_dict()) == names
    assert after < before - 0.5 and math.isclose(after, history[-1]["loss"], rel_tol=0.3)


def test_adapters_of_unknown_projections_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="lora: got 'w_proj'"):
        add_lora(_model(make_model), LoraSettings(rank=2, alpha=4, targets=("w_proj",)))


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "test: got 'loss nan"), (math.inf, "test: got 'loss inf"), (1e30, "gradient norm inf")],
)
def test_a_loss_that_is_not_finite_ends_training_before_it_does_harm(
    make_model: MakeModel, tmp_path: Path, value: float, message: str
) -> None:
    model, good = _model(make_model), _model(make_model)

    def breaks(model: Any, batch: Batch) -> LossSum:
        loss = next_token_objective(model, batch)
        return LossSum(loss.total * (value if batch.step == 7 else 1.0), loss.weight)

    with pytest.raises(UserError, match=message) as raised:
        train(model, breaks, SEQUENCES, PLAN, tmp_path, "test")
    line = str(raised.value)
    assert "at step 7" in line and "lower the learning rate" in line and "the checkpoint of step 6 is kept" in line
    with pytest.raises(KeyboardInterrupt):
        _train(good, tmp_path / "good", dies_at=8)
    assert _same(model, good), "the bad step changed nothing"
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "state-00000003.safetensors", "state-00000006.safetensors",
    ]  # fmt: skip


def test_half_precision_weights_are_trained_as_float32(make_model: MakeModel, tmp_path: Path) -> None:
    model, reference = _model(make_model).bfloat16(), _model(make_model).bfloat16().float()
    _train(model, tmp_path / "a")
    _train(reference, tmp_path / "b")
    assert next(model.parameters()).dtype == torch.float32 and _same(model, reference)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by Dynamo's own look
def test_compiled_layers_learn_the_same(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_really = [], torch.compile

    def compile_without_a_c_compiler(function: Callable[..., Any], **options: Any) -> Any:
        compiled.append(function)
        return compile_really(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_without_a_c_compiler)
    plan, models = replace(PLAN, steps=3), [make_model("llama", num_hidden_layers=2) for _ in range(2)]
    _train(models[0], tmp_path / "a", plan)
    _train(models[1], tmp_path / "b", replace(plan, compile=True))
    assert len(compiled) == 2 and _same(*models)
    assert "forward" not in vars(models[1].model.layers[0])


def test_bf16_copies_of_the_weights_learn_as_casts_at_every_use_do(make_model: MakeModel, tmp_path: Path) -> None:
    """Steps far below bf16's resolution are not lost, and the weights are float32 again when all is done."""
    plan = replace(PLAN, bf16=True, steps=40, learning_rate=2e-5, checkpoint_every_steps=100)
    cast, copied, start = _model(make_model), _model(make_model), _model(make_model)
    histories = [_train(cast, tmp_path / "a", plan), _train(copied, tmp_path / "b", replace(plan, bf16_weights=True))]
    for found, expected in zip(*histories, strict=True):
        assert math.isclose(found["loss"], expected["loss"], rel_tol=2e-3)
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    for found_, expected_, before in zip(copied.parameters(), cast.parameters(), start.parameters(), strict=True):
        moved = float((expected_ - before).detach().norm())
        assert float((found_ - expected_).detach().norm()) < 0.25 * moved


def test_an_adapter_is_trained_beside_weights_that_stay_as_they_are(make_model: MakeModel, tmp_path: Path) -> None:
    model = add_lora(_model(make_model), LoraSettings(rank=2, alpha=4, targets=("q_proj",)))
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    _train(model, tmp_path, replace(PLAN, bf16=True, bf16_weights=True))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_recomputed_activations_learn_the_same(make_model: MakeModel, tmp_path: Path) -> None:
    plan, models = replace(PLAN, steps=3), [_model(make_model) for _ in range(2)]
    _train(models[0], tmp_path / "a", plan)
    _train(models[1], tmp_path / "b", replace(plan, recompute=True))
    assert _same(*models) and not models[1].is_gradient_checkpointing


def test_what_is_observed_names_speed_and_memory_but_the_history_does_not(
    make_model: MakeModel, tmp_path: Path
) -> None:
    seen: dict[int, Mapping[str, float]] = {}
    history = _train(_model(make_model), tmp_path, observe=seen.__setitem__)
    assert list(seen) == [entry["step"] for entry in history]
    assert {"loss", "learning_rate", "gradient_norm", "memory_bytes"} <= set(seen[PLAN.steps])
    assert all(set(entry) == {"step", "loss", "learning_rate"} for entry in history)


def test_batches_are_prepared_in_order_in_another_thread(make_model: MakeModel, tmp_path: Path) -> None:
    prepared: list[int] = []

    def prepare(batch: Batch) -> Batch:
        prepared.append(batch.step)
        return replace(batch, signal=batch.tokens + 1)

    def objective(model: Any, batch: Batch) -> LossSum:
        assert torch.equal(batch.signal, batch.tokens + 1)
        return next_token_objective(model, batch)

    train(_model(make_model), objective, SEQUENCES, replace(PLAN, micro_sequences=2), tmp_path, "test", prepare=prepare)
    assert prepared == [step for step in range(PLAN.steps) for _ in range(2)]


def test_a_fault_of_preparing_ends_training(make_model: MakeModel, tmp_path: Path) -> None:
    def prepare(batch: Batch) -> Batch:
        if batch.step == 4:
            raise UserError("targets", "shard 3", "a whole shard")
        return batch

    with pytest.raises(UserError, match="shard 3"):
        train(_model(make_model), next_token_objective, SEQUENCES, PLAN, tmp_path, "test", prepare=prepare)


def test_memory_that_does_not_suffice_is_one_line(make_model: MakeModel, tmp_path: Path) -> None:
    def objective(_model: Any, _batch: Batch) -> LossSum:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="micro_sequences: got 3"):
        train(_model(make_model), objective, SEQUENCES, PLAN, tmp_path, "test")


def test_nothing_to_train_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every parameter frozen"):
        _train(_model(make_model).requires_grad_(False), tmp_path)


def test_training_learns(make_model: MakeModel, tmp_path: Path) -> None:
    history = _train(_model(make_model), tmp_path, replace(PLAN, steps=60))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert [entry["step"] for entry in history] == list(range(1, 61))


def test_random_numbers_are_of_seed_and_step(tmp_path: Path) -> None:
    drawn: list[list[float]] = []
    for number, seed in enumerate((5, 5, 6)):
        values: list[float] = []

        def objective(model: Any, batch: Batch, values: list[float] = values) -> LossSum:
            values.append(float(torch.rand(())))
            return next_token_objective(model, batch)

        torch.manual_seed(number)
        train(Exact(), objective, SEQUENCES, replace(PLAN, seed=seed), tmp_path / str(number), "test")
        drawn.append(values)
    assert drawn[0] == drawn[1] and len({*drawn[0], *drawn[2]}) == 2 * PLAN.steps


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


def _peft(make_model: MakeModel, config: LoraConfig) -> Any:
    model = _model(make_model)
    torch.manual_seed(4)
    return get_peft_model(model, config)


def _train(
    model: Any, checkpoint: Path, plan: TrainPlan = PLAN, *, dies_at: int | None = None, seen: list[int] | None = None,
    sequences: Sequences = SEQUENCES, observe: Callable[[int, Mapping[str, float]], None] | None = None,
) -> History:  # fmt: skip
    steps = [] if seen is None else seen

    def objective(model: Any, batch: Batch) -> LossSum:
        steps.append(len(batch.rows))
        if len(steps) == dies_at:
            raise KeyboardInterrupt
        return next_token_objective(model, batch)

    return train(model, objective, sequences, plan, checkpoint, "test", observe=observe)


def _record_gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """What the optimizer is given at each step."""
    gradients: list[dict[str, torch.Tensor]] = []
    take_step = torch.optim.AdamW.step
    named: dict[str, torch.nn.Parameter] = {}
    groups = trainer._parameter_groups

    def remember(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> Any:
        named.update(parameters)
        return groups(parameters, weight_decay)

    def step(self: Any, *arguments: Any) -> Any:
        gradients.append({name: parameter.grad.clone() for name, parameter in named.items()})
        return take_step(self, *arguments)

    monkeypatch.setattr(trainer, "_parameter_groups", remember)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return gradients


def _mean_loss(logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Transformers' loss, without its rounding to float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1][counts[:, :-1]], tokens[:, 1:][counts[:, :-1]])


def _decayed_groups(model: Any) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": PLAN.weight_decay}, {"params": kept, "weight_decay": 0.0}]


def _same(model: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
