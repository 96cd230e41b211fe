"""Recovery and its interval: scipy as the oracle, coverage by simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.recovery import Bounds, compare, mcnemar_p

BOUNDS = Bounds(items_min=100, above_chance_min=0.2, confidence=0.95, resamples=1000, seed=3)


def answers(
    rng: np.random.Generator, documents: int, items: int, known: float, lost: float, gained: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paired answers whose documents are of different difficulty for both models: (reference, found, clusters)."""
    difficulty = np.repeat(rng.uniform(-0.25, 0.25, documents), items)
    reference = rng.random(documents * items) < known + difficulty
    found = np.where(reference, rng.random(len(reference)) >= lost, rng.random(len(reference)) < gained)
    return reference, found, np.repeat(np.arange(documents), items)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 7), (12, 5), (5, 12), (40, 40), (300, 241), (2, 900)])
def test_mcnemar_is_scipys_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-12)


def test_figures_are_counted_from_the_pairs() -> None:
    reference = np.array([True] * 80 + [False] * 20)
    found = np.array([True] * 70 + [False] * 10 + [True] * 4 + [False] * 16)
    result = compare(reference, found, np.arange(100), 0.25, BOUNDS)
    assert (result.lost, result.gained) == (10, 4)
    assert result.accuracy_reference == pytest.approx(0.80) and result.accuracy == pytest.approx(0.74)
    assert result.recovery == pytest.approx((0.74 - 0.25) / (0.80 - 0.25))
    assert result.low is not None and result.high is not None and result.low < result.recovery < result.high
    assert result.decidable and result.mcnemar_p == pytest.approx(stats.binomtest(4, 14).pvalue)


def test_without_documents_in_common_the_interval_is_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    reference, found, _ = answers(rng, 600, 1, 0.7, 0.06, 0.06)

    def recovery(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray((other.mean(axis=axis) - 0.25) / (one.mean(axis=axis) - 0.25))

    expected = stats.bootstrap(
        (reference, found), recovery, paired=True, vectorized=True, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    result = compare(reference, found, np.arange(600), 0.25, replace(BOUNDS, resamples=4000))
    # Two runs of a bootstrap: a quantile of 4,000 draws has a standard error of 4 % of the interval's half width.
    tolerance = 0.15 * (expected.high - expected.low) / 2
    assert result.low == pytest.approx(expected.low, abs=tolerance)
    assert result.high == pytest.approx(expected.high, abs=tolerance)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Documents of different difficulty and 12 items each; 400 trials: 0.95 within three binomial errors."""
    rng, covered, low_misses, trials = np.random.default_rng(5), 0, 0, 400
    known, lost, gained, chance = 0.7, 0.08, 0.1, 0.25
    truth = (known * (1 - lost) + (1 - known) * gained - chance) / (known - chance)
    for seed in range(trials):
        reference, found, clusters = answers(rng, 120, 12, known, lost, gained)
        result = compare(reference, found, clusters, chance, replace(BOUNDS, resamples=500, seed=seed))
        assert result.low is not None and result.high is not None
        covered += result.low <= truth <= result.high
        low_misses += truth < result.low
    error = (0.05 * 0.95 / trials) ** 0.5
    assert abs(covered / trials - 0.95) < 3 * error
    assert low_misses / trials < 0.025 + 3 * (0.025 * 0.975 / trials) ** 0.5


def test_documents_are_resampled_whole() -> None:
    """Ten copies of each item say no more than one, and the interval must not become narrower."""
    rng = np.random.default_rng(2)
    reference, found, clusters = answers(rng, 200, 1, 0.7, 0.1, 0.1)
    once = compare(reference, found, clusters, 0.25, BOUNDS)
    copies = compare(*(np.repeat(each, 10) for each in (reference, found, clusters)), 0.25, BOUNDS)
    assert (copies.low, copies.high, copies.recovery) == pytest.approx((once.low, once.high, once.recovery))


def test_the_same_seed_gives_the_same_interval_and_another_one_moves_it() -> None:
    data = answers(np.random.default_rng(4), 100, 5, 0.7, 0.1, 0.1)
    first, again, other = (compare(*data, 0.25, replace(BOUNDS, seed=seed)) for seed in (1, 1, 2))
    assert first == again and first.low != other.low


def test_the_interval_does_not_depend_on_how_many_draws_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = answers(np.random.default_rng(4), 100, 5, 0.7, 0.1, 0.1)
    whole = compare(*data, 0.25, BOUNDS)
    monkeypatch.setattr("pipeline.evaluation.recovery._BLOCK", 700)
    assert compare(*data, 0.25, BOUNDS) == whole


def test_what_fp_hardly_knows_or_too_few_answered_decides_nothing() -> None:
    rng = np.random.default_rng(6)
    reference, found, clusters = answers(rng, 100, 4, 0.7, 0.0, 0.0)
    assert compare(reference, found, clusters, 0.25, BOUNDS).decidable
    assert not compare(reference, found, clusters, 0.25, replace(BOUNDS, items_min=401)).decidable
    assert not compare(reference, found, clusters, 0.6, BOUNDS).decidable
    guessing = compare(~reference, found, clusters, 0.5, BOUNDS)
    assert guessing.recovery is None and guessing.low is None and not guessing.decidable
    with pytest.raises(ValueError, match="no items"):
        compare(reference[:0], found[:0], clusters[:0], 0.25, BOUNDS)


def test_resamples_in_which_fp_knows_nothing_count_as_nothing_kept() -> None:
    """Six documents, one of which holds all that fp knows: some resamples lack it, and the lower end is open."""
    reference = np.array([True, True] + [False] * 10)
    result = compare(
        reference, reference, np.repeat(np.arange(6), 2), 0.1, replace(BOUNDS, items_min=1, above_chance_min=0)
    )
    assert result.recovery == 1.0 and result.low is None and not result.decidable
