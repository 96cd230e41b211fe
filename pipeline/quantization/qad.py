"""Quantization-aware distillation: a student in codes learns to say what it said in floats, and stays in codes.

Every matrix is code * scale whenever the student computes; gradients pass rounding as if it were not there, and codes
change as their weights move. Scales learn beside them, as factors of what they started with, and are rounded to fp16 in
the forward pass (LSQ, arXiv 1902.08153). So what the last forward pass multiplied by is what is stored, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.distillation.batches import Batch, LossSum
from pipeline.distillation.objectives import Objective
from pipeline.quantization.grid import Grid
from pipeline.quantization.scales import nearest, pack, to_fp16, unpack

import os
_INSIDE = float(os.environ.get("INSIDE", "0.499"))


class QuantizedStudent(nn.Module):
    """A transformers model together with the scales of its matrices.

    Its parameters are the model's own, for matrices the weights before they are rounded, and for each scale the logarithm
    of what it was multiplied by; all of them learn. ``quantized_objective`` runs it in codes.
    """

    def __init__(self, student: Any, codes: Mapping[str, QuantizedTensor], grids: Mapping[str, Grid]) -> None:
        """Start from codes of its matrices, by name: each weight is moved to the nearest value with that code."""
        super().__init__()
        self.student, self.config, self.grids = student, student.config, {name: grids[name] for name in codes}
        self.growth = nn.ParameterDict()
        for name, tensor in codes.items():
            weight = student.get_parameter(name)
            scales = torch.from_numpy(tensor.scales.astype(np.float32)).to(weight.device)
            self.register_buffer(_key(name), scales, persistent=False)
            self.growth[_key(name)] = nn.Parameter(torch.zeros_like(scales))
            groups = _grouped(weight.data, self.grids[name].group) / scales.unsqueeze(-1)
            middle = _grouped(unpack(tensor, weight.device), self.grids[name].group) / scales.unsqueeze(-1)
            places = middle + (groups - middle).clamp(-_INSIDE, _INSIDE)
            weight.data = places.flatten(1)[:, : weight.shape[1]]
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in self.grids)

    def forward(self, objective: Objective, batch: Batch) -> LossSum:
        """An objective of the model."""
        return objective(self.student, batch)

    def scale(self, name: str) -> torch.Tensor:
        """(N, G) float32 scales of a matrix, not yet fp16."""
        return self.get_buffer(_key(name)) * (float(os.environ.get("KAPPA","1")) * self.growth[_key(name)]).exp()


def quantized_objective(objective: Objective) -> Objective:
    """The objective of the model that a ``QuantizedStudent`` stands for: what it is given has code * scale as weights."""

    def on_codes(model: Any, batch: Batch) -> LossSum:
        named = {f"student.{name}": value for name, value in fake_quantized(model).items()}
        loss: LossSum = functional_call(model, named, (objective, batch))
        return loss

    return on_codes


def fake_quantized(model: QuantizedStudent) -> dict[str, torch.Tensor]:
    """Every matrix (N, K) by name as the forward pass multiplies by it, with gradients for weights and scales."""
    found = {}
    for name, grid in model.grids.items():
        weight: torch.Tensor = model.student.get_parameter(name)
        found[name] = _FakeQuantize.apply(weight, model.scale(name), grid)
    return found


@torch.no_grad()
def trained_codes(model: QuantizedStudent) -> dict[str, QuantizedTensor]:
    """Codes and scales of every matrix: dequantized they are ``fake_quantized``, bit for bit."""
    found = {}
    for name, grid in model.grids.items():
        weight, scale = model.student.get_parameter(name), to_fp16(model.scale(name))
        codes = _grouped(weight.round().clamp_(*grid.code_range), grid.group).flatten(1)
        found[name] = pack(codes, scale, grid, weight.shape[1])
    return found


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
        rounded = to_fp16(scale).unsqueeze(-1)
        low, high = grid.code_range
        codes = places.round().clamp_(low, high)
        ctx.save_for_backward((places >= low - 0.5) & (places <= high + 0.5), codes, rounded)
        ctx.grid = grid
        return (_grouped(codes, grid.group) * rounded).flatten(1)[:, : places.shape[1]]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        inside, codes, scale = ctx.saved_tensors
        grouped = _grouped(gradient, ctx.grid.group)
        of_scale = (grouped * _grouped(codes, ctx.grid.group)).sum(dim=-1)
        return (grouped * scale).flatten(1)[:, : gradient.shape[1]] * inside, of_scale, None


def _grouped(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """(N, G, group), the last group padded with zeros."""
    return functional.pad(matrix, (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))


def _key(name: str) -> str:
    """Modules' names hold no dots."""
    return name.replace(".", "/")
