"""Objectives: against transformers' own loss and plain formulas, on every architecture and with an adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch, LossSum
from pipeline.distillation.correction import LoraSettings, add_lora
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.objectives import (
    LossSettings,
    Objective,
    next_token_objective,
    signal_objective,
    text_objective,
)
from pipeline.distillation.signals import OnlineSource, SparseSignal
from tests.pipeline.conftest import CLASSES, VOCABULARY, MakeModel

_RANDOM = np.random.default_rng(4)
TOKENS = torch.from_numpy(_RANDOM.integers(0, VOCABULARY, (3, 12)))
COUNTS = torch.from_numpy(_RANDOM.random((3, 12)) < 0.4)
BATCH = Batch(np.arange(3), TOKENS, COUNTS)


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize("objective", [text_objective(chunk_tokens=5), next_token_objective])
def test_cross_entropy_is_that_of_transformers(make_model: MakeModel, architecture: str, objective: Objective) -> None:
    model, reference = (make_model(architecture, num_hidden_layers=1) for _ in range(2))
    labels = TOKENS.clone()
    labels[:, 1:][~COUNTS[:, :-1]] = -100  # transformers' label belongs to the position before it
    loss = objective(model, BATCH)
    assert float(loss.weight) == int(COUNTS[:, :-1].sum()), "the last position has no token after it"
    _same_mean_and_gradients(model, loss, reference, reference(input_ids=TOKENS, labels=labels).loss)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_kl_of_counted_positions(make_model: MakeModel, tied: bool) -> None:
    model, reference = (make_model(num_hidden_layers=1, tie_word_embeddings=tied) for _ in range(2))
    teacher = make_model(num_hidden_layers=2)
    objective = signal_objective(OnlineSource.open(teacher, bf16=False), LossSettings(LossKind.FORWARD_KL))
    loss = objective(model, BATCH)
    with torch.no_grad():
        log_p = teacher(input_ids=TOKENS).logits.log_softmax(-1)
    log_q = reference(input_ids=TOKENS).logits.log_softmax(-1)
    expected = functional.kl_div(log_q[COUNTS], log_p[COUNTS], log_target=True, reduction="batchmean")
    assert float(loss.weight) == int(COUNTS.sum()), "the last position is learned too: the teacher knows what follows"
    _same_mean_and_gradients(model, loss, reference, expected)


def test_draws_of_a_batch_are_learned(make_model: MakeModel) -> None:
    model, reference = (make_model(num_hidden_layers=1) for _ in range(2))
    ids = torch.from_numpy(np.stack([_RANDOM.permutation(VOCABULARY)[:4] for _ in range(36)]).reshape(3, 12, 4))
    weights = torch.rand(3, 12, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)

    class Source:
        def signal(self, batch: Batch) -> SparseSignal:
            assert batch is BATCH
            return SparseSignal(ids, weights)

    loss = signal_objective(Source(), LossSettings(LossKind.SAMPLED_KL, chunk_tokens=7))(model, BATCH)
    log_q = reference(input_ids=TOKENS).logits.log_softmax(-1)
    expected = -(weights * log_q.gather(-1, ids)).sum(-1)[COUNTS].mean()
    _same_mean_and_gradients(model, loss, reference, expected)


def test_settings_reach_the_loss(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=1)
    source = OnlineSource.open(make_model(num_hidden_layers=2), bf16=False)
    kinds = [
        LossSettings(LossKind.JSD, beta=0.2), LossSettings(LossKind.JSD, beta=0.7),
        LossSettings(LossKind.JSD, beta=0.2, temperature=2.0), LossSettings(LossKind.SKEW_REVERSE_KL, skew=0.1),
        LossSettings(LossKind.SKEW_REVERSE_KL, skew=0.4),
    ]  # fmt: skip
    totals = [float(signal_objective(source, kind)(model, BATCH).total.detach()) for kind in kinds]
    assert len({round(total, 3) for total in totals}) == len(kinds)


def test_an_adapter_takes_part(make_model: MakeModel) -> None:
    model = add_lora(make_model(num_hidden_layers=1), LoraSettings(rank=2, alpha=4, targets=("q_proj", "down_proj")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    fused, plain = text_objective()(model, BATCH), next_token_objective(model, BATCH)
    torch.testing.assert_close(fused.total, plain.total, rtol=2e-6, atol=0)
    gradients = [torch.autograd.grad(loss.total, _trained(model)) for loss in (fused, plain)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_head_is_refused_where_it_would_be_left_out(make_model: MakeModel) -> None:
    model = add_lora(
        make_model(num_hidden_layers=1, tie_word_embeddings=False), LoraSettings(rank=2, alpha=4, targets=("lm_head",))
    )
    with pytest.raises(UserError, match="leave lm_head out"):
        text_objective()(model, BATCH)


def _same_mean_and_gradients(model: Any, loss: LossSum, reference: Any, expected: torch.Tensor) -> None:
    mean = loss.total / loss.weight
    torch.testing.assert_close(mean, expected, rtol=2e-6, atol=0)
    mean.backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=0, atol=5e-6 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
