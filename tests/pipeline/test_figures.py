"""Figures of a stream of logits: torch as the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.distillation.scoring import HeldOut, agreement, perplexity
from pipeline.evaluation.figures import quality

S, T, V, D = 5, 300, 40, 6


@pytest.fixture(scope="module")
def case() -> tuple[HeldOut, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(S, T, V)).astype(np.float32) * 2
    found = expected + rng.normal(size=(S, T, V)).astype(np.float32) * 0.5
    draws = rng.integers(-1, V, (S, T, D))
    draws[0, 0] = -1
    held_out = HeldOut(
        rng.integers(0, V, (S, T)).astype(np.int32), rng.integers(1, 9, (S, T)).astype(np.int32), draws,
        rng.normal(-3, 1, (S, T, D)).astype(np.float32), rng.integers(-1, V, (S, T)).astype(np.int32),
    )  # fmt: skip
    return held_out, expected, found


def test_figures_are_torchs(case: tuple[HeldOut, np.ndarray, np.ndarray]) -> None:
    held_out, expected, found = case
    figures = quality(held_out, iter(expected), iter(found))
    log_p, log_q = (torch.from_numpy(each).double().log_softmax(-1) for each in (expected, found))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).flatten()
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(found[:, :-1]).double().flatten(0, 1),
        torch.from_numpy(held_out.tokens[:, 1:]).long().flatten(), reduction="none",
    ).view(S, T - 1).mean(1)  # fmt: skip
    assert figures["kl_to_fp"] == pytest.approx(kl.mean().item(), abs=1e-6)
    assert figures["kl_to_fp_p99"] == pytest.approx(kl.quantile(0.99).item(), abs=1e-6)
    assert figures["top1_to_fp"] == pytest.approx(
        (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(), abs=1e-6
    )
    assert figures["perplexity"] == pytest.approx(loss.mean().exp().item(), abs=1e-4)
    assert figures["perplexity_se"] == pytest.approx((loss.mean().exp() * loss.std() / S**0.5).item(), abs=1e-4)
    assert figures["perplexity"] == pytest.approx(perplexity(found, held_out.tokens), abs=1e-4)
    assert figures["kl_to_fp"] == pytest.approx(agreement(expected, found).kl, abs=1e-6)
    assert figures["kl_to_teacher"] == pytest.approx(held_out.kl(found), abs=1e-6)
    assert figures["top1_to_teacher"] == pytest.approx(held_out.top1_share(found.argmax(-1)), abs=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(held_out.bits_per_byte(loss.mean().exp().item()), abs=1e-4)


def test_a_standard_error_is_the_spread_of_perplexities(case: tuple[HeldOut, np.ndarray, np.ndarray]) -> None:
    """400 sets of 30 sequences drawn anew: their perplexities spread as one set's error says."""
    rng = np.random.default_rng(1)
    spreads, errors = [], []
    for _ in range(400):
        logits = rng.normal(size=(30, 4, 6)).astype(np.float32)
        tokens = rng.integers(0, 6, (30, 4)).astype(np.int32)
        figures = quality(HeldOut(tokens, np.ones_like(tokens), None, None, None), logits, logits)
        spreads.append(figures["perplexity"])
        errors.append(figures["perplexity_se"])
    assert np.mean(errors) == pytest.approx(np.std(spreads), rel=0.15)


def test_what_the_teacher_did_not_say_is_none(case: tuple[HeldOut, np.ndarray, np.ndarray]) -> None:
    held_out, expected, found = case
    alone = replace(held_out, draws=None, log_p=None, top1=None)
    figures = quality(alone, expected, found)
    assert figures["kl_to_teacher"] is None and figures["top1_to_teacher"] is None
    one = HeldOut(held_out.tokens[:1], held_out.text_bytes[:1], None, None, None)
    assert quality(one, expected[:1], found[:1])["perplexity_se"] is None
