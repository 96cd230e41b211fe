"""Probabilities are transformers'; draws are NumPy's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from edge_runtime.formats.errors import BackendError, UserError
from edge_runtime.request import SamplingParams
from edge_runtime.sampling import sample_token, sample_tokens, token_probabilities

LOGITS = np.random.default_rng(3).normal(0, 3, 511).astype(np.float32)


def warped(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """The oracle, in float64."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.top_k is not None:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 511, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-9])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    found, expected = token_probabilities(LOGITS, params), warped(LOGITS, params)
    assert np.array_equal(found > 0, expected > 0)
    assert np.abs(found - expected).max() < 1e-14


def test_a_nucleus_wider_than_the_first_candidates_is_still_exact() -> None:
    logits = np.random.default_rng(5).normal(0, 0.5, 20_000).astype(np.float32)
    params = SamplingParams(top_p=0.6)
    found, expected = token_probabilities(logits, params), warped(logits, params)
    assert 256 * 8 < np.count_nonzero(found) < 20_000
    assert np.array_equal(found > 0, expected > 0)
    assert np.abs(found - expected).max() < 1e-14


def test_equal_logits_at_the_edge_of_top_k_all_stay() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    params = SamplingParams(top_k=2)
    assert np.flatnonzero(token_probabilities(logits, params)).tolist() == [1, 2, 3, 4]
    assert np.array_equal(token_probabilities(logits, params) > 0, warped(logits, params) > 0)


def test_equal_probabilities_enter_the_nucleus_by_id() -> None:
    assert np.flatnonzero(token_probabilities(np.zeros(8, np.float32), SamplingParams(top_p=0.3))).tolist() == [0, 1, 2]
    logits = np.random.default_rng(2).integers(0, 3, 3000).astype(np.float32)
    params = SamplingParams(top_p=0.8)
    kept = np.flatnonzero(token_probabilities(logits, params)).tolist()
    assert (
        sorted(kept, key=lambda token: (-logits[token], token))
        == sorted(range(3000), key=lambda token: (-logits[token], token))[: len(kept)]
    )
    # The border runs through the middle group of equals.
    assert np.sum(logits == 2) < len(kept) < np.sum(logits >= 1)


def test_greedy_takes_the_lowest_of_the_largest_and_draws_nothing() -> None:
    logits = np.array([0, 5, 5, -np.inf], np.float32)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, top_k=3, top_p=0.1)
    assert {sample_token(logits, params, rng) for _ in range(5)} == {1}
    assert rng.random() == np.random.default_rng(0).random()
    assert token_probabilities(logits, params).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=2.0, top_k=50, top_p=0.9)])
def test_draws_are_numpys_own_choice(params: SamplingParams) -> None:
    ours, numpys = np.random.default_rng(11), np.random.default_rng(11)
    expected = warped(LOGITS, params)
    for _ in range(500):
        assert sample_token(LOGITS, params, ours) == numpys.choice(expected.size, p=expected)


@dataclass
class Fixed:
    """A generator that draws one number."""

    value: float

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.4999, 1), (0.5, 3), (math.nextafter(1.0, 0.0), 3)])
def test_a_draw_on_a_border_belongs_to_the_token_above_it(draw: float, token: int) -> None:
    logits = np.array([-np.inf, 1, -np.inf, 1, -np.inf], np.float32)
    assert sample_token(logits, SamplingParams(), Fixed(draw)) == token  # type: ignore[arg-type]


def test_the_largest_draw_is_always_inside() -> None:
    for seed in range(200):
        logits = np.random.default_rng(seed).normal(0, 9, 97).astype(np.float32)
        last = sample_token(logits, SamplingParams(), Fixed(math.nextafter(1.0, 0.0)))  # type: ignore[arg-type]
        assert token_probabilities(logits, SamplingParams())[last] > 0


def test_a_tiny_temperature_does_not_overflow() -> None:
    probabilities = token_probabilities(np.array([1e4, -1e4, 9e3], np.float32), SamplingParams(temperature=1e-300))
    assert probabilities.tolist() == [1, 0, 0]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (3, 97)).astype(np.float32)
    params = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.5)]
    batch = sample_tokens(logits, params, [np.random.default_rng(seed) for seed in range(3)])
    alone = [sample_token(logits[row], params[row], np.random.default_rng(row)) for row in range(3)]
    assert batch.tolist() == alone
    assert batch.dtype == np.int64
    with pytest.raises(ValueError, match="shorter"):
        sample_tokens(logits, params[:2], [np.random.default_rng(0)] * 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_broken_logits_are_refused(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[5] = bad
    with pytest.raises(BackendError, match="largest logit"):
        sample_token(logits, SamplingParams(temperature=temperature), np.random.default_rng(0))
    with pytest.raises(BackendError):
        sample_token(np.full(4, -np.inf, np.float32), SamplingParams(temperature=temperature), np.random.default_rng(0))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"stop": ("x" * 1001,)},
        {"stop": ("x",) * 17},
    ],
)
def test_parameters_out_of_bounds_are_named(values: dict[str, object]) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(values))
