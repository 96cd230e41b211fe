"""The on-policy phase: what is drawn, what counts, and TRL's divergence on it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch, LossSum, Sequences, read_batch
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.objectives import LossSettings, next_token_objective, signal_objective
from pipeline.distillation.on_policy import Sampling, continue_prompts, on_policy_objective, sample_batch, samples_in
from pipeline.distillation.signals import OnlineSource
from pipeline.distillation.trainer import TrainPlan, train
from tests.pipeline.conftest import CLASSES, VOCABULARY, MakeModel

SAMPLING = Sampling(ratio=1.0, prompt_tokens=6, new_tokens=5, temperature=0.9, eos_ids=(1,), seed=3)
_RANDOM = np.random.default_rng(8)
TOKENS = _RANDOM.integers(2, VOCABULARY, (6, 16)).astype(np.int32)


@pytest.mark.parametrize("architecture", CLASSES)
def test_rows_are_continued_as_if_each_were_alone_and_without_a_cache(make_model: MakeModel, architecture: str) -> None:
    """Prompts of different length in one batch, against one whole forward pass a token."""
    model = make_model(architecture).double()
    lengths = torch.tensor([6, 2, 4])
    prompts = torch.zeros(3, 6, dtype=torch.int64)
    uniforms = torch.from_numpy(_RANDOM.random((3, 5)))
    for row, length in enumerate(lengths):
        prompts[row, 6 - length :] = torch.from_numpy(TOKENS[row, :length])
    drawn = continue_prompts(model, prompts, lengths, uniforms, replace(SAMPLING, eos_ids=()))
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    for row, length in enumerate(lengths):
        text = TOKENS[row, :length].tolist()
        for number in range(5):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            below = torch.softmax(logits.double() / 0.9, -1).cumsum(-1) <= uniforms[row, number]
            text.append(int(below.sum()))
        assert drawn[row].tolist() == text[length:]


def test_tokens_come_as_often_as_the_model_says(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=1, vocab_size=8)
    prompt = torch.tensor([[3, 4, 2]])
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=prompt).logits[0, -1] / 0.5, -1).numpy()
    rows = 4000
    uniforms = torch.from_numpy(np.random.default_rng(1).random((rows, 1)))
    sampling = replace(SAMPLING, temperature=0.5)
    drawn = continue_prompts(model, prompt.expand(rows, 3), torch.full((rows,), 3), uniforms, sampling)
    shares = np.bincount(drawn[:, 0].numpy(), minlength=8) / rows
    assert expected.max() < 0.9
    assert (np.abs(shares - expected) < 4 * np.sqrt(expected * (1 - expected) / rows) + 1e-9).all()


def test_only_generated_tokens_count(make_model: MakeModel) -> None:
    model = make_model()
    batch = _batch([0, 1, 2])
    sampled = sample_batch(model, batch, SAMPLING)
    assert sampled.tokens.shape == (3, 11) and len(sampled.rows) == 0 and sampled.step == batch.step
    assert torch.equal(sampled.tokens[:, :6], batch.tokens[:, :6])
    expected = torch.zeros(3, 11, dtype=torch.bool)
    expected[:, 5:10] = True  # the token after position 5 is the first that the student wrote
    assert torch.equal(sampled.counts, expected)


def test_a_text_ends_at_its_end_and_what_follows_does_not_count(make_model: MakeModel) -> None:
    model, batch = make_model(), _batch([0, 1, 2])
    free = sample_batch(model, batch, SAMPLING)
    ends = (int(free.tokens[0, 8]), int(free.tokens[1, 6]))
    sampled = sample_batch(model, batch, replace(SAMPLING, eos_ids=ends))
    assert sampled.counts.sum(1).tolist() == [3, 1, 5]
    assert sampled.tokens[0, :9].tolist() == free.tokens[0, :9].tolist() and sampled.tokens[0, 9:].tolist() == [0, 0]
    assert torch.equal(sampled.tokens[2], free.tokens[2])


def test_generation_stops_when_all_have_ended(make_model: MakeModel) -> None:
    model, calls = make_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    free = sample_batch(model, _batch([0]), SAMPLING)
    sample_batch(model, _batch([0]), replace(SAMPLING, eos_ids=(int(free.tokens[0, 7]),)))
    assert len(calls) == 5 + 2


def test_a_prompt_is_what_stands_before_the_first_answer(make_model: MakeModel) -> None:
    counts = np.zeros((4, 16), np.bool_)
    counts[0, 3:9] = True  # answers begin at token 4: a prompt of 4
    counts[1, 9:12] = True  # a prompt of 10, of which the last 6 are given
    counts[2, 15] = True  # the whole sequence asks
    batch = read_batch(Sequences(TOKENS[:4], counts), np.arange(4), 2)  # and in row 3 nothing is answered
    sampled = sample_batch(make_model(), batch, SAMPLING)
    assert sampled.tokens[0, :4].tolist() == TOKENS[0, :4].tolist()
    assert sampled.tokens[1, :6].tolist() == TOKENS[1, 4:10].tolist()
    assert sampled.tokens[2, :6].tolist() == TOKENS[2, 10:16].tolist()
    assert sampled.tokens[3, :6].tolist() == TOKENS[3, :6].tolist()
    assert [row.nonzero().flatten().tolist() for row in sampled.counts] == [[3, 4, 5, 6, 7]] + [[5, 6, 7, 8, 9]] * 3


def test_draws_are_of_seed_step_and_sequence_alone(make_model: MakeModel) -> None:
    model = make_model().double()
    whole = sample_batch(model, _batch([4, 0, 3]), SAMPLING)
    torch.manual_seed(99)
    alone = [sample_batch(model, _batch([row]), SAMPLING) for row in (4, 0, 3)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in alone]))
    others = [_batch([4, 0, 3], step=8), _batch([4, 0, 3])], [SAMPLING, replace(SAMPLING, seed=4)]
    for batch, sampling in zip(*others, strict=True):
        assert not torch.equal(sample_batch(model, batch, sampling).tokens, whole.tokens)


def test_the_share_of_steps_that_sample() -> None:
    for ratio in (0.0, 0.3, 1.0):
        share = np.mean([samples_in(step, replace(SAMPLING, ratio=ratio)) for step in range(2000)])
        assert abs(share - ratio) <= 4 * np.sqrt(ratio * (1 - ratio) / 2000)


def test_other_steps_learn_from_the_batch_itself(make_model: MakeModel) -> None:
    seen: list[Batch] = []

    def inner(_model: Any, batch: Batch) -> LossSum:
        seen.append(batch)
        return LossSum(torch.zeros(()), torch.ones(()))

    sampling = replace(SAMPLING, ratio=0.5)
    batches = [_batch([0, 1], step=step) for step in range(12)]
    model = make_model(num_hidden_layers=1)
    for batch in batches:
        on_policy_objective(inner, sampling)(model, batch)
    kept = [found is given for found, given in zip(seen, batches, strict=True)]
    assert kept == [not samples_in(step, sampling) for step in range(12)] and 0 < sum(kept) < 12


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_divergence_is_that_of_trl(make_model: MakeModel, beta: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    student, teacher = make_model(num_hidden_layers=1), make_model(num_hidden_layers=2)
    inner = signal_objective(OnlineSource.open(teacher, bf16=False), LossSettings(LossKind.JSD, beta=beta))
    loss = on_policy_objective(inner, SAMPLING)(student, _batch([0, 1, 2]))
    gradient = torch.autograd.grad(loss.total / loss.weight, student.model.norm.weight)[0]
    text = sample_batch(student, _batch([0, 1, 2]), SAMPLING)
    labels = torch.where(text.counts, 0, -100)
    expected = GKDTrainer.generalized_jsd_loss(
        student(input_ids=text.tokens).logits, teacher(input_ids=text.tokens).logits.detach(), labels, beta=beta
    )
    torch.testing.assert_close(loss.total / loss.weight, expected, rtol=1e-5, atol=0)
    reference = torch.autograd.grad(expected, student.model.norm.weight)[0]
    torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_a_phase_brings_the_student_nearer_to_the_teacher_and_resumes_exactly(
    make_model: MakeModel, tmp_path: Path
) -> None:
    teacher = make_model(num_hidden_layers=1)
    inner = signal_objective(OnlineSource.open(teacher, bf16=False), LossSettings(LossKind.JSD))
    objective = on_policy_objective(inner, replace(SAMPLING, ratio=0.7))
    plan = TrainPlan(24, 4, 5e-3, 0.0, 0.1, False, 5, 10, micro_sequences=3)
    sequences = Sequences(TOKENS)

    def dies(model: Any, batch: Batch) -> LossSum:
        if batch.step == 17:
            raise KeyboardInterrupt
        return objective(model, batch)

    undisturbed, killed, resumed = (_near(make_model, teacher) for _ in range(3))
    before = _divergence(undisturbed, teacher)
    history = train(undisturbed, objective, sequences, plan, tmp_path / "a", "test")
    with pytest.raises(KeyboardInterrupt):
        train(killed, dies, sequences, plan, tmp_path / "b", "test")
    torch.manual_seed(11)
    assert train(resumed, objective, sequences, plan, tmp_path / "b", "test") == history
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))
    assert _divergence(undisturbed, teacher) < 0.7 * before


def test_the_model_is_left_in_the_mode_it_was_in(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=1)
    for mode in (True, False):
        model.train(mode)
        sampled = sample_batch(model, _batch([0]), SAMPLING)
        assert model.training is mode and not sampled.tokens.requires_grad
    assert next_token_objective(model, sampled).total.requires_grad


@pytest.mark.parametrize(
    ("name", "value"), [("ratio", 1.5), ("prompt_tokens", 0), ("new_tokens", 0), ("temperature", 0.0)]
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"on_policy\.{name}: got {value}"):
        replace(SAMPLING, **{name: value})


def _batch(rows: list[int], step: int = 7) -> Batch:
    return read_batch(Sequences(TOKENS), np.array(rows), step)


def _near(make_model: MakeModel, teacher: Any) -> Any:
    """The teacher with noise: a student that has something to learn, and can."""
    student = make_model(num_hidden_layers=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter, source in zip(student.parameters(), teacher.parameters(), strict=True):
            parameter.copy_(source + 0.05 * torch.randn(source.shape, generator=generator))
    return student


def _divergence(student: Any, teacher: Any) -> float:
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        log_p, log_q = (model(input_ids=tokens).logits.log_softmax(-1) for model in (teacher, student))
    return float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")) / tokens.numel()
