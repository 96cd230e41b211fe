"""Any t of n shares give the secret; t - 1 fit every secret equally well."""

from __future__ import annotations

from contextlib import suppress
from itertools import combinations

import numpy as np
import pytest

from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.secret_sharing import (
    PRIME,
    SHARE_BYTES,
    combine_shares,
    join_shares,
    lagrange_weights,
    read_share,
    share_secret,
)

SECRET = bytes(range(32))


def polynomial_through(points: dict[int, int], at: int) -> int:
    """Newton's divided differences modulo PRIME: another way than Lagrange's weights."""
    xs, column = list(points), [points[x] for x in points]
    coefficients = [column[0]]
    for order in range(1, len(xs)):
        column = [
            (column[i + 1] - column[i]) * pow(xs[i + order] - xs[i], -1, PRIME) % PRIME for i in range(len(column) - 1)
        ]
        coefficients.append(column[0])
    value = 0
    for coefficient, x in zip(reversed(coefficients), reversed(xs), strict=True):
        value = (value * (at - x) + coefficient) % PRIME
    return value


def test_the_field_is_one() -> None:
    sympy = pytest.importorskip("sympy")
    assert sympy.isprime(PRIME) and PRIME > 2**256
    assert PRIME.bit_length() <= 8 * SHARE_BYTES


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (3, 2), (5, 4), (6, 4)])
def test_any_threshold_of_shares_give_the_secret(count: int, threshold: int) -> None:
    shares = share_secret(SECRET, count, threshold, np.random.default_rng(0).bytes)
    assert all(len(share) == SHARE_BYTES for share in shares)
    for chosen in combinations(range(count), threshold):
        points = {place + 1: shares[place] for place in chosen}
        assert combine_shares(points) == SECRET
        assert polynomial_through({x: int.from_bytes(s, "big") for x, s in points.items()}, 0) == int.from_bytes(
            SECRET, "big"
        )


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_extreme_secrets(secret: bytes) -> None:
    shares = share_secret(secret, 3, 2, np.random.default_rng(0).bytes)
    assert combine_shares({1: shares[0], 3: shares[2]}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    shares = share_secret(SECRET, 5, 4, np.random.default_rng(3).bytes)
    known = {x: int.from_bytes(shares[x - 1], "big") for x in (1, 2, 5)}
    for guess in (0, 1, 2**255, int.from_bytes(SECRET, "big")):
        fourth = polynomial_through({0: guess, **known}, 3)
        points = {**{x: shares[x - 1] for x in known}, 3: fourth.to_bytes(SHARE_BYTES, "big")}
        assert combine_shares(points) == guess.to_bytes(32, "big")


def test_fewer_shares_are_distributed_alike_for_every_secret() -> None:
    stats = pytest.importorskip("scipy.stats")
    rows = []
    for seed, secret in enumerate((bytes(32), b"\xff" * 32)):
        random_bytes = np.random.default_rng(seed).bytes
        lows = [share_secret(secret, 3, 3, random_bytes)[1][-1] >> 4 for _ in range(3000)]
        rows.append(np.bincount(lows, minlength=16))
        assert stats.chisquare(rows[-1]).pvalue > 1e-3
    assert stats.chi2_contingency(rows).pvalue > 1e-3


def test_too_few_or_foreign_shares_do_not_give_it() -> None:
    shares = share_secret(SECRET, 5, 4, np.random.default_rng(4).bytes)
    other = share_secret(SECRET, 5, 4, np.random.default_rng(5).bytes)
    for points in ({1: shares[0], 2: shares[1], 3: shares[2]}, {1: shares[0], 2: shares[1], 3: shares[2], 4: other[3]}):
        with suppress(MessageError):  # a number that no secret has
            assert combine_shares(points) != SECRET


@pytest.mark.parametrize("raw", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_a_share_outside_the_field_is_refused(raw: bytes) -> None:
    with pytest.raises(MessageError, match="share"):
        read_share(raw)
    with pytest.raises(MessageError, match="share"):
        join_shares([raw], [1])


def test_misuse_is_an_exception() -> None:
    for wrong in ((SECRET[:-1], 3, 2), (SECRET, 3, 4), (SECRET, 3, 0)):
        with pytest.raises(ValueError, match="of"):
            share_secret(*wrong, bytes)
    for participants in ([1, 1], [0, 1], []):
        with pytest.raises(ValueError, match="different"):
            lagrange_weights(participants)
