"""What noise buys: epsilon by Rényi differential privacy, central noise, and what each device's share must be.

The guarantee is for one device: all of its text, in every round it took part in. It holds for what leaves the sum,
that is the adapter. Losses, counts and timings in the headers are outside it.

Three ways to count, from the safest:

* ``none``: whoever is in a round is known. Each device pays the plain Gaussian mechanism for its own rounds, and
  the dearest device is reported. Neighbours: a device's updates, or zeros in their place; one moves the sum by the
  clipping norm C. It needs nothing of how cohorts are drawn, except that it does not follow from the data. This
  is what a federation records: devices can compute the draw, and only those that are ready are drawn.
* ``fixed``: cohorts of a fixed size, drawn without replacement, uniformly and unseen, from a population that
  stays. Neighbours: one device's text replaced by any other; that moves the sum by 2C (Wang, Balle,
  Kasiviswanathan 2019, theorem 9; ``dp-accounting`` sharpens it, by up to a tenth where a lot of noise meets rates
  of 0.1 and more).
* ``poisson``: every device tosses its own unseen coin. Neighbours: one device more or less, by C (Mironov, Talwar,
  Zhang 2019). No federation here draws so; it is for comparison with what others publish.

``dp-accounting`` 0.6 wants attrs below 24, beside which the pipeline's libraries cannot be installed; tests compare
with values computed by it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray


class Sampling(StrEnum):
    """How cohorts are drawn, as far as the bound relies on it."""

    NONE = "none"
    FIXED = "fixed"
    POISSON = "poisson"


# Whole orders are where the bounds for samples are closed sums.
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256)
# The plain Gaussian's divergence is known at every order.
_FINE_ORDERS = 1.0 + np.geomspace(1e-3, 1e5, 4000)


def epsilon(
    rounds: int, sampling_rate: float, noise_multiplier: float, delta: float, sampling: Sampling = Sampling.FIXED
) -> float:
    """Epsilon after so many equal rounds.

    Args:
        rounds: In which the device could be drawn; for ``none``, in which it was.
        sampling_rate: Cohort over population, in (0, 1]; ``none`` ignores it.
        noise_multiplier: Standard deviation of the noise on the sum over the clipping norm C, for every sampling.
        delta: Of the guarantee; below one over the number of devices to mean anything.
        sampling: What the bound may rely on.

    Raises:
        ValueError: A rate, multiplier or delta out of range.
    """
    accountant = Accountant(delta, sampling)
    accountant.compose(noise_multiplier, ("",), sampling_rate, rounds)
    return accountant.epsilon()


class Accountant:
    """Privacy spent so far.

    Args:
        delta: Of the guarantee.
        sampling: What the bound may rely on.
    """

    def __init__(self, delta: float, sampling: Sampling = Sampling.NONE) -> None:
        if not 0 < delta < 1:
            raise ValueError(f"delta {delta:g} is not in (0, 1)")
        self._delta, self._sampling = delta, sampling
        self._slopes: dict[str, float] = {}  # by device: its divergence at order a is a times this
        self._divergences = np.zeros(len(ORDERS))

    def compose(
        self, noise_multiplier: float, devices: Collection[str], sampling_rate: float = 1.0, rounds: int = 1
    ) -> None:
        """Add rounds whose sum was released.

        Args:
            noise_multiplier: Standard deviation of the noise on the sum over the clipping norm C.
            devices: Whose updates were in the sum; only ``none`` tells them apart.
            sampling_rate: Cohort over population.
            rounds: So many equal ones.

        Raises:
            ValueError: A rate or multiplier out of range.
        """
        if not (noise_multiplier > 0 and 0 < sampling_rate <= 1):
            raise ValueError(f"noise multiplier {noise_multiplier:g}, sampling rate {sampling_rate:g}")
        if self._sampling is Sampling.NONE:
            for device in devices:
                self._slopes[device] = self._slopes.get(device, 0.0) + rounds / (2 * noise_multiplier**2)
        else:
            bound = _fixed if self._sampling is Sampling.FIXED else _poisson
            self._divergences += rounds * np.array([bound(order, sampling_rate, noise_multiplier) for order in ORDERS])

    def epsilon(self) -> float:
        """Epsilon of what was composed, for the device that paid most; 0 when nothing was."""
        if self._sampling is not Sampling.NONE:
            return _to_epsilon(np.array(ORDERS, np.float64), self._divergences, self._delta)
        slope = max(self._slopes.values(), default=0.0)
        return _to_epsilon(_FINE_ORDERS, _FINE_ORDERS * slope, self._delta)

    def state(self) -> dict[str, object]:
        """Plain JSON values for a checkpoint."""
        return {"slopes": dict(self._slopes), "divergences": self._divergences.tolist()}

    def load_state(self, state: Mapping[str, object]) -> None:
        """Continue where ``state()`` was taken.

        Raises:
            ValueError: Not such a state.
        """
        slopes, divergences = state.get("slopes"), state.get("divergences")
        if not isinstance(slopes, Mapping) or not isinstance(divergences, list) or len(divergences) != len(ORDERS):
            raise ValueError("not an accountant's state")
        self._slopes = {str(name): float(value) for name, value in slopes.items()}
        self._divergences = np.array(divergences, np.float64)


def central_noise(count: int, std: float, key: bytes, context: bytes) -> NDArray[np.float64]:
    """Gaussian noise (count,) for the server to add: the same for the same key and context.

    A round that is computed again after a crash gets the same noise, which is no second release. Another sum must
    never be published with it, so the context names the round and exactly whose updates are in the sum.

    Args:
        count: How many values.
        std: Standard deviation.
        key: 32 secret bytes of this federation.
        context: What the noise is for.
    """
    derived = HKDF(SHA256(), 16, salt=None, info=b"sevenfold noise v1\x00" + context).derive(key)
    pairs = -(-count // 2)
    raw = Cipher(AES(derived), CTR(bytes(16))).encryptor().update(bytes(16 * pairs))
    uniform = ((np.frombuffer(raw, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    radius = np.sqrt(-2.0 * np.log(uniform[:pairs])) * std
    angle = 2.0 * np.pi * uniform[pairs:]
    noise: NDArray[np.float64] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return noise


def noise_per_device(std: float, fewest: int) -> float:
    """Standard deviation of each device's share, so that ``fewest`` shares already make ``std`` in the sum."""
    return std / math.sqrt(fewest)


def masked_multiplier(
    noise_std: float, clip_norm: float, contributors: Sequence[int], scales: Sequence[float], sizes: Sequence[int]
) -> float:
    """The noise multiplier that a masked round with distributed noise really had.

    Rounding to codes may lengthen a clipped update by half a scale in every value. The segment with the fewest
    devices has the least noise, and the whole update may lie in it. A sum of discrete Gaussians is not quite one:
    Kairouz, Liu, Steinke 2021, theorem 1 bounds the difference, which is below 1e-12 from 2 codes of noise on.
    Noise of members that work with an adversary protects nobody: with a third of them multiply by sqrt(2/3).

    Args:
        noise_std: Of each device's share, in values.
        clip_norm: C.
        contributors: Devices in the sum, one a segment; 0: it was not opened.
        scales: What a code stands for, one a segment.
        sizes: Values, one a segment.

    Raises:
        ValueError: No noise, no clipping or no opened segment: there is no guarantee then.
    """
    opened = [
        (count, scale, size) for count, scale, size in zip(contributors, scales, sizes, strict=False) if count and size
    ]
    if not opened or noise_std <= 0 or clip_norm <= 0:
        raise ValueError("no segment was opened, or there was no noise or no clipping")
    fewest = min(count for count, _, _ in opened)
    rounding = 0.5 * math.sqrt(sum(size * scale**2 for _, scale, size in opened))
    values, codes = sum(size for _, _, size in opened), noise_std / max(scale for _, scale, _ in opened)
    most = max(count for count, _, _ in opened)
    excess = 10.0 * sum(math.exp(-2 * (math.pi * codes) ** 2 * k / (k + 1)) for k in range(1, most))
    cost = (clip_norm + rounding) / (noise_std * math.sqrt(fewest)) + excess * math.sqrt(values)
    return 1.0 / cost


def _poisson(order: int, rate: float, multiplier: float) -> float:
    """Rényi divergence of the Poisson-sampled Gaussian at a whole order (Mironov et al. 2019, section 3.3)."""
    if rate == 1.0:
        return order / (2 * multiplier**2)
    terms = [
        _log_binomial(order, k)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) / (2 * multiplier**2)
        for k in range(order + 1)
    ]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def _fixed(order: int, rate: float, multiplier: float) -> float:
    """Bound on the divergence when samples of fixed size are drawn without replacement (Wang et al. 2019)."""
    variance = (multiplier / 2) ** 2  # replacing one device moves the sum by twice the clipping norm
    plain = order / (2 * variance)
    if rate == 1.0:
        return plain
    second = 1 / variance  # the plain divergence at order 2
    least = min(math.log(4) + second + math.log(-math.expm1(-second)), math.log(2) + second)
    terms = [0.0, 2 * math.log(rate) + _log_binomial(order, 2) + least]
    for k in range(3, order + 1):
        terms.append(k * math.log(rate) + _log_binomial(order, k) + math.log(2) + k * (k - 1) / (2 * variance))
    return min(float(np.logaddexp.reduce(terms)) / (order - 1), plain)


def _to_epsilon(orders: NDArray[np.float64], divergences: NDArray[np.float64], delta: float) -> float:
    """The best conversion over the orders (Canonne, Kamath, Steinke 2020, proposition 12)."""
    if not divergences.any():
        return 0.0
    found = divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(float(found.min()), 0.0)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
