"""Where the teacher's distribution comes from: computed now, or stored as draws.

Stored targets are ``draws`` samples with replacement from the teacher's p at T = 1 for each
position. The mean of ``-log q(draw)`` is an unbiased estimate of the cross entropy of p and q, so
its gradient is that of the forward KL; a stored top-k is biased (Sparse Logit Sampling, 2025,
arXiv 2503.16870).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DenseSignal:
    """Teacher log-probabilities (B, T, V)."""

    log_probs: torch.Tensor


@dataclass(frozen=True, slots=True)
class SparseSignal:
    """Drawn ids (B, T, D) int64; each stands for a mass of 1 / D."""

    ids: torch.Tensor


Signal = DenseSignal | SparseSignal


class SignalSource(Protocol):
    """Gives the teacher's signal for rows of the token sequences."""

    def signal(self, rows: NDArray[np.int64], tokens: torch.Tensor) -> Signal:
        """Signal for sequences ``rows`` (B,) whose tokens are (B, T)."""


@dataclass(frozen=True, slots=True)
class StoredSource:
    """Draws read from disk, mapped: (S, T, D)."""

    draws: NDArray[np.integer]

    @classmethod
    def open(cls, path: Path) -> StoredSource:
        """Map the file that the targets stage wrote."""
        return cls(np.load(path, mmap_mode="r", allow_pickle=False))

    def signal(self, rows: NDArray[np.int64], tokens: torch.Tensor) -> Signal:
        """Draws of the rows."""
        return SparseSignal(torch.from_numpy(self.draws[rows].astype(np.int64)))


@dataclass(frozen=True, slots=True)
class OnlineSource:
    """The teacher itself, run on every batch."""

    teacher: torch.nn.Module

    def signal(self, rows: NDArray[np.int64], tokens: torch.Tensor) -> Signal:
        """Log-probabilities of the batch."""
        with torch.no_grad():
            logits = self.teacher(input_ids=tokens, use_cache=False).logits
        return DenseSignal(torch.log_softmax(logits.float(), dim=-1))


def draw(logits: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Sample ids (B, T, D) with replacement from softmax(logits) (B, T, V).

    Inverse transform on the cumulative distribution with sorted uniforms: one search a position,
    and equal ids end up adjacent. The order of draws carries no information.
    """
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    uniforms = torch.rand(*logits.shape[:-1], draws, generator=generator, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniforms.sort(dim=-1).values * cumulative[..., -1:], right=True)
    return ids.clamp_(max=logits.shape[-1] - 1)
