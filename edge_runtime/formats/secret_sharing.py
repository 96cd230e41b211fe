"""Shamir's secret sharing: any t of n shares give the secret, t - 1 say nothing about it.

The share of participant x (1 to n) is the value at x of a polynomial of degree t - 1 over the integers modulo
PRIME whose constant term is the secret and whose other coefficients are uniform (Shamir 1979, "How to share a
secret"). Secrets have 32 bytes, shares 33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.masking import RandomBytes

PRIME = 2**256 + 297  # the first above every secret
SECRET_BYTES = 32
SHARE_BYTES = 33


def share_secret(secret: bytes, count: int, threshold: int, random_bytes: RandomBytes) -> list[bytes]:
    """The shares of participants 1 to ``count``.

    Args:
        secret: 32 bytes.
        count: Number of participants.
        threshold: Shares that give the secret back, 1 to ``count``.
        random_bytes: Gives so many unpredictable bytes.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"{len(secret)} bytes for {threshold} of {count}")
    coefficients = [_coefficient(random_bytes) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def lagrange_weights(participants: Sequence[int]) -> list[int]:
    """Factors of their shares whose weighted sum is the secret.

    Raises:
        ValueError: A participant is named twice, or is not at least 1.
    """
    if len(set(participants)) != len(participants) or min(participants, default=0) < 1:
        raise ValueError(f"participants must be different and at least 1: {list(participants)}")
    weights = []
    for own in participants:
        above = below = 1
        for other in participants:
            if other != own:
                above, below = above * other % PRIME, below * (other - own) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights


def join_shares(shares: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """The secret, from the shares of the participants that ``weights`` was made for.

    Raises:
        MessageError: The shares do not belong together.
    """
    secret = sum(read_share(share) * weight for share, weight in zip(shares, weights, strict=True)) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise MessageError("shares: they do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")


def combine_shares(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from the shares by participant.

    Raises:
        MessageError: The shares do not belong together.
    """
    participants = sorted(shares)
    return join_shares([shares[x] for x in participants], lagrange_weights(participants))


def read_share(raw: bytes) -> int:
    """A share's value.

    Raises:
        MessageError: Not 33 bytes that stand for a number below PRIME.
    """
    value = int.from_bytes(raw, "big")
    if len(raw) != SHARE_BYTES or value >= PRIME:
        raise MessageError("share: not a number of the field")
    return value


def _coefficient(random_bytes: RandomBytes) -> int:
    """Uniform below PRIME up to 2**-127: half as many bytes again as it has."""
    return int.from_bytes(random_bytes(48), "big") % PRIME
