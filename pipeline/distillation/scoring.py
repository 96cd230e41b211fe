"""How far one model's predictions are from another's, over held-out sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean KL in nats a position, and the share of positions with the same most likely token."""

    kl: float
    top1: float


def perplexity(logits: Iterable[FloatArray], sequences: NDArray[np.int32]) -> float:
    """exp of the mean loss of each token but a sequence's first; ``logits`` gives (T, V) a sequence."""
    losses = [
        -np.take_along_axis(_log_softmax(row[:-1]), tokens[1:, None].astype(np.int64), axis=1)
        for row, tokens in zip(logits, sequences, strict=True)
    ]
    return float(np.exp(np.mean(np.concatenate(losses))))


def agreement(reference: Iterable[FloatArray], logits: Iterable[FloatArray]) -> Agreement:
    """KL(reference || logits) and top-1 agreement, (T, V) a sequence from both."""
    divergences, matches = [], []
    for expected, found in zip(reference, logits, strict=True):
        log_p, log_q = _log_softmax(expected), _log_softmax(found)
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        matches.append(expected.argmax(axis=1) == found.argmax(axis=1))
    return Agreement(float(np.mean(np.concatenate(divergences))), float(np.mean(np.concatenate(matches))))


def kl_from_draws(logits: Iterable[FloatArray], draws: NDArray[np.integer], log_p: FloatArray) -> float:
    """KL(teacher || model) estimated without the teacher: the mean of ``log p - log q`` over its draws.

    Unbiased for any number of draws. Args: (T, V) logits a sequence; draws (S, T, D) and the
    teacher's log-probabilities of them.
    """
    ratios = [
        teacher - np.take_along_axis(_log_softmax(row), ids.astype(np.int64), axis=1)
        for row, ids, teacher in zip(logits, draws, log_p, strict=True)
    ]
    return float(np.mean(np.concatenate(ratios)))


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
