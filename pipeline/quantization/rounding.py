"""Choosing codes and scales: round to nearest, or a search for the least squared error.

Both work on the grid of ``formats/int4``: code * scale, one fp16 scale a group of input
dimensions. Scales are positive where a TFLite file is made from them (XNNPACK refuses others),
otherwise they take the sign that lets the largest weight use the grid's longer side, as GGUF's
Q4_0 does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec, module_name
from edge_runtime.formats.int4 import CODE_RANGE, QuantizedTensor, dequantize

_SEARCH_FACTORS = np.linspace(0.60, 1.06, 24, dtype=np.float32)
_SMALLEST_SCALE = np.float32(2.0**-14)  # the smallest normal fp16: runtimes may flush subnormals, and refuse zero
_LARGEST_SCALE = np.float32(65504.0)
_BLOCK_ROWS = 4096

FloatArray = NDArray[np.float32]


def quantize_tensor(
    weight: FloatArray, *, bits: int, group: int, rounding: str, positive_scales: bool = True
) -> QuantizedTensor:
    """Quantize a weight (N, K) in groups of ``group`` along K; K is zero-padded to a whole group.

    Args:
        weight: Finite values.
        bits: 4 or 8.
        group: Input dimensions that share a scale.
        rounding: ``rtn``: the smallest scale that covers the group. ``mse``: of several scales
            around it, each refitted to its codes by least squares, the one with the least error.
        positive_scales: Refuse the sign trick; costs some error on the asymmetric 4-bit grid.

    Raises:
        ValueError: A weight is not finite, or fp16 cannot hold a scale.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weights must be finite")
    rows, columns = weight.shape
    padded = -(-columns // group) * group
    codes = np.empty((rows, padded), np.int8)
    scales = np.empty((rows, padded // group), np.float16)
    for start in range(0, rows, _BLOCK_ROWS):
        block = np.zeros((min(_BLOCK_ROWS, rows - start), padded), np.float32)
        block[:, :columns] = weight[start : start + _BLOCK_ROWS]
        grouped = block.reshape(-1, group)
        chosen = _cover(grouped, bits, positive_scales)
        if rounding == "mse":
            chosen = _search(grouped, chosen, bits)
        codes[start : start + len(block)] = _codes(grouped, chosen, bits).reshape(len(block), padded)
        scales[start : start + len(block)] = chosen.reshape(len(block), -1)
    return QuantizedTensor.of_codes(codes, scales, bits, columns)


def quantize_per_tensor(weight: FloatArray) -> QuantizedTensor:
    """Eight bits with one scale for the whole weight (N, K): scales (1, 1).

    Raises:
        ValueError: A weight is not finite, or fp16 cannot hold the scale.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weights must be finite")
    scale = _to_fp16(_require_fp16(np.abs(weight).max(keepdims=True) / 127)).astype(np.float16)[0, 0]
    if scale.astype(np.float32) * 127 < np.abs(weight).max():  # rounded down: the largest weight would be clipped
        scale = np.nextafter(scale, np.float16(np.inf))
    codes = np.clip(np.rint(weight / scale.astype(np.float32)), *CODE_RANGE[8]).astype(np.int8)
    return QuantizedTensor.of_codes(codes, scale.reshape(1, 1), 8, weight.shape[1])


def pad_intermediate(
    spec: DecoderSpec, weights: dict[str, FloatArray], group: int
) -> tuple[DecoderSpec, dict[str, FloatArray]]:
    """Zero-pad the FFN to a whole group. Exact: a padded neuron is silu(0) * 0 = 0 and feeds zeros."""
    missing = -spec.intermediate_size % group
    if not missing:
        return spec, weights
    padded = dict(weights)
    for layer in range(spec.num_layers):
        for projection in ("gate_proj", "up_proj"):
            name = module_name(layer, projection)
            for kind in ("weight", "bias"):
                if (value := weights.get(f"{name}.{kind}")) is not None:
                    padded[f"{name}.{kind}"] = np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
        down = f"{module_name(layer, 'down_proj')}.weight"
        padded[down] = np.pad(weights[down], [(0, 0), (0, missing)])
    return replace(spec, intermediate_size=spec.intermediate_size + missing), padded


def relative_error(weight: FloatArray, tensor: QuantizedTensor) -> float:
    """Squared error of the quantized weight over the weight's squared norm."""
    difference = weight.astype(np.float64) - dequantize(tensor)
    return float((difference**2).sum() / max(float((weight.astype(np.float64) ** 2).sum()), 1e-30))


def _cover(groups: FloatArray, bits: int, positive: bool) -> FloatArray:
    """(G, 1) fp16-exact scales: the smallest that keep every weight of a group (G, group) on the grid."""
    low, high = CODE_RANGE[bits]
    if positive or bits == 8:
        scale = np.maximum(groups.max(axis=1) / high, groups.min(axis=1) / low)
    else:
        extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
        scale = extreme / low
    return _to_fp16(_require_fp16(scale[:, None]))


def _search(groups: FloatArray, start: FloatArray, bits: int) -> FloatArray:
    best, least = start, _squared_error(groups, start, bits)
    for factor in _SEARCH_FACTORS:
        codes = _codes(groups, _to_fp16(start * factor), bits).astype(np.float32)
        norm = (codes * codes).sum(axis=1, keepdims=True)
        fitted = np.divide((groups * codes).sum(axis=1, keepdims=True), norm, out=start * factor, where=norm > 0)
        for candidate in (_to_fp16(start * factor), _to_fp16(np.where(fitted * start > 0, fitted, start))):
            error = _squared_error(groups, candidate, bits)
            better = error < least
            best, least = np.where(better, candidate, best), np.where(better, error, least)
    return best


def _squared_error(groups: FloatArray, scale: FloatArray, bits: int) -> FloatArray:
    difference = groups - _codes(groups, scale, bits) * scale
    return np.asarray((difference * difference).sum(axis=1, keepdims=True))


def _codes(groups: FloatArray, scale: FloatArray, bits: int) -> NDArray[np.int8]:
    codes: NDArray[np.int8] = np.clip(np.rint(groups / scale), *CODE_RANGE[bits]).astype(np.int8)
    return codes


def _require_fp16(scale: FloatArray) -> FloatArray:
    if np.abs(scale).max() > _LARGEST_SCALE:
        raise ValueError("a scale exceeds fp16")
    return scale


def _to_fp16(scale: FloatArray) -> FloatArray:
    """Round to fp16, away from zero where it would vanish; the codes are chosen for the rounded scale."""
    rounded = np.clip(scale, -_LARGEST_SCALE, _LARGEST_SCALE).astype(np.float16).astype(np.float32)
    tiny = np.abs(rounded) < _SMALLEST_SCALE
    return np.where(tiny, np.where(scale < 0, -_SMALLEST_SCALE, _SMALLEST_SCALE), rounded)
