"""Sampling rates changed by a polyphase low-pass filter."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ZERO_CROSSINGS = 64  # on each side of the filter, counted at the lower of the two rates
_STOP_DB = 100.0
# Kaiser's formula: the transition from pass to stop is this share of the lower rate's Nyquist frequency.
_TRANSITION = (_STOP_DB - 7.95) / (2.285 * 2 * _ZERO_CROSSINGS * math.pi)
_BETA = 0.1102 * (_STOP_DB - 8.7)
_MAX_FACTOR = 50_000  # the filter takes about 1 kB for each
_CHUNK = 4_096  # outputs


def resample(samples: NDArray[np.float32], source_hz: int, target_hz: int) -> NDArray[np.float32]:
    """Samples (N,) at ``source_hz`` as samples (ceil(N target / source),) at ``target_hz``.

    Every output is the sum of an interpolated low-pass filter's phase with the inputs around it. Nothing
    above the lower rate's Nyquist frequency passes (-100 dB), nothing below 0.9 of it is touched. The ends are
    continued with silence.

    R. Crochiere, L. Rabiner, "Multirate Digital Signal Processing", 1983, section 3.3.

    Raises:
        ValueError: ``resamples`` says no.
    """
    if not resamples(source_hz, target_hz):
        raise ValueError(f"from {source_hz} to {target_hz} Hz: their ratio has terms outside 1 to {_MAX_FACTOR}")
    up, down = _ratio(source_hz, target_hz)
    if up == down or not len(samples):
        return samples.astype(np.float32, copy=True)
    phases, reach = _phases(up, down)
    return _apply(samples, phases, reach, up, down)


def resamples(source_hz: int, target_hz: int) -> bool:
    """Whether the two rates have a ratio of small enough terms; all rates in use have."""
    return source_hz > 0 and target_hz > 0 and max(_ratio(source_hz, target_hz)) <= _MAX_FACTOR


def low_pass(up: int, down: int) -> NDArray[np.float64]:
    """The filter's (2 H + 1,) coefficients at ``up`` times the source's rate, their sum ``up``."""
    widest = max(up, down)
    half = _ZERO_CROSSINGS * widest
    place = np.arange(-half, half + 1, dtype=np.float64)
    cutoff = (1 - _TRANSITION / 2) / widest
    filter_ = np.sinc(cutoff * place) * np.kaiser(2 * half + 1, _BETA)
    return np.asarray(filter_ * (up / filter_.sum()))


def _ratio(source_hz: int, target_hz: int) -> tuple[int, int]:
    common = math.gcd(source_hz, target_hz)
    return target_hz // common, source_hz // common


@lru_cache(maxsize=4)
def _phases(up: int, down: int) -> tuple[NDArray[np.float64], int]:
    """(up, K) coefficients of each phase in the order of the inputs, and how many inputs lie before the present one."""
    filter_ = low_pass(up, down)
    half = len(filter_) // 2
    reach = -(-half // up)
    # Output n stands at input position q = n down / up; input i weighs filter[half + q up - i up].
    offsets = np.arange(up)[:, None] + (reach - np.arange(2 * reach + 1))[None, :] * up + half
    inside = (offsets >= 0) & (offsets < len(filter_))
    return np.where(inside, filter_[offsets.clip(0, len(filter_) - 1)], 0.0), reach


def _apply(
    samples: NDArray[np.float32], phases: NDArray[np.float64], reach: int, up: int, down: int
) -> NDArray[np.float32]:
    length = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float64), (reach, reach + down + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, phases.shape[1])
    result = np.empty(length, np.float32)
    for first in range(min(up, length)):  # outputs first, first + up, ... share a phase and stand ``down`` inputs apart
        start, phase = divmod(first * down, up)
        outputs = len(range(first, length, up))
        for done in range(0, outputs, _CHUNK):  # the product copies its windows
            count = min(_CHUNK, outputs - done)
            begin = start + done * down
            chunk = windows[begin : begin + (count - 1) * down + 1 : down] @ phases[phase]
            result[first + done * up : first + (done + count - 1) * up + 1 : up] = chunk
    return result
