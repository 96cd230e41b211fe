"""Quantization-aware distillation: a student in codes learns to say what it said in floats, and stays in codes.

Every matrix is code * scale whenever the student computes. What learns is each weight's place on its grid, in codes,
whose gradient passes rounding as if it were not there, and a factor of each scale (LSQ, arXiv 1902.08153), rounded to
fp16 in the forward pass. Places do not depend on the scale, so that a scale may change without a single code. What the
last forward pass multiplied by is what is stored, bit for bit.
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
from pipeline.quantization.scales import pack, to_fp16

_START_REACH = 0.25  # of a code, from its middle: a code that GPTQ chose against the nearest one is not lost at once
_SCALE_RATE = 0.2  # one step of the optimizer changes a scale's logarithm by so much of what it moves a place


class QuantizedStudent(nn.Module):
    """A transformers model in codes; ``quantized_objective`` runs it.

    Parameters that learn are the model's own matrices, which hold places on the grid instead of weights, and
    ``growth``, how far each scale is from its start. Norms and biases stay: on the demo's students they won nothing.
    """

    def __init__(
        self,
        student: Any,
        codes: Mapping[str, QuantizedTensor],
        grids: Mapping[str, Grid],
        *,
        codes_learn: bool = True,
    ) -> None:
        """Take a model over, starting from codes of its matrices by name; these stay unless ``codes_learn``."""
        super().__init__()
        self.student, self.config, self.grids = student, student.config, {name: grids[name] for name in codes}
        self.growth = nn.ParameterDict()
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        for name, tensor in codes.items():
            parameter = student.get_parameter(name).requires_grad_(codes_learn)
            scales = torch.from_numpy(tensor.scales.astype(np.float32)).to(parameter.device)
            self.register_buffer(_key(name), scales, persistent=False)
            self.growth[_key(name)] = nn.Parameter(torch.zeros_like(scales))
            middle = torch.from_numpy(tensor.codes.astype(np.float32)).to(parameter.device)
            wanted = (_grouped(parameter.data, tensor.group) / scales.unsqueeze(-1)).flatten(1)
            places = middle + (wanted - middle).clamp(-_START_REACH, _START_REACH)
            parameter.data = places[:, : tensor.columns].contiguous()

    def forward(self, objective: Objective, batch: Batch) -> LossSum:
        """An objective of the model."""
        return objective(self.student, batch)

    def scale(self, name: str) -> torch.Tensor:
        """(N, G) scales of a matrix, not yet rounded to fp16."""
        grown: torch.Tensor = (_SCALE_RATE * self.growth[_key(name)]).exp()
        return self.get_buffer(_key(name)) * grown


def quantized_objective(objective: Objective) -> Objective:
    """An objective of the model that a ``QuantizedStudent`` holds, with code * scale in the place of its matrices."""

    def on_codes(model: Any, batch: Batch) -> LossSum:
        named = {f"student.{name}": value for name, value in fake_quantized(model).items()}
        loss: LossSum = functional_call(model, named, (objective, batch))
        return loss

    return on_codes


def fake_quantized(model: QuantizedStudent) -> dict[str, torch.Tensor]:
    """Every matrix (N, K) by name as the forward pass multiplies by it, with gradients for places and scales."""
    quantize: Any = _FakeQuantize.apply
    return {
        name: quantize(model.student.get_parameter(name), model.scale(name), grid) for name, grid in model.grids.items()
    }


@torch.no_grad()
def trained_codes(model: QuantizedStudent) -> dict[str, QuantizedTensor]:
    """Codes and scales of every matrix: dequantized they are ``fake_quantized``, bit for bit."""
    found = {}
    for name, grid in model.grids.items():
        places = model.student.get_parameter(name)
        codes = _grouped(_rounded(places, grid), grid.group).flatten(1)
        found[name] = pack(codes, to_fp16(model.scale(name)), grid, places.shape[1])
    return found


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
        low, high = grid.code_range
        codes, rounded = _rounded(places, grid), to_fp16(scale).unsqueeze(-1)
        ctx.save_for_backward((places >= low - 0.5) & (places <= high + 0.5), codes, rounded)
        ctx.group = grid.group
        return (_grouped(codes, grid.group) * rounded).flatten(1)[:, : places.shape[1]]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        inside, codes, scale = ctx.saved_tensors
        gradient = _grouped(gradients[0], ctx.group)
        of_scale = (gradient * _grouped(codes, ctx.group)).sum(dim=-1)
        if not ctx.needs_input_grad[0]:
            return None, of_scale, None
        return (gradient * scale).flatten(1)[:, : codes.shape[1]] * inside, of_scale, None


def _rounded(places: torch.Tensor, grid: Grid) -> torch.Tensor:
    return places.round().clamp_(*grid.code_range)


def _grouped(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """(N, G, group), the last group padded with zeros."""
    return functional.pad(matrix, (0, -matrix.shape[1] % group)).view(len(matrix), -1, group)


def _key(name: str) -> str:
    """Names of parameters hold no dots."""
    return name.replace(".", "/")
