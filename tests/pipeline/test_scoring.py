"""Perplexity and divergence over held-out sequences, against transformers and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.distillation.scoring import agreement, kl_from_draws, perplexity
from pipeline.distillation.signals import draw
from tests.pipeline.conftest import VOCABULARY, MakeModel


def test_perplexity_is_exp_of_transformers_loss(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    sequences = np.random.default_rng(1).integers(0, VOCABULARY, (5, 17)).astype(np.int32)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    with torch.no_grad():
        result = model(input_ids=tokens, labels=tokens)
    found = perplexity(iter(result.logits.numpy()), sequences)
    assert math.isclose(found, math.exp(float(result.loss)), rel_tol=2e-6)


def test_perplexity_of_no_knowledge_is_the_vocabulary() -> None:
    logits = np.zeros((3, 9, 50), np.float32) + 1e4  # a common offset changes nothing
    assert math.isclose(perplexity(logits, np.zeros((3, 9), np.int32)), 50, rel_tol=1e-12)


def test_agreement_is_torchs_kl_and_the_share_of_equal_maxima() -> None:
    generator = torch.Generator().manual_seed(4)
    p, q = (torch.randn(4, 10, 30, generator=generator) * 3 for _ in range(2))
    q[:, ::2] = p[:, ::2] * 0.9  # the same order
    q[:, 1::2, :2] += 100 * functional.one_hot((p[:, 1::2].argmax(-1) == 0).long(), 2)  # never the same maximum
    found = agreement(iter(p.numpy()), iter(q.numpy()))
    flat = (x.double().reshape(-1, 30).log_softmax(-1) for x in (q, p))
    assert math.isclose(found.kl, float(functional.kl_div(*flat, reduction="batchmean", log_target=True)), rel_tol=1e-9)
    assert found.top1 == 0.5
    same = agreement(p.numpy(), p.numpy())
    assert (same.kl, same.top1) == (0.0, 1.0)


def test_kl_from_draws_estimates_the_exact_kl() -> None:
    generator = torch.Generator().manual_seed(5)
    p = torch.randn(6, 8, 20, generator=generator)
    q = p + 0.3 * torch.randn(6, 8, 20, generator=generator)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    ids = draw(p, 2000, generator)
    found = kl_from_draws(iter(q.numpy()), ids.numpy().astype(np.uint16), log_p.gather(-1, ids).float().numpy())
    ratio = log_p - log_q
    exact = (log_p.exp() * ratio).sum(-1)
    variance = (log_p.exp() * ratio.square()).sum(-1) - exact.square()
    error = float(variance.sum().div(2000).sqrt()) / exact.numel()
    assert error < 0.03 * float(exact.mean()) and abs(found - float(exact.mean())) < 4 * error


def test_kl_from_draws_is_zero_for_the_teacher_itself() -> None:
    logits = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(6))
    ids = draw(logits, 16, torch.Generator().manual_seed(7))
    log_p = logits.double().log_softmax(-1).gather(-1, ids).float().numpy()
    assert abs(kl_from_draws(logits.numpy(), ids.numpy(), log_p)) < 1e-7


def test_one_sequence_too_few_is_refused() -> None:
    logits, tokens = np.zeros((2, 4, 5), np.float32), np.zeros((3, 4), np.int32)
    with pytest.raises(ValueError, match="longer"):
        perplexity(logits, tokens)
    with pytest.raises(ValueError, match="shorter"):
        agreement(np.zeros((3, 4, 5), np.float32), logits)
