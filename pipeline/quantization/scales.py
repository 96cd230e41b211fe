"""Scales by search on any device, where inputs do not matter equally: candidates, fp16, and the weighted least error.

A scale is tried as fp16, as it will be stored, and codes are chosen for that value. Candidates are multiples of the
smallest scale that covers a group; on the signed grid of both signs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.quantization.grid import Grid

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0  # normal fp16: runtimes may flush subnormals, and refuse zero
_FACTORS = (0.58, 1.06)
_BLOCK_WEIGHTS = 1 << 22


@torch.no_grad()
def quantize_weighted(weight: torch.Tensor, importance: torch.Tensor | None, grid: Grid) -> QuantizedTensor:
    """The least squared error, each input's weighted with ``importance``.

    Args:
        weight: (N, K), finite, on any device.
        importance: (K,), for example the mean squared input; None: all the same.
        grid: The last group is padded with zeros.

    Raises:
        ValueError: A weight is not finite, or fp16 cannot hold a scale.
    """
    rows, columns = weight.shape
    padded = -(-columns // grid.group) * grid.group
    weights = torch.zeros(padded, device=weight.device)
    weights[:columns] = 1 if importance is None else importance.to(weight.device, torch.float32)
    weights = weights.clamp_min(1e-6 * float(weights.max()) + 1e-30).view(1, -1, grid.group)
    parts = []
    span = max(1, _BLOCK_WEIGHTS // padded)
    for start in range(0, rows, span):
        block = torch.nn.functional.pad(weight[start : start + span].float(), (0, padded - columns))
        groups = block.view(len(block), -1, grid.group)
        chosen = _search(groups, weights, grid)
        parts.append(pack(nearest(groups, chosen, grid).flatten(1), chosen.squeeze(-1), grid, columns))
    return join_rows(parts)


def pack(codes: torch.Tensor, scales: torch.Tensor, grid: Grid, columns: int) -> QuantizedTensor:
    """From codes (N, Kp) and scales (N, Kp / group) of any type, on any device: packed there, kept in host memory."""
    if grid.bits == 4:
        offset = (codes + 8).to(torch.uint8)
        stored = offset[:, 0::2] | (offset[:, 1::2] << 4)
    else:
        stored = codes.to(torch.int8)
    return QuantizedTensor(stored.cpu().numpy(), scales.half().cpu().numpy(), grid.bits, columns)


def unpack(tensor: QuantizedTensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """(N, K) float32 on a device: as ``dequantize`` of ``formats/int4``."""
    stored = _moved(tensor.packed, device)
    if tensor.bits == 4:
        stored = torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(1).to(torch.int8) - 8
    groups = stored.view(len(stored), -1, tensor.group).float()
    values = (groups * _moved(tensor.scales, device).float().unsqueeze(-1)).flatten(1)
    return values[:, : tensor.columns]


def join_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of blocks of rows, in order."""
    if len(parts) == 1:
        return parts[0]
    packed, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("packed", "scales"))
    return QuantizedTensor(packed, scales, parts[0].bits, parts[0].columns)


def candidates(groups: torch.Tensor, grid: Grid, number: int) -> torch.Tensor:
    """(C, ...) scales worth trying for groups (..., group): fp16 values as float32; the first covers its group.

    Raises:
        ValueError: A weight is not finite, or fp16 cannot hold a scale.
    """
    low, high = grid.code_range
    largest, least = groups.amax(dim=-1), groups.amin(dim=-1)
    covers = [torch.maximum(largest / high, least / low)]
    if not grid.positive_scales and -low != high:
        covers.append(torch.minimum(largest / low, least / high))
    reach = max(float(cover.abs().max()) for cover in covers)
    if not reach <= LARGEST_SCALE:
        raise ValueError("weights must be finite, and a scale within fp16")
    factors = torch.linspace(*_FACTORS, number - 1, device=groups.device)
    factors = torch.cat([torch.ones(1, device=groups.device), factors]).view(-1, *[1] * covers[0].ndim)
    return to_fp16(torch.cat([factors * cover for cover in covers]))


def to_fp16(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to fp16, away from zero where it would vanish; float32."""
    rounded = scale.clamp(-LARGEST_SCALE, LARGEST_SCALE).half().float()
    smallest = torch.where(scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
    return torch.where(rounded.abs() < SMALLEST_SCALE, smallest, rounded)


def nearest(values: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes as float32."""
    return (values / scale).round_().clamp_(*grid.code_range)


def _moved(array: Any, device: torch.device | str) -> torch.Tensor:
    """Mapped files are read-only, which torch does not know of."""
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _search(groups: torch.Tensor, weights: torch.Tensor, grid: Grid, number: int = 24) -> torch.Tensor:
    """(N, G, 1) scales of groups (N, G, group): each candidate also refitted to its codes by least squares."""
    tried = candidates(groups, grid, number).unsqueeze(-1)
    best = tried[0]
    least = torch.full_like(best, torch.inf)
    for candidate in tried:
        codes = nearest(groups, candidate, grid)
        refitted = refit(
            (weights * groups * codes).sum(-1, keepdim=True), (weights * codes * codes).sum(-1, keepdim=True), candidate
        )
        for scale in (candidate, refitted):
            error = (weights * (groups - nearest(groups, scale, grid) * scale).square()).sum(-1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def refit(product: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The least-squares scale ``product / norm`` as fp16; the old one where it is not defined or changes sign."""
    fitted = product / norm.clamp_min(1e-30)
    return to_fp16(torch.where((norm > 0) & (fitted * scale > 0), fitted, scale))
