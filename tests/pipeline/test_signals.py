"""Draws from the teacher's distribution, and what the sources give of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import stats

from pipeline.distillation.signals import DenseSignal, OnlineSource, SparseSignal, StoredSource, draw
from tests.pipeline.conftest import VOCABULARY, MakeModel

DRAWS = 50_000


def test_draws_follow_the_softmax() -> None:
    """Chi-square of four distributions, uniform to sharp; a sampler off by one token or by one percent fails."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 40, generator=generator) * torch.tensor([0.0, 1.0, 2.0, 3.0]).view(2, 2, 1)
    ids = draw(logits, DRAWS, generator)
    assert ids.shape == (2, 2, DRAWS) and ids.dtype == torch.int64
    probabilities = torch.softmax(logits.double(), dim=-1).reshape(4, -1).numpy()
    for expected, found in zip(probabilities, ids.reshape(4, -1), strict=True):
        counts = np.bincount(found.numpy(), minlength=40)
        large = expected * DRAWS > 8  # the rare ones together
        observed = np.append(counts[large], counts[~large].sum())
        wanted = np.append(expected[large], expected[~large].sum()) * DRAWS
        observed, wanted = observed[wanted > 0], wanted[wanted > 0]
        assert stats.chisquare(observed, wanted).pvalue > 0.01


def test_draws_within_a_position_are_independent() -> None:
    """The number of draws that hit a token of probability p in D draws is binomial: variance D p (1 - p)."""
    generator = torch.Generator().manual_seed(2)
    hits = (draw(torch.tensor([0.0, 1.0]).log_softmax(0).expand(1, 20_000, 2), 16, generator) == 1).sum(-1).double()
    p = 1 / (1 + np.exp(-1))
    variance = 16 * p * (1 - p)
    assert abs(float(hits.mean()) - 16 * p) < 4 * np.sqrt(variance / 20_000)
    assert abs(float(hits.var()) / variance - 1) < 4 * np.sqrt(2 / 20_000)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((1, 5000, 6), -torch.inf)
    logits[..., 2] = 0.0
    logits[..., 4] = 3.0
    assert set(draw(logits, 8, torch.Generator().manual_seed(0)).unique().tolist()) == {2, 4}


def test_the_same_generator_draws_the_same() -> None:
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    first, second, other = (draw(logits, 6, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_stored_draws_are_those_of_the_rows_asked_for(tmp_path: Path) -> None:
    draws = np.arange(5 * 3 * 2, dtype=np.uint16).reshape(5, 3, 2)
    np.save(tmp_path / "draws.npy", draws)
    rows = np.array([4, 0, 4])
    signal = StoredSource.open(tmp_path / "draws.npy").signal(rows, torch.zeros(3, 3))
    assert isinstance(signal, SparseSignal) and signal.ids.dtype == torch.int64
    assert signal.ids.tolist() == draws[rows].tolist()


def test_the_online_source_gives_the_teachers_own_log_probabilities(make_model: MakeModel) -> None:
    teacher = make_model("llama")
    tokens = torch.arange(24).reshape(2, 12) % VOCABULARY
    signal = OnlineSource(teacher).signal(np.arange(2), tokens)
    assert isinstance(signal, DenseSignal) and not signal.log_probs.requires_grad
    expected = torch.nn.functional.log_softmax(teacher(input_ids=tokens).logits, dim=-1)
    assert torch.equal(signal.log_probs, expected.detach())
