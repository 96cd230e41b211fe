"""Defaults of the command line; the only place where they stand."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.formats.errors import UserError


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How a package is run when the user says nothing.

    Attributes:
        threads: Threads of the runtime; None: every core that this process may use.
        bench_prompt_tokens: Length of the prompt that ``bench`` prefills, in tokens.
        bench_tokens: Tokens that ``bench`` decodes after it.
        bench_repeat: How often ``bench`` does both.
    """

    threads: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0
    max_tokens: int = 128
    bench_prompt_tokens: int = 64
    bench_tokens: int = 64
    bench_repeat: int = 3


DEFAULTS = RuntimeConfig()


def choose_threads(threads: int | None, cores: int) -> int:
    """Threads to run with.

    Raises:
        UserError: Fewer than one, or more than 256.
    """
    if threads is None:
        return cores
    if not 1 <= threads <= 256:
        raise UserError("--threads", threads, "1 to 256", f"this device has {cores} usable cores")
    return threads
