"""Epsilon against dp-accounting's values, exact Gaussian trade-offs and numerical divergences; noise as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.privacy import (
    ORDERS,
    Accountant,
    Sampling,
    central_noise,
    epsilon,
    masked_multiplier,
    noise_per_device,
)

stats = pytest.importorskip("scipy.stats")
integrate = pytest.importorskip("scipy.integrate")

# dp-accounting 0.6.0, RdpAccountant with our ORDERS and ADD_OR_REMOVE_ONE:
# PoissonSampledDpEvent(rate, GaussianDpEvent(multiplier)) composed so many times.
POISSON = [
    ((1.0, 1.0, 10, 1e-5), 19.801691480042894),
    ((1.0, 4.0, 100, 1e-6), 15.32798402653992),
    ((0.01, 1.0, 1000, 1e-5), 2.1077530754515745),
    ((0.1, 1.0, 100, 1e-5), 7.972921510380539),
    ((0.25, 2.0, 60, 1e-5), 5.418611341380915),
    ((0.05, 0.7, 200, 1e-6), 15.749939875945365),
    ((0.001, 0.8, 10000, 1e-7), 2.049063613477495),
]
# The same with REPLACE_ONE and SampledWithoutReplacementDpEvent(10000, 10000 rate, GaussianDpEvent(multiplier / 2)):
# theirs counts noise over the sensitivity 2C. The last column: how much looser ours may be.
FIXED = [
    ((0.01, 2.0, 1000, 1e-5), 3.576111482350549, 1e-12),
    ((0.05, 1.4, 200, 1e-6), 19.981694154727734, 1e-12),
    ((0.001, 1.6, 10000, 1e-7), 2.3081623134614766, 1e-12),
    ((0.1, 4.0, 100, 1e-5), 5.3790096960759, 0.09),
    ((0.25, 4.0, 60, 1e-5), 11.285020180703224, 0.09),
]
# GaussianDpEvent(multiplier), orders 1 + geomspace(1e-3, 1e5, 4000).
GAUSSIAN = [
    ((1.0, 1, 1e-5), 4.728388291031118),
    ((1.0, 10, 1e-5), 19.047277039970137),
    ((4.0, 100, 1e-6), 15.327530411391226),
    ((0.5, 3, 1e-3), 17.51966046342002),
    ((10.0, 1, 1e-6), 0.4299422523058537),
]


@pytest.mark.parametrize(("case", "expected"), POISSON)
def test_poisson_sampling_agrees_with_dp_accounting(case: tuple[float, float, int, float], expected: float) -> None:
    rate, multiplier, rounds, delta = case
    assert epsilon(rounds, rate, multiplier, delta, Sampling.POISSON) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("case", "expected", "looser"), FIXED)
def test_fixed_cohorts_are_bounded_as_by_dp_accounting(
    case: tuple[float, float, int, float], expected: float, looser: float
) -> None:
    rate, multiplier, rounds, delta = case
    found = epsilon(rounds, rate, multiplier, delta)
    assert expected * (1 - 1e-12) <= found <= expected * (1 + looser)


@pytest.mark.parametrize(("case", "expected"), GAUSSIAN)
def test_the_plain_gaussian_agrees_with_dp_accounting(case: tuple[float, int, float], expected: float) -> None:
    multiplier, rounds, delta = case
    assert epsilon(rounds, 0.3, multiplier, delta, Sampling.NONE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("case", "expected"), GAUSSIAN)
def test_epsilon_is_never_below_the_exact_trade_off(case: tuple[float, int, float], expected: float) -> None:
    """Balle and Wang 2018, theorem 5: the exact delta of a Gaussian; rounds add up to one of less noise."""
    multiplier, rounds, delta = case
    found = epsilon(rounds, 1.0, multiplier, delta, Sampling.NONE)
    shift = math.sqrt(rounds) / multiplier

    def exact_delta(at: float) -> float:
        lower = stats.norm.logcdf(-at / shift - shift / 2) + at
        return float(stats.norm.cdf(-at / shift + shift / 2) - math.exp(lower))

    assert exact_delta(found) <= delta
    assert exact_delta(0.6 * found) > delta  # and not uselessly above it


@pytest.mark.parametrize("order", [2, 3, 8, 32])
@pytest.mark.parametrize(("rate", "multiplier"), [(0.02, 1.0), (0.2, 2.0), (0.5, 4.0)])
def test_divergences_against_numerical_integration(order: int, rate: float, multiplier: float) -> None:
    def divergence(of: float, by: float) -> float:
        """Rényi divergence of the sampled Gaussian moved by ``of`` from the one moved by ``by``."""

        def log_density(x: float, move: float) -> float:
            logs = stats.norm.logpdf(x, [0.0, move], multiplier)
            return float(np.logaddexp(math.log1p(-rate) + logs[0], math.log(rate) + logs[1]))

        def integrand(x: float) -> float:
            return math.exp(order * log_density(x, of) - (order - 1) * log_density(x, by))

        reach = order + 12 * multiplier
        total, _ = integrate.quad(integrand, -reach, reach, limit=400, epsabs=0, epsrel=1e-10, points=[0.0, order])
        return math.log(total) / (order - 1)

    place = ORDERS.index(order)
    for sampling, exact, equal in (
        (Sampling.POISSON, divergence(1.0, 0.0), True),
        (Sampling.FIXED, divergence(1.0, -1.0), False),
    ):
        accountant = Accountant(1e-5, sampling)
        accountant.compose(multiplier, (), rate)
        found = accountant.state()["divergences"][place]  # type: ignore[index]
        assert found == pytest.approx(exact, rel=1e-6) if equal else found >= exact


def test_each_device_pays_for_its_own_rounds() -> None:
    accountant = Accountant(1e-5)
    assert accountant.epsilon() == 0.0
    for number in range(12):
        accountant.compose(2.0, ("ann", "bob") if number % 3 == 0 else ("ann", "cid"))
    assert accountant.epsilon() == epsilon(12, 1.0, 2.0, 1e-5, Sampling.NONE)
    accountant.compose(2.0, ("bob",))
    assert accountant.epsilon() == epsilon(12, 1.0, 2.0, 1e-5, Sampling.NONE)
    accountant.compose(0.5, ("bob",))  # 5 rounds at 2.0 and one at 0.5 cost as much as 21 at 2.0
    assert accountant.epsilon() == epsilon(21, 1.0, 2.0, 1e-5, Sampling.NONE)


@pytest.mark.parametrize("sampling", Sampling)
def test_epsilon_grows_with_rounds_and_shrinks_with_noise(sampling: Sampling) -> None:
    by_rounds = [epsilon(rounds, 0.2, 1.5, 1e-5, sampling) for rounds in (1, 5, 25, 125)]
    by_noise = [epsilon(20, 0.2, multiplier, 1e-5, sampling) for multiplier in (0.5, 1.0, 2.0, 8.0)]
    assert by_rounds == sorted(by_rounds) and by_noise == sorted(by_noise, reverse=True)
    assert epsilon(20, 0.2, 1e9, 1e-5, sampling) < 1e-3 or sampling is not Sampling.NONE


@pytest.mark.parametrize("sampling", Sampling)
def test_an_accountant_continues_from_its_state(sampling: Sampling) -> None:
    straight, first, second = (Accountant(1e-6, sampling) for _ in range(3))
    for accountant in (straight, first):
        accountant.compose(1.1, ("ann",), 0.1, 7)
    second.load_state(first.state())
    for accountant in (straight, second):
        accountant.compose(0.9, ("ann", "bob"), 0.2)
    assert second.epsilon() == straight.epsilon()
    assert second.state() == straight.state()
    with pytest.raises(ValueError, match="state"):
        second.load_state({"slopes": {}, "divergences": [0.0]})


@pytest.mark.parametrize(
    ("rate", "multiplier", "delta"), [(0.0, 1, 0.1), (1.1, 1, 0.1), (0.5, 0, 0.1), (0.5, 1, 0), (0.5, 1, 1)]
)
def test_misuse_is_an_exception(rate: float, multiplier: float, delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta|multiplier"):
        epsilon(1, rate, multiplier, delta)


def test_central_noise_is_gaussian_and_repeats_for_the_same_sum_only() -> None:
    noise = central_noise(50_001, 0.25, b"k" * 32, b"round 3")
    assert noise.shape == (50_001,)
    assert np.array_equal(noise, central_noise(50_001, 0.25, b"k" * 32, b"round 3"))
    assert stats.kstest(noise / 0.25, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:25_000], noise[25_001:])[0, 1]) < 4 / math.sqrt(25_000)
    for other in (
        central_noise(50_001, 0.25, b"l" * 32, b"round 3"),
        central_noise(50_001, 0.25, b"k" * 32, b"round 4"),
    ):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 4 / math.sqrt(50_001)


def test_shares_of_noise_add_up() -> None:
    assert noise_per_device(3.0, 9) == 1.0
    assert masked_multiplier(1.0, 2.0, (9,), (0.25,), (1,)) == pytest.approx(3.0 / (2.0 + 0.125), rel=1e-12)


def test_the_segment_with_the_fewest_devices_decides() -> None:
    few = masked_multiplier(1.0, 2.0, (9, 4, 0), (1e-9, 1e-9, 1e-9), (100, 100, 100))
    assert few == pytest.approx(1.0, rel=1e-6)


def test_rounding_counts_as_a_longer_update() -> None:
    coarse = masked_multiplier(1.0, 2.0, (4,), (0.1,), (400,))
    assert coarse == pytest.approx(2.0 / (2.0 + 0.5 * 0.1 * 20), rel=1e-9)


def test_noise_under_a_code_is_hardly_gaussian_and_costs() -> None:
    """The excess of theorem 1 in Kairouz et al. for two devices: 10 exp(-pi^2 std^2) sqrt(values)."""
    for codes in (0.5, 1.0):
        found = masked_multiplier(codes, 2.0, (2,), (1.0,), (1,))
        excess = 10 * math.exp(-(math.pi**2) * codes**2)
        assert 1 / found == pytest.approx(2.5 / (codes * math.sqrt(2)) + excess, rel=1e-12)


@pytest.mark.parametrize(("std", "clip", "count"), [(0.0, 1.0, 3), (1.0, 0.0, 3), (1.0, 1.0, 0)])
def test_without_noise_clipping_or_a_sum_there_is_no_guarantee(std: float, clip: float, count: int) -> None:
    with pytest.raises(ValueError, match="no"):
        masked_multiplier(std, clip, (count,), (0.1,), (5,))
