"""Which codes and scales a weight may take."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.formats.int4 import CODE_RANGE


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
