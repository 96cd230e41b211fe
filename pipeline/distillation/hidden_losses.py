"""The hidden-state loss: a student's layer is drawn towards a teacher's, position by position.

Both states are brought to unit root mean square first, so that the loss says how far their directions
are apart and not how loud the two residual streams are: it is ``2 (1 - cosine)``. Widths that differ
meet in a linear map of the student's state, which learns with the student and is thrown away after.
"""

from __future__ import annotations

import torch

from pipeline.distillation.batches import LossSum

_SMALLEST_SQUARE = 1e-12


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


def _normalised(states: torch.Tensor) -> torch.Tensor:
    """(N, H) with a root mean square of 1, in fp32 or wider."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scale: torch.Tensor = wide.square().mean(dim=-1, keepdim=True).clamp_min(_SMALLEST_SQUARE).sqrt()
    return wide / scale
