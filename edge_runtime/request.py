"""What is asked of a generation, and how one ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from edge_runtime.formats.errors import UserError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000


class FinishReason(Enum):
    """Why a generation ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, and when to end. ``edge_runtime.sampling`` says what each number does.

    Attributes:
        temperature: 0 takes the most probable token every time; then top_k, top_p and seed have no effect.
        top_k: Keep this many of the most probable tokens; None keeps all.
        top_p: Keep the fewest most probable tokens that reach this probability; 1 keeps all.
        seed: The same seed, package, backend and thread count give the same text. None: fresh each time.
        max_tokens: End after this many tokens.
        stop: End before any of these strings would appear in the text.

    Raises:
        UserError: A value out of bounds.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every value once, where the request is built."""
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise UserError("temperature", self.temperature, "0 (most probable token) to 100")
        if self.top_k is not None and self.top_k < 1:
            raise UserError("top_k", self.top_k, "1 or more", "leave it out to keep every token")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p", self.top_p, "above 0, up to 1", "1 keeps every token")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError("seed", self.seed, "0 to 2**63 - 1")
        if self.max_tokens < 1:
            raise UserError("max_tokens", self.max_tokens, "1 or more")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise UserError("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS}")
        for stop in self.stop:
            if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
                raise UserError("stop", stop[:40], f"1 to {MAX_STOP_CHARACTERS} characters")


@dataclass(frozen=True, slots=True)
class Token:
    """One step of a generation.

    Attributes:
        id: What was sampled.
        text: Text that became certain with it; often empty, sometimes of several tokens.
        finish_reason: Set on the last token only.
    """

    id: int
    text: str
    finish_reason: FinishReason | None
