"""Where the teacher's distribution comes from: computed now, or stored as draws.

Stored targets are samples with replacement from the teacher's p at T = 1. With weights that are
counts over draws, the sum of ``-weight log q(id)`` is an unbiased estimate of the cross entropy of p
and q, and so is its gradient; a stored top-k is biased (Sparse Logit Sampling, 2025, arXiv 2503.16870).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.fast_layers import uncompiled

if TYPE_CHECKING:
    from pipeline.distillation.batches import Batch
    from pipeline.distillation.stored_targets import StoredTargets

_BLOCK_TOKENS = 64  # about sqrt(V / D), and a divisor of every vocabulary padded for matrix units
_QUANTA = 2**52  # a probability as an integer: sums are exact, and equal in any order
_PROBE_TOKENS = 6
_CHANGING_LOGITS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}


@dataclass(frozen=True, slots=True)
class DenseSignal:
    """The teacher's last hidden states (B, T, H), normalised, and its output matrix (V, H)."""

    hidden: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, slots=True)
class SparseSignal:
    """Distinct drawn ids (B, T, K) int64 and weights (B, T, K) float32, which sum to 1; unused places weigh 0."""

    ids: torch.Tensor
    weights: torch.Tensor


Signal = DenseSignal | SparseSignal


class SignalSource(Protocol):
    """Gives the teacher's signal for a batch of sequences."""

    def signal(self, batch: Batch) -> Signal:
        """Signal for the sequences of ``batch``."""


@dataclass(frozen=True, slots=True)
class OnlineSource:
    """The teacher itself, run on every batch; whole logits never exist."""

    teacher: Any
    head: torch.Tensor
    bf16: bool

    @classmethod
    def open(cls, teacher: Any, bf16: bool) -> OnlineSource:
        """Take a causal teacher.

        Raises:
            UserError: The teacher's logits are not its hidden states times its output matrix.
        """
        return cls(teacher, checked_head(teacher), bf16)

    def signal(self, batch: Batch) -> DenseSignal:
        """Hidden states of the batch, on the output matrix's device."""
        return DenseSignal(last_hidden(self.teacher, batch.tokens, self.bf16).to(self.head.device), self.head)


@dataclass(frozen=True, slots=True)
class StoredSource:
    """Stored targets."""

    targets: StoredTargets

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its draws, for the thread that makes batches ahead of the training loop.

        Raises:
            UserError: The rows or their length are not those that were stored, or a shard was damaged since.
        """
        return replace(batch, signal=self.targets.signal(batch))

    def signal(self, batch: Batch) -> SparseSignal:
        """The draws that were prepared, or else decoded now, on the batch's device.

        Raises:
            UserError: As ``prepare``.
        """
        found = batch.signal if isinstance(batch.signal, SparseSignal) else self.targets.signal(batch)
        device = batch.tokens.device
        return SparseSignal(found.ids.to(device), found.weights.to(device))


def draw(logits: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Sample ids (..., D), ascending, with replacement from softmax(logits) (..., V).

    Inverse transform; for large vocabularies in two levels: the block of 64 tokens that a uniform falls into,
    then the token within, so that only sums of blocks go over the whole vocabulary.

    Args:
        logits: Float; float32 is computed in.
        draws: Samples a position.
        generator: On any device; the uniforms are made there.

    Raises:
        FloatingPointError: A position's logits are not finite.
    """
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    masses = torch.softmax(logits.reshape(-1, vocabulary), dim=-1, dtype=torch.float32)
    if vocabulary % _BLOCK_TOKENS:
        masses = torch.nn.functional.pad(masses, (0, -vocabulary % _BLOCK_TOKENS))
    blocks = masses.unflatten(-1, (-1, _BLOCK_TOKENS))  # (P, N, 64)
    sums = blocks.sum(dim=-1)
    # Made while the device still sums: the check below waits for it.
    uniforms = torch.rand(len(masses), draws, generator=generator, device=generator.device, dtype=torch.float64)
    if not bool(torch.isfinite(sums).all()):
        raise FloatingPointError("the teacher's logits are not finite")
    uniforms = uniforms.to(logits.device).sort(dim=-1).values
    if vocabulary <= _BLOCK_TOKENS * draws:  # the blocks chosen are no less than all of them
        return _invert(masses, uniforms)[0].reshape(*shape, draws)
    chosen, fractions = _invert(sums, uniforms)
    inside = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, _BLOCK_TOKENS))  # (P, D, 64)
    places, _ = _invert(inside, fractions.unsqueeze(-1))
    return (chosen * _BLOCK_TOKENS + places.squeeze(-1)).reshape(*shape, draws)


def _invert(masses: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where points (..., D) in [0, 1) fall among masses (..., N), and how far into the one they fall into.

    Masses become integers: sums do not depend on the order of additions, and nothing falls on a zero.
    """
    ends = (masses.double() * _QUANTA).long().cumsum(dim=-1)
    targets = (points * ends[..., -1:]).long()  # below the last end, as points are at most 1 - 2**-53
    chosen = torch.searchsorted(ends, targets, right=True)
    chosen = chosen.clamp_max(masses.shape[-1] - 1)  # for many masses, each less than a quantum
    before = torch.where(chosen > 0, ends.gather(-1, (chosen - 1).clamp_min(0)), 0)
    width = (ends.gather(-1, chosen) - before).clamp_min(1)
    return chosen, (targets - before).double() / width.double()


@torch.no_grad()
def last_hidden(teacher: Any, tokens: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Hidden states (B, T, H) after the last norm, on the device where the teacher leaves them."""
    device = teacher.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        hidden: torch.Tensor = teacher.get_decoder()(input_ids=tokens.to(device), use_cache=False).last_hidden_state
    return hidden


@torch.no_grad()
def head_logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits (P, V) float32 of hidden (P, H); on a GPU also the sums of bf16 products stay float32."""
    hidden = hidden.to(head.device, head.dtype)
    if head.is_cuda and head.dtype != torch.float32:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    return (hidden @ head.T).float()


@torch.no_grad()
def checked_head(teacher: Any) -> torch.Tensor:
    """The output matrix (V, H) of a causal teacher, tied or not.

    A few tokens are run to see that ``head @ hidden`` are the logits, and that no position sees a later one.

    Raises:
        UserError: The teacher has no such matrix, scales or caps its logits, or is not causal.
    """
    name = type(teacher).__name__
    output = teacher.get_output_embeddings() if hasattr(teacher, "get_output_embeddings") else None
    weight = getattr(output, "weight", None)
    if weight is None or weight.is_meta or not weight.is_floating_point() or weight.ndim != 2:
        raise UserError("teacher", name, "a causal language model with its output matrix in memory, as floats")
    changes = [
        key for key, plain in _CHANGING_LOGITS.items() if getattr(teacher.config, key, plain) not in (plain, None)
    ]
    if getattr(output, "bias", None) is not None or changes:
        raise UserError(
            "teacher", name, f"logits that are one matrix times the hidden states (not {changes or 'bias'})"
        )
    head: torch.Tensor = weight.detach()
    tokens = torch.arange(_PROBE_TOKENS).remainder(len(head)).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % len(head)
    with uncompiled():
        hidden = last_hidden(teacher, tokens, bf16=False)
        logits: torch.Tensor = teacher(input_ids=tokens.to(teacher.device), use_cache=False).logits
    if not bool(torch.isfinite(hidden).all()):
        raise UserError("teacher", name, "weights that give finite hidden states", "load it in bf16 or fp32")
    expected = logits.float()
    _require_close(name, hidden[0, :-1], hidden[1, :-1], 0.01, "a causal model: no position sees a later one")
    found = head_logits(hidden.flatten(0, 1), head).to(expected.device)
    _require_close(name, found, expected.flatten(0, 1), 0.05, "logits that are one matrix times the last hidden states")
    return head


def _require_close(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float, allowed: str) -> None:
    """Tolerances are what 8-bit layers and bf16 logits may differ between two runs."""
    expected = expected.float()
    if not bool((found.float() - expected).abs().max() <= tolerance * expected.abs().max() + 1e-6):
        raise UserError("teacher", name, allowed)
