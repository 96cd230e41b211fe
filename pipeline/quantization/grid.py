"""Which codes and scales a weight may take."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.formats.int4 import CODE_RANGE

_GROUPS = (128, 64, 32)


@dataclass(frozen=True, slots=True)
class Grid:
    """Values ``code * scale``, one fp16 scale a group of input dimensions.

    Attributes:
        bits: 4 (codes in [-8, 7]) or 8 (codes in [-127, 127]).
        group: Input dimensions that share a scale; 0 is one scale for a whole weight (8 bits).
        positive_scales: Scales are above zero, as XNNPACK wants them; otherwise a scale takes the sign that lets the
            group's largest weight use the longer side of the 4-bit range, as GGUF's Q4_0 does.
    """

    bits: int
    group: int
    positive_scales: bool

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return CODE_RANGE[self.bits]


def fitting_group(columns: int, group: int) -> int:
    """The largest of 128, 64 and 32, up to ``group``, that divides a matrix's columns: nothing is padded then.

    Where none does it is ``group`` itself, and columns are filled up to whole groups.
    """
    return next((size for size in _GROUPS if size <= group and columns % size == 0), group)


def padded_columns(columns: int, group: int) -> int:
    """Columns in whole groups of ``fitting_group``."""
    fitting = fitting_group(columns, group)
    return -(-columns // fitting) * fitting


def stored_bytes(shape: tuple[int, ...], grid: Grid) -> int:
    """Codes and fp16 scales of a matrix (N, K), K padded to whole groups."""
    return shape[0] * -(-shape[1] // grid.group) * (grid.group * grid.bits // 8 + 2)
