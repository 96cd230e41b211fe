"""Choosing codes and scales: round to nearest, or a search for the least squared error.

Both work on the grid of ``formats/int4``: code * scale, one fp16 scale a group of input
dimensions. Scales are positive where a TFLite file is made from them (XNNPACK refuses others),
otherwise they take the sign that lets the largest weight use the grid's longer side, as GGUF's
Q4_0 does; the search tries the other sign too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec, module_name
from edge_runtime.formats.int4 import CODE_RANGE, QuantizedTensor, dequantize
from pipeline.quantization.grid import Grid, padded_columns

_SMALLEST_SCALE = np.float32(2.0**-14)  # the smallest normal fp16: runtimes may flush subnormals, and refuse zero
_LARGEST_SCALE = np.float32(65504.0)
_BLOCK_ROWS = 4096

FloatArray = NDArray[np.float32]


def quantize_tensor(
    weight: FloatArray,
    *,
    bits: int,
    group: int,
    rounding: str,
    positive_scales: bool = True,
    importance: FloatArray | None = None,
) -> QuantizedTensor:
    """Quantize a weight (N, K) in groups of ``group`` along K; K is zero-padded to a whole group.

    Args:
        weight: Finite values.
        bits: 4 or 8.
        group: Input dimensions that share a scale.
        rounding: As ``quantize_rows`` takes it.
        positive_scales: Refuse the sign trick; costs some error on the asymmetric 4-bit grid.
        importance: As ``quantize_rows`` takes it.

    Raises:
        ValueError: A weight is not finite, or fp16 cannot hold a scale.
    """
    grid = Grid(bits, group, positive_scales)
    starts = range(0, max(len(weight), 1), _BLOCK_ROWS)
    blocks = [quantize_rows(weight[start : start + _BLOCK_ROWS], grid, rounding, importance) for start in starts]
    packed, scales = (np.concatenate([getattr(block, part) for block in blocks]) for part in ("packed", "scales"))
    return QuantizedTensor(packed, scales, bits, weight.shape[1])


def quantize_rows(rows: FloatArray, grid: Grid, rounding: str, importance: FloatArray | None = None) -> QuantizedTensor:
    """Quantize some rows (N, K) of a weight: the same codes in whatever blocks the rows come.

    Args:
        rows: Finite values.
        grid: Codes and scales that are allowed.
        rounding: ``rtn``: the smallest scale that covers the group. ``mse``: of many scales around it, each fitted to
            its codes by least squares, the one with the least error.
        importance: (K,) factors of the squared errors of the columns, at least 0; None weighs all alike. Needs ``mse``.

    Raises:
        ValueError: A weight is not finite, fp16 cannot hold a scale, or the importance does not fit.
    """
    from pipeline.quantization.kernels import choose_codes  # compiled by numba, which not every tool needs

    count, columns = rows.shape
    padded = -(-columns // grid.group) * grid.group
    weights = np.ones(padded, np.float32)
    if importance is not None:
        weights[:columns] = _require_importance(importance, columns, rounding)
    block = np.zeros((count, padded), np.float32)
    block[:, :columns] = rows
    if not np.isfinite(block).all():
        raise ValueError("weights must be finite")
    codes, scales = np.empty((count, padded), np.int8), np.empty((count, padded // grid.group), np.float32)
    low, high = map(np.float32, grid.code_range)
    signed = grid.bits == 4 and not grid.positive_scales
    largest = choose_codes(block, weights, grid.group, (low, high), signed, _factors(grid, rounding), codes, scales)
    if largest > _LARGEST_SCALE:
        raise ValueError("a scale exceeds fp16")
    return QuantizedTensor.of_codes(codes, scales.astype(np.float16), grid.bits, columns)


def quantize_per_tensor(weight: FloatArray) -> QuantizedTensor:
    """Eight bits with one scale for the whole weight (N, K): scales (1, 1).

    Raises:
        ValueError: A weight is not finite, or fp16 cannot hold the scale.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weights must be finite")
    return codes_of_scale(weight, tensor_scale(float(np.abs(weight).max())))


def tensor_scale(largest: float) -> np.float16:
    """The smallest fp16 scale whose eight-bit codes reach ``largest``, a whole weight's largest magnitude.

    Raises:
        ValueError: fp16 cannot hold it.
    """
    scale = _to_fp16(_require_fp16(np.array([np.float32(largest) / 127], np.float32))).astype(np.float16)[0]
    if np.float32(scale) * 127 < np.float32(largest):  # rounded down: the largest weight would be clipped
        scale = np.nextafter(scale, np.float16(np.inf))
    return np.float16(scale)


def codes_of_scale(rows: FloatArray, scale: np.float16) -> QuantizedTensor:
    """Eight-bit codes of rows (N, K) under one scale."""
    codes = np.clip(np.rint(rows / np.float32(scale)), *CODE_RANGE[8]).astype(np.int8)
    return QuantizedTensor.of_codes(codes, np.full((1, 1), scale, np.float16), 8, rows.shape[1])


def pad_intermediate(
    spec: DecoderSpec, weights: dict[str, FloatArray], group: int
) -> tuple[DecoderSpec, dict[str, FloatArray]]:
    """Zero-pad the FFN to whole groups. Exact: a padded neuron is silu(0) * 0 = 0 and feeds zeros."""
    missing = padded_columns(spec.intermediate_size, group) - spec.intermediate_size
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


def _factors(grid: Grid, rounding: str) -> FloatArray:
    """Multiples of the covering scale to try; more gain less than a thousandth of the error."""
    if rounding == "rtn":
        return np.empty(0, np.float32)
    if rounding != "mse":
        raise ValueError(f"rounding {rounding!r}: allowed are rtn and mse")
    if grid.bits == 8:
        return np.linspace(0.90, 1.05, 24, dtype=np.float32)
    if grid.positive_scales:
        return np.linspace(0.60, 1.15, 24, dtype=np.float32)
    # Of the other sign larger ones: the shorter side of the range has to reach the largest weight then.
    sides = [np.linspace(0.60, 1.06, 16), -np.linspace(0.60, 1.20, 16)]
    return np.concatenate(sides).astype(np.float32)


def _require_importance(importance: FloatArray, columns: int, rounding: str) -> FloatArray:
    if rounding != "mse":
        raise ValueError(f"importance needs rounding mse, not {rounding}")
    if importance.shape != (columns,) or not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError(f"importance must be {columns} finite numbers of at least 0")
    return importance


def _require_fp16(scale: FloatArray) -> FloatArray:
    if np.abs(scale).max() > _LARGEST_SCALE:
        raise ValueError("a scale exceeds fp16")
    return scale


def _to_fp16(scale: FloatArray) -> FloatArray:
    """Round to fp16, away from zero where it would vanish; the codes are chosen for the rounded scale."""
    rounded = np.clip(scale, -_LARGEST_SCALE, _LARGEST_SCALE).astype(np.float16).astype(np.float32)
    tiny = np.abs(rounded) < _SMALLEST_SCALE
    return np.where(tiny, np.where(scale < 0, -_SMALLEST_SCALE, _SMALLEST_SCALE), rounded)
