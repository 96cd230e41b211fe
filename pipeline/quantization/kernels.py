"""The search over one block of rows, compiled: what rounding spends its time on.

Rows lie in lanes: 16 of them go through a group side by side, each summing its own weights in their own order. No sum
crosses lanes, so vector units of any width, blocks of any size and any number of threads give the same bytes.
Kernels release the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
_LANES = 16
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_TO_INTEGER = np.float32(1.5 * 2**23)  # added and taken away again, it rounds to the nearest integer, ties to even
_SMALLEST_SCALE = np.float32(2.0**-14)  # the smallest normal fp16: runtimes may flush subnormals, and refuse zero
_LARGEST_SCALE = np.float32(65504.0)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """To machine code that is kept beside the source; without fast-math, which would let sums change their order."""
    return cast(Callable[..., Any], numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@_compile
def choose_codes(
    block: FloatArray,
    importance: FloatArray,
    group: int,
    code_range: tuple[np.float32, np.float32],
    signed: bool,
    factors: FloatArray,
    codes: NDArray[np.int8],
    scales: FloatArray,
) -> float:
    """Codes and fp16-exact scales of a block (N, Kp), written into ``codes`` (N, Kp) and ``scales`` (N, Kp / group).

    A scale starts as the smallest that covers its group. ``factors`` of it are tried: with the codes of each, least
    squares gives the best scale in closed form, and the candidate with the least error wins (never a worse one than
    the start). No factors: the start is taken.

    Args:
        block: Finite weights; Kp is a multiple of ``group``.
        importance: (Kp,) weights of squared errors.
        group: Input dimensions that share a scale.
        code_range: Lowest and highest code.
        signed: A scale takes the sign that gives the largest weight the longer side of the range.
        factors: Multiples of the covering scale.
        codes: Output.
        scales: Output.

    Returns:
        The largest magnitude of a covering scale before it was fitted to fp16's range.
    """
    low, high = code_range
    x = np.empty((group, _LANES), np.float32)
    start, scale, best = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    least, sums = np.empty(_LANES, np.float32), np.empty((3, _LANES), np.float32)
    largest = _ZERO
    for row in range(0, len(block), _LANES):
        rows = min(_LANES, len(block) - row)
        for first in range(0, block.shape[1], group):
            _load(block, row, rows, first, x)
            weights = importance[first : first + group]
            largest = max(largest, _cover(x, low, high, signed, start))
            best[:] = start
            if len(factors):
                least[:] = np.float32(np.inf)
                scale[:] = start
                _measure(x, weights, low, high, scale, sums)
                _improve(scale, sums, best, least)
                for factor in factors:
                    for lane in range(_LANES):
                        scale[lane] = start[lane] * factor
                    _to_fp16(scale)
                    _measure(x, weights, low, high, scale, sums)
                    _improve(scale, sums, best, least)
            _store(x, low, high, best, row, rows, first, codes)
            for lane in range(rows):
                scales[row + lane, first // group] = best[lane]
    return float(largest)


@_compile
def _load(block: FloatArray, row: int, rows: int, first: int, x: FloatArray) -> None:
    """A group of some rows, one row a lane; lanes without a row hold zeros."""
    if rows < _LANES:
        x[:] = _ZERO
    for lane in range(rows):
        for k in range(len(x)):
            x[k, lane] = block[row + lane, first + k]


@_compile
def _cover(x: FloatArray, low: np.float32, high: np.float32, signed: bool, start: FloatArray) -> np.float32:
    """The smallest fp16-exact scales that keep every weight on the grid; the largest one's magnitude before that."""
    top, bottom = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    extreme = np.zeros(_LANES, np.float32)
    for k in range(len(x)):
        for lane in range(_LANES):
            value = x[k, lane]
            top[lane] = value if value > top[lane] else top[lane]
            bottom[lane] = value if value < bottom[lane] else bottom[lane]
            extreme[lane] = value if abs(value) > abs(extreme[lane]) else extreme[lane]
    largest = _ZERO
    for lane in range(_LANES):
        start[lane] = extreme[lane] / low if signed else max(top[lane] / high, bottom[lane] / low)
        largest = max(largest, abs(start[lane]))
    _to_fp16(start)
    return largest


@_compile
def _measure(
    x: FloatArray, weights: FloatArray, low: np.float32, high: np.float32, scale: FloatArray, sums: FloatArray
) -> None:
    """With the codes q of a scale and what they leave, r = x - q s: the weighted sums of r r, r q and q q."""
    inverse = np.empty(_LANES, np.float32)
    for lane in range(_LANES):
        inverse[lane] = _ONE / scale[lane]
    sums[:] = _ZERO
    for k in range(len(x)):
        weight = weights[k]
        for lane in range(_LANES):
            code = (x[k, lane] * inverse[lane] + _TO_INTEGER) - _TO_INTEGER
            code = code if code > low else low
            code = code if code < high else high
            rest = x[k, lane] - code * scale[lane]
            weighted = weight * code
            sums[0, lane] += weight * rest * rest
            sums[1, lane] += weighted * rest
            sums[2, lane] += weighted * code


@_compile
def _improve(scale: FloatArray, sums: FloatArray, best: FloatArray, least: FloatArray) -> None:
    """Take a candidate, or the scale that fits its codes best, where the error is less than the least so far."""
    fitted = np.empty(_LANES, np.float32)
    for lane in range(_LANES):
        fitted[lane] = scale[lane] + sums[1, lane] / sums[2, lane] if sums[2, lane] > _ZERO else scale[lane]
        fitted[lane] = fitted[lane] if fitted[lane] * scale[lane] > _ZERO else scale[lane]
    _to_fp16(fitted)
    for lane in range(_LANES):
        change = fitted[lane] - scale[lane]
        error = sums[0, lane] - _TWO * change * sums[1, lane] + change * change * sums[2, lane]
        if sums[0, lane] < least[lane]:
            least[lane], best[lane] = sums[0, lane], scale[lane]
        if error < least[lane]:
            least[lane], best[lane] = error, fitted[lane]


@_compile
def _to_fp16(scale: FloatArray) -> None:
    """Round to the nearest normal fp16, ties to even, in place; what would vanish becomes the smallest one."""
    bits = scale.view(np.int32)
    for lane in range(len(scale)):
        value = min(max(scale[lane], -_LARGEST_SCALE), _LARGEST_SCALE)
        scale[lane] = value
        bits[lane] = (bits[lane] + 0xFFF + ((bits[lane] >> 13) & 1)) & ~0x1FFF
        if abs(scale[lane]) < _SMALLEST_SCALE:
            scale[lane] = -_SMALLEST_SCALE if value < _ZERO else _SMALLEST_SCALE


@_compile
def _store(
    x: FloatArray, low: np.float32, high: np.float32, scale: FloatArray, row: int, rows: int, first: int,
    codes: NDArray[np.int8],
) -> None:  # fmt: skip
    """The nearest codes of a group under its scale."""
    for k in range(len(x)):
        for lane in range(_LANES):
            value = np.rint(x[k, lane] / scale[lane])
            x[k, lane] = min(max(value, low), high)
    for lane in range(rows):
        for k in range(len(x)):
            codes[row + lane, first + k] = np.int8(x[k, lane])
