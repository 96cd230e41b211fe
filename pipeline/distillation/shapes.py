"""Sizes of a student, from those of its teacher: what pruning cuts to and a plan counts with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_runtime.formats.errors import UserError

SIZE_STEP = 32


@dataclass(frozen=True, slots=True)
class StudentShape:
    """Sizes of a student; heads are counted in KV groups."""

    hidden_size: int
    intermediate_size: int
    num_kv_heads: int
    num_layers: int


def student_shape(teacher: Any, ratios: Any, initialiser: Any | None = None) -> StudentShape:
    """Ratios of a teacher's config, rounded to 32 and to whole KV groups; absolute sizes win.

    Args:
        teacher: A transformers config. Ratios are always of its sizes, so that a student has the same shape
            whether it is cut from the teacher or from another student.
        ratios: A SubmodelConfig.
        initialiser: The config of the model that the student is cut from, when that is not the teacher.

    Raises:
        UserError: A size is larger than that of the model it is cut from.
    """
    shape = StudentShape(
        ratios.hidden_size or _rounded(teacher.hidden_size, ratios.width, SIZE_STEP),
        ratios.intermediate_size or _rounded(teacher.intermediate_size, ratios.ffn, SIZE_STEP),
        ratios.num_kv_heads or _rounded(teacher.num_key_value_heads, ratios.heads, 1),
        ratios.num_layers or _rounded(teacher.num_hidden_layers, ratios.depth, 1),
    )
    require_inside(teacher, shape, "submodel", "teacher")
    if initialiser is not None:
        require_inside(initialiser, shape, "submodel", "initialiser")
    return shape


def require_inside(config: Any, shape: StudentShape, field: str = "student", role: str = "teacher") -> None:
    """Refuse a student that is larger than the model it is cut from.

    Raises:
        UserError: Naming the size.
    """
    limits = (config.hidden_size, config.intermediate_size, config.num_key_value_heads, config.num_hidden_layers)
    for name, limit in zip(StudentShape.__slots__, limits, strict=True):
        if not 1 <= getattr(shape, name) <= limit:
            raise UserError(f"{field}.{name}", getattr(shape, name), f"at most the {role}'s {limit}")


def _rounded(size: int, ratio: float, step: int) -> int:
    return size if ratio == 1 else min(size, max(step, round(size * ratio / step) * step))
