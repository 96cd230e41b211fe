"""GPTQ: codes that make a layer's outputs, not its weights, come out right.

The error of a row is ``(w - q) H (w - q)``, with H the sum of ``x x^T`` over calibration inputs. With ``H = L L^T`` it
is a sum over columns of ``L_jj^2 (t_j - q_j)^2``, where t_j is the weight plus what the columns after it leave to be
made good; so columns are rounded from the last to the first, each to the nearest code. It is the same as GPTQ's
inverse updates in opposite order (arXiv 2210.17323; arXiv 2507.18553 shows it), with one factorization and no inverse.
A group's scale is chosen when its turn comes, by the error that its columns would really leave with each candidate.
"""

from __future__ import annotations

import torch

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.quantization.grid import Grid
from pipeline.quantization.scales import candidates, join_rows, pack, refit

_CANDIDATES = 12
_BLOCK_ROWS = 16_384
_DAMPING_MAX = 10.0


def make_hessian(columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(K, K) float32 zeros for inputs of ``columns`` dimensions."""
    return torch.zeros(columns, columns, device=device)


@torch.no_grad()
def accumulate_hessian(hessian: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add ``x^T x`` of inputs (..., K) in place.

    Sums are float32. Products of bf16 inputs are exact in it, so nothing is lost by leaving them in bf16 on a GPU.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if rows.is_cuda and rows.dtype != hessian.dtype:
        torch.ops.aten.addmm.dtype_out(hessian, rows.T, rows, hessian.dtype, out=hessian)
    else:
        rows = rows.to(hessian.dtype)
        hessian.addmm_(rows.T, rows)


@torch.no_grad()
def quantize_with_hessian(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, name: str = "weight", damping: float = 0.01
) -> QuantizedTensor:
    """Codes and scales of a weight (N, K) with little error in its outputs.

    Groups are quantized in the order of their inputs' energy, the largest first, and the columns of a group likewise:
    what comes late makes good what came before, and is itself made good by less. Codes are stored in their own order.

    Args:
        weight: Finite, of any float type.
        hessian: (K, K) float32 on the same device; it is OVERWRITTEN. Inputs that were always zero are rounded alone.
        grid: The last group is padded with zeros.
        name: For people.
        damping: Added to the diagonal, relative to its mean, so that few inputs do not decide everything; tenfold as
            long as the factorization fails.

    Raises:
        ExportError: The Hessian is not finite, or cannot be factorized.
        ValueError: A weight is not finite, or fp16 cannot hold a scale.
    """
    rows, columns = weight.shape
    if columns % grid.group:
        missing = -columns % grid.group
        hessian = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
    padded = len(hessian)
    group_order, order = _order(hessian.diagonal(), grid.group)
    factor = _factorize(hessian, order, damping, name)
    columns_of, groups_of = order.argsort(), group_order.argsort()
    parts = []
    for start in range(0, rows, _BLOCK_ROWS):
        block = torch.nn.functional.pad(weight[start : start + _BLOCK_ROWS].float(), (0, padded - columns))
        found, chosen = _round_rows(block[:, order].T.contiguous(), factor, grid)
        parts.append(pack(found[columns_of].T, chosen[groups_of].T, grid, columns))
    return join_rows(parts)


def _order(energy: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups and columns by growing energy: the last is quantized first."""
    grouped = energy.view(-1, group)
    groups = grouped.sum(dim=1).argsort(stable=True)
    inside = grouped.argsort(dim=1, stable=True)[groups]
    return groups, (inside + groups[:, None] * group).flatten()


def _factorize(hessian: torch.Tensor, order: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Lower Cholesky factor of the reordered, damped Hessian; two matrices of its size exist at a time."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not (mean >= 0 and bool(torch.isfinite(diagonal).all())):
        raise ExportError(f"{name}: its inputs are not finite numbers on the calibration text; the student is damaged")
    diagonal.masked_fill_(diagonal == 0, mean or 1.0)
    hessian.copy_(hessian.index_select(0, order))
    hessian.copy_(hessian.index_select(1, order))
    added = 0.0
    factor: torch.Tensor
    while damping <= _DAMPING_MAX:
        diagonal.add_(damping * mean - added)
        added = damping * mean
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed and bool(torch.isfinite(factor.diagonal()).all()):
            return factor
        damping *= 10
    raise ExportError(
        f"{name}: its Hessian cannot be factorized with any damping up to {_DAMPING_MAX:g}; "
        "raise quantize.calibration_sequences, or choose quantize.rounding=mse"
    )


def _round_rows(weight: torch.Tensor, factor: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (K, N) int8 and scales (G, N) fp16 of a transposed weight (K, N)."""
    columns, rows = weight.shape
    codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
    scales = torch.empty(columns // grid.group, rows, dtype=torch.float16, device=weight.device)
    left = torch.empty_like(weight)  # weight - code * scale, of the columns that are done
    for group in reversed(range(columns // grid.group)):
        own = slice(group * grid.group, (group + 1) * grid.group)
        triangle = factor[own, own]
        carried = factor[own.stop :, own].T @ left[own.stop :]
        target = weight[own] + torch.linalg.solve_triangular(triangle.T, carried, upper=True)
        chosen, scale = _round_group(target, triangle, grid)
        codes[own], scales[group] = chosen.to(torch.int8), scale.half()
        left[own] = weight[own] - chosen * scale
    return codes, scales


def _round_group(target: torch.Tensor, triangle: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (group, N) and the scale (N,) that leave the least of ``|triangle^T (target - codes * scale)|^2``."""
    tried = candidates(target.T, grid, _CANDIDATES)
    codes, scale, _ = _best(target, triangle, tried, grid)
    outputs, coded = triangle.T @ target, triangle.T @ codes
    fitted = refit((outputs * coded).sum(dim=0), coded.square().sum(dim=0), scale)
    codes, scale, _ = _best(target, triangle, torch.stack([scale, fitted]), grid)
    return codes, scale


def _best(
    target: torch.Tensor, triangle: torch.Tensor, scales: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of scales (C, N) the best one of each row, with its codes (group, N) and its error (N,)."""
    codes, errors = _nearest_plane(target, triangle, scales, grid)
    least, place = errors.min(dim=0)
    taken = codes.gather(1, place.expand(len(codes), 1, -1)).squeeze(1)
    return taken, scales.gather(0, place[None]).squeeze(0), least


def _nearest_plane(
    target: torch.Tensor, triangle: torch.Tensor, scales: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of one group, last first: codes (group, C, N) and errors (C, N) for scales (C, N)."""
    group, tried, rows = len(target), *scales.shape
    unit = triangle / triangle.diagonal()
    wanted = target[:, None].expand(group, tried, rows).reshape(group, -1)
    flat, inverse = scales.reshape(-1), scales.reciprocal().reshape(-1)
    codes, left = torch.empty_like(wanted), torch.empty_like(wanted)
    for column in reversed(range(group)):
        place = torch.addmv(wanted[column], left[column + 1 :].T, unit[column + 1 :, column])
        torch.clamp(place.mul_(inverse).round_(), *grid.code_range, out=codes[column])
        torch.addcmul(wanted[column], codes[column], flat, value=-1, out=left[column])
    errors = (triangle.T @ left).square_().sum(dim=0)
    return codes.view(group, tried, rows), errors.view(tried, rows)
