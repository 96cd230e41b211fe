"""Which sequences a step learns from, and how they reach the model in time.

Everything is a function of the step: a run that is killed and started again sees the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss summed over the positions that count, and how many (or how much weight) they are; both scalars.

    Sums of micro-batches and of processes add up to that of the whole batch; means would not.
    """

    total: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """Packed text.

    Attributes:
        tokens: (S, T) int32, possibly mapped from a file.
        counts: (S, T) bool: whether the prediction made at a position, of the token after it, is
            learned; None: all of them.

    Raises:
        UserError: There is no sequence, or the shapes differ.
    """

    tokens: NDArray[np.int32]
    counts: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.size:
            raise UserError("sequences", self.tokens.shape, "at least one sequence (S, T)", "give more text")
        if self.counts is not None and self.counts.shape != self.tokens.shape:
            raise UserError("counts", self.counts.shape, f"the shape of the tokens, {self.tokens.shape}")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one forward pass.

    Attributes:
        rows: (B,) int64, their numbers; empty for text that the student made up.
        tokens: (B, T) int64.
        counts: (B, T) bool, as in ``Sequences``; on the CPU, where to pick positions costs no waiting.
        step: Training step, for whatever is drawn at random.
        signal: What ``prepare`` of the training loop brought along, such as decoded targets.
    """

    rows: NDArray[np.int64]
    tokens: torch.Tensor
    counts: torch.Tensor
    step: int = 0
    signal: Any = None


def batch_rows(step: int, num_sequences: int, batch_sequences: int, seed: int) -> NDArray[np.int64]:
    """Sequence numbers of a step: each epoch is its own permutation; a batch may span two."""
    first = step * batch_sequences
    positions = np.arange(first, first + batch_sequences)
    rows = np.empty(batch_sequences, np.int64)
    for epoch in np.unique(positions // num_sequences):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num_sequences)
        inside = positions // num_sequences == epoch
        rows[inside] = order[positions[inside] % num_sequences]
    return rows


def read_batch(sequences: Sequences, rows: NDArray[np.int64], step: int = 0) -> Batch:
    """The sequences ``rows`` (B,), on the CPU."""
    tokens = sequences.tokens[rows].astype(np.int64)
    counts = np.ones(tokens.shape, np.bool_) if sequences.counts is None else sequences.counts[rows]
    return Batch(rows, torch.from_numpy(tokens), torch.from_numpy(counts), step)


def split_rows(rows: NDArray[np.int64], micro_sequences: int | None) -> list[NDArray[np.int64]]:
    """Parts of at most ``micro_sequences`` rows; None: one part."""
    size = micro_sequences or len(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """Tokens and signal of a batch on ``device``."""
    if device.type == "cuda":  # a thread starts on the first GPU, whichever the process uses
        torch.cuda.set_device(device)
    return replace(batch, tokens=to_device(batch.tokens, device), signal=to_device(batch.signal, device))


def to_device(value: T, device: torch.device) -> T:
    """A tensor, or every tensor of a dataclass, on ``device``; from pinned memory where that is a GPU."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        return pinned.to(device, non_blocking=True)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        moved = {
            field.name: to_device(getattr(value, field.name), device)
            for field in fields(value)
            if isinstance(getattr(value, field.name), torch.Tensor) or is_dataclass(getattr(value, field.name))
        }
        return replace(value, **moved)
    return value


@contextmanager
def prefetched(make: Callable[[int], T], steps: range, ahead: int = 2) -> Iterator[Iterator[T]]:
    """``make(step)`` for every step in order, made by one thread up to ``ahead`` steps before they are asked for.

    An exception of ``make`` is raised where its result would have been. Leaving the block ends the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        pending: deque[Future[T]] = deque()

        def results() -> Iterator[T]:
            for step in steps:
                while len(pending) < ahead and step + len(pending) * steps.step in steps:
                    pending.append(pool.submit(make, step + len(pending) * steps.step))
                yield pending.popleft().result()

        try:
            yield results()
        finally:
            for future in pending:
                future.cancel()
