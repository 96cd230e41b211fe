"""A teacher whose decoder layers multiply in 8-bit floating point: twice the rate of bf16 on GPUs that have it.

Weights are e4m3 with one scale an output row, activations with one scale a position, taken from the
values at hand. Embedding, norms, attention and head stay as they are. The targets change a little:
measure how much (``benchmarks/distillation_throughput.py`` prints the KL) before training on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edge_runtime.formats.errors import UserError

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
_SMALLEST_SCALE = 1e-12
_COMPUTE_CAPABILITY = (8, 9)
_SIZE_STEP = 16


def quantize_teacher(teacher: Any) -> int:
    """Replace every linear of the decoder's layers in place.

    Args:
        teacher: A transformers model in bf16 on a GPU; it cannot be trained afterwards.

    Returns:
        How many linears were replaced.

    Raises:
        UserError: The GPU does not multiply float8, or a size is not a multiple of 16.
    """
    _check_device(teacher.device)
    parents = [parent for layer in teacher.get_decoder().layers for parent in layer.modules()]
    places = [
        (parent, name, child)
        for parent in parents
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for _, name, linear in places:
        if linear.in_features % _SIZE_STEP or linear.out_features % _SIZE_STEP:
            sizes = f"{name} {linear.out_features} x {linear.in_features}"
            raise UserError("teacher.load", f"float8 of {sizes}", f"sizes divisible by {_SIZE_STEP}", "use bf16")
    for parent, name, linear in places:
        setattr(parent, name, Float8Linear(linear))
    return len(places)


class Float8Linear(nn.Module):
    """``x @ weight.T + bias`` with both factors rounded to e4m3; without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = _scale_of(linear.weight.detach())
        self.weight = nn.Buffer((linear.weight.detach() / scale).to(FLOAT8))
        self.scale = nn.Buffer(scale.T.contiguous())  # (1, out)
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) bf16 to (..., out) bf16."""
        rows = inputs.flatten(0, -2)
        scale = _scale_of(rows)
        outputs: torch.Tensor = torch._scaled_mm(
            (rows / scale).to(FLOAT8),
            self.weight.T,
            scale_a=scale,
            scale_b=self.scale,
            out_dtype=inputs.dtype,
            use_fast_accum=True,
        )
        outputs = outputs.unflatten(0, inputs.shape[:-1])
        return outputs if self.bias is None else outputs + self.bias


def _scale_of(rows: torch.Tensor) -> torch.Tensor:
    """(N, 1) fp32: what the largest magnitude of a row is divided by to become e4m3's largest."""
    largest: torch.Tensor = rows.abs().amax(dim=-1, keepdim=True).float()
    scale: torch.Tensor = (largest / _LARGEST).clamp_min(_SMALLEST_SCALE)
    return scale


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError("teacher.load", "float8", f"bf16 or fp32 on {device.type}", "float8 needs a GPU")
    if torch.cuda.get_device_capability(device) < _COMPUTE_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError("teacher.load", "float8", f"bf16 on {name}", "float8 needs compute capability 8.9")
