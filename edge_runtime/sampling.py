"""Logits to token ids.

Exact semantics, in this order (the order and the tie rules of transformers' logits warpers):

1. ``logits / temperature``; temperature 0 means the largest logit, the lowest id among equals, and nothing below.
2. top_k: keep the tokens whose logit is not below the k-th largest (ties with it stay).
3. softmax in float64 over what is left.
4. top_p: walk from the most probable token down (equals: lowest id first) and keep a token while the
   probability before it is below top_p; the first is always kept. Then renormalise.
5. Draw: one uniform number per token, inverted through the cumulative sum in order of id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import BackendError
from edge_runtime.request import SamplingParams

# Tokens looked at first when a nucleus is searched; it grows until the nucleus fits.
_FIRST_CANDIDATES = 256


def sample_token(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """Choose one id from (V,) logits; greedy choices leave ``rng`` untouched.

    Raises:
        BackendError: A logit is not a number or +inf, or none is finite.
    """
    if params.temperature == 0:
        _check(logits)
        return int(np.argmax(logits))
    kept, probabilities = _kept_probabilities(logits, params)
    cumulative = np.cumsum(probabilities)
    # A draw is below 1, and its product with the total rounds to less than the total: some entry exceeds it.
    return int(kept[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def sample_tokens(
    logits: NDArray[np.float32], params: Sequence[SamplingParams], rngs: Sequence[np.random.Generator]
) -> NDArray[np.int64]:
    """Choose (B,) ids from (B, V) logits, each row with its own parameters and generator.

    A row's ids do not depend on what shares its batch.

    Raises:
        BackendError: As ``sample_token``.
    """
    rows = zip(logits, params, rngs, strict=True)
    return np.array([sample_token(row, own, rng) for row, own, rng in rows], dtype=np.int64)


def token_probabilities(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """(V,) probabilities with which ``sample_token`` returns each id.

    Raises:
        BackendError: As ``sample_token``.
    """
    probabilities = np.zeros(logits.shape[0])
    if params.temperature == 0:
        _check(logits)
        probabilities[np.argmax(logits)] = 1.0
        return probabilities
    kept, values = _kept_probabilities(logits, params)
    probabilities[kept] = values
    return probabilities


def _kept_probabilities(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Ids that can be drawn, ascending, and their probabilities; steps 1 to 4 of the module's docstring."""
    _check(logits)
    kept: NDArray[np.intp] = np.flatnonzero(logits > -np.inf)
    if params.top_k is not None and params.top_k < kept.size:
        kept = kept[logits[kept] >= _kth_largest(logits[kept], params.top_k)]
    # The largest logit is subtracted before the division: a tiny temperature must not overflow.
    shifted = (logits[kept].astype(np.float64) - float(logits[kept].max())) / params.temperature
    probabilities = np.exp(shifted)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        inside = _nucleus(probabilities, params.top_p)
        kept, probabilities = kept[inside], probabilities[inside]
        probabilities /= probabilities.sum()
    return kept, probabilities


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ascending positions of the fewest most probable entries that reach ``top_p``.

    A whole sort of a vocabulary costs milliseconds a token, so only the likeliest candidates are sorted.
    """
    count = _FIRST_CANDIDATES
    while True:
        if count < probabilities.size:
            candidates = np.flatnonzero(probabilities >= _kth_largest(probabilities, count))
        else:
            candidates = np.arange(probabilities.size)
        order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
        before = np.cumsum(probabilities[order]) - probabilities[order]
        inside = before < top_p
        if not inside.all() or count >= probabilities.size:
            return np.sort(order[inside])
        count *= 8


def _kth_largest(values: NDArray[np.floating], k: int) -> np.floating:
    return np.partition(values, values.size - k)[values.size - k]  # type: ignore[no-any-return]


def _check(logits: NDArray[np.float32]) -> None:
    largest = logits.max()
    if not np.isfinite(largest):
        raise BackendError(f"the largest logit is {largest}; the file or its runtime is broken, try another --backend")
