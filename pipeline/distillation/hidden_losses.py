"""The hidden-state loss: a student's layer is drawn towards a teacher's, position by position.

Both states are brought to unit root mean square first, so that the loss says how far their directions
are apart and not how loud the two residual streams are: it is ``2 (1 - cosine)``. Widths that differ
meet in a linear map of the student's state, which learns with the student and is thrown away after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import LossSum

_SMALLEST_SQUARE = 1e-12
States = Mapping[int, torch.Tensor]
"""Layer, counted from 0, to its hidden states (B, T, H)."""


@dataclass(frozen=True, slots=True)
class HiddenTerm:
    """The hidden-state loss beside another one.

    Attributes:
        teacher: The model that the other loss runs anyway.
        weight: Of the mean over the pairs, above 0.
        pairs: (student's layer, teacher's layer), counted from 0.
    """

    teacher: Any = field(repr=False)
    weight: float
    pairs: tuple[tuple[int, int], ...]


def hidden_term(student: Any, teacher: Any, weight: float, pairs: int) -> HiddenTerm:
    """The term for two transformers models.

    Raises:
        UserError: The student has fewer layers than pairs, or more than the teacher.
    """
    depth, teacher_depth = (len(model.get_decoder().layers) for model in (student, teacher))
    try:
        return HiddenTerm(teacher, weight, layer_pairs(depth, teacher_depth, pairs))
    except ValueError as error:
        allowed = f"1 to {depth}, the student's layers, and a teacher with no fewer"
        raise UserError("distill.hidden_layers", str(error), allowed, "or leave hidden_weight=0") from error


@contextmanager
def projected(student: Any, term: HiddenTerm, seed: int) -> Iterator[None]:
    """Where widths differ, a map for each pair among the student's parameters, until the block ends.

    Whatever trains, spreads and stores the student's parameters does so with the maps.
    """
    width, teacher_width = student.config.hidden_size, term.teacher.config.hidden_size
    if width == teacher_width:
        yield
        return
    generator = torch.Generator().manual_seed(seed)
    maps = torch.nn.ParameterList([start_projection(width, teacher_width, generator) for _ in term.pairs])
    student.hidden_projections = maps.to(student.device)
    try:
        yield
    finally:
        del student.hidden_projections


@contextmanager
def kept_states(model: Any, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Filled by the forward passes in the block: hidden states of ``layers``; no layers, no look at the model.

    As transformers has them in ``hidden_states[layer + 1]``: the last layer's are those after the last norm.
    """
    states: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in layers:
        decoder = model.get_decoder()
        module = decoder if layer == len(decoder.layers) - 1 else decoder.layers[layer]
        hooks.append(module.register_forward_hook(partial(_keep, states, layer)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def add_hidden(
    loss: LossSum, term: HiddenTerm, model: Any, ours: States, theirs: States, counts: torch.Tensor
) -> LossSum:
    """``loss`` with the term added at the same counted positions (B, T)."""
    maps = getattr(model, "hidden_projections", [None] * len(term.pairs))
    parts = []
    for (layer, teacher_layer), weights in zip(term.pairs, maps, strict=True):
        student, teacher = ours[layer], theirs[teacher_layer].to(ours[layer].device)
        parts.append(hidden_loss(student.flatten(0, 1), teacher.flatten(0, 1), counts.flatten(), weights).total)
    return LossSum(loss.total + term.weight * torch.stack(parts).mean(), loss.weight)


def hidden_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    counts: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
) -> LossSum:
    """Mean squared difference over the width of normalised states, summed over counted positions.

    Args:
        student: (N, Hs), hidden states of one layer.
        teacher: (N, Ht), of the layer it is compared with; no gradient flows there.
        counts: (N,) bool, positions that count; None counts all.
        projection: (Ht, Hs), maps the student's states to the teacher's width; None if it is the same.

    Raises:
        ValueError: Shapes disagree.
    """
    width = student.shape[-1] if projection is None else projection.shape[0]
    if student.ndim != 2 or teacher.shape != (len(student), width):
        raise ValueError(f"states {tuple(student.shape)} and {tuple(teacher.shape)} do not meet at width {width}")
    if counts is not None:
        index = counts.nonzero().squeeze(-1).to(student.device, non_blocking=True)
        student, teacher = student.index_select(0, index), teacher.index_select(0, index)
    if projection is not None:
        student = student @ projection.to(student.dtype).T
    difference = _normalised(student) - _normalised(teacher.detach())
    total = difference.square().mean(dim=-1).sum()
    return LossSum(total, total.detach().new_full((), len(student)))


def start_projection(student_width: int, teacher_width: int, generator: torch.Generator) -> torch.nn.Parameter:
    """A random map (Ht, Hs) that keeps lengths in expectation."""
    weights = torch.randn(teacher_width, student_width, generator=generator)
    return torch.nn.Parameter(weights / student_width**0.5)


def layer_pairs(student_layers: int, teacher_layers: int, pairs: int) -> tuple[tuple[int, int], ...]:
    """Which layers are compared: evenly spread, the last with the last, counted from 0.

    Args:
        student_layers: From 1.
        teacher_layers: At least as many.
        pairs: 1 to ``student_layers``.

    Raises:
        ValueError: ``pairs`` or the depths do not fit.
    """
    if not 1 <= pairs <= student_layers <= teacher_layers:
        raise ValueError(f"{pairs} pairs of {student_layers} and {teacher_layers} layers")
    steps = range(1, pairs + 1)
    return tuple((step * student_layers // pairs - 1, step * teacher_layers // pairs - 1) for step in steps)


def _keep(states: dict[int, torch.Tensor], layer: int, _module: Any, _inputs: Any, output: Any) -> None:
    """A forward hook: decoders give ``last_hidden_state``, layers a tensor or a tuple that begins with it."""
    found = getattr(output, "last_hidden_state", output)
    states[layer] = found[0] if isinstance(found, tuple) else found


def _normalised(states: torch.Tensor) -> torch.Tensor:
    """(N, H) with a root mean square of 1, in fp32 or wider."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scale: torch.Tensor = wide.square().mean(dim=-1, keepdim=True).clamp_min(_SMALLEST_SQUARE).sqrt()
    return wide / scale
