"""A full vocabulary's targets and sequences, made to fit a trimmed one.

Two ways for a drawn id that was dropped. ``vocabulary.new_ids`` as the table: it is left out and the rest of the
position weighs more; the student learns p given "a kept token". ``first_pieces`` as the table: it stands for the first
piece of its string, which is what a student of the trimmed vocabulary writes next; no mass is lost.

Stored draws take the second: a position has few of them, and where the teacher was sure of a dropped token the first
way would leave none. A teacher that runs beside the student takes the first, exactly: rows of its output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.distillation.scoring import HeldOut
from pipeline.distillation.signals import DenseSignal, SparseSignal, checked_head, last_hidden

if TYPE_CHECKING:
    from pipeline.distillation.batches import Batch
    from pipeline.distillation.stored_targets import StoredTargets

_NO_SOURCE = -1


@dataclass(frozen=True, slots=True)
class RemappedDraws:
    """A sparse signal in new ids.

    Attributes:
        ids: (..., K) int64, distinct where the weight is not 0.
        weights: (..., K) float32; they sum to 1, or to 0 where nothing of a position was kept (do not count it).
        kept_mass: (...) float32: the share of the teacher's draws that found a place; its mean belongs in a report.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    kept_mass: torch.Tensor


@dataclass(frozen=True, slots=True)
class RemappedTokens:
    """Sequences in new ids, as long as the old ones: what dropped tokens add in pieces is cut at the end.

    Attributes:
        tokens: (S, T) int32.
        source: (S, T) int64: the old position whose prediction holds here; -1 inside a token that fell to pieces.
        counts: (S, T) bool: positions with a source that counted before.
    """

    tokens: NDArray[np.int32]
    source: NDArray[np.int64]
    counts: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TrimmedStoredSource:
    """Stored targets for a student with a trimmed vocabulary.

    Attributes:
        targets: As the teacher wrote them.
        first_pieces: From ``first_pieces``.
        source: (S, T), as in ``RemappedTokens``; where it is -1 the signal is another position's and does not count.
    """

    targets: StoredTargets
    first_pieces: NDArray[np.int64]
    source: NDArray[np.int64]

    def prepare(self, batch: Batch) -> Batch:
        """The batch with its draws, for the thread that makes batches ahead of the training loop.

        Raises:
            UserError: As ``StoredTargets.signal``.
        """
        found = self.targets.signal(batch)
        places = torch.from_numpy(np.maximum(self.source[batch.rows], 0))[..., None].expand(-1, -1, found.ids.shape[-1])
        draws = remap_ids(found.ids.gather(1, places), found.weights.gather(1, places), self.first_pieces)
        return replace(batch, signal=SparseSignal(draws.ids, draws.weights))

    def signal(self, batch: Batch) -> SparseSignal:
        """The draws that were prepared, or else those prepared now."""
        prepared = batch if isinstance(batch.signal, SparseSignal) else self.prepare(batch)
        found: SparseSignal = prepared.signal
        return found


@dataclass(frozen=True, slots=True)
class TrimmedOnlineSource:
    """A teacher with the full vocabulary beside a student with a trimmed one: its p given a kept token.

    It reads the run's text in its own tokens; what the student wrote itself it reads in the student's, each of which it
    has.

    Attributes:
        teacher: Any causal model with the full vocabulary.
        head: (V', H), rows of its output matrix.
        kept_ids: (V',) the old id of each new one.
        tokens: (S, T) the teacher's sequences.
        source: (S, T), as in ``RemappedTokens``.
        bf16: Multiply in bfloat16.
    """

    teacher: Any
    head: torch.Tensor
    kept_ids: torch.Tensor
    tokens: NDArray[np.int32]
    source: NDArray[np.int64]
    bf16: bool

    @classmethod
    def open(
        cls, teacher: Any, kept_ids: NDArray[np.int64], tokens: NDArray[np.int32], source: NDArray[np.int64], bf16: bool
    ) -> TrimmedOnlineSource:
        """Take a causal teacher.

        Raises:
            UserError: Its logits are not its hidden states times its output matrix.
        """
        ids = torch.from_numpy(kept_ids)
        head = checked_head(teacher)
        return cls(teacher, head[ids.to(head.device)], ids, tokens, source, bf16)

    def signal(self, batch: Batch) -> DenseSignal:
        """Hidden states where the student's tokens end, and the rows of kept tokens."""
        if not len(batch.rows):
            return self._said(last_hidden(self.teacher, self.kept_ids[batch.tokens.cpu()], self.bf16))
        hidden = last_hidden(self.teacher, torch.from_numpy(self.tokens[batch.rows].astype(np.int64)), self.bf16)
        places = torch.from_numpy(np.maximum(self.source[batch.rows], 0)).to(hidden.device)
        return self._said(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))

    def _said(self, hidden: torch.Tensor) -> DenseSignal:
        return DenseSignal(hidden.to(self.head.device), self.head)


def first_pieces(pieces: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    """(V,) the first new id of each old token's string; -1 for rows without a token."""
    return np.array([piece[0] if piece else _NO_SOURCE for piece in pieces], np.int64)


def remap_ids(ids: torch.Tensor, weights: torch.Tensor, table: NDArray[np.int64]) -> RemappedDraws:
    """Draws of a teacher with the full vocabulary as draws for a student with a trimmed one.

    Args:
        ids: (..., K) int64 old ids.
        weights: (..., K) non-negative; 0 pads.
        table: (V,) new id of each old one, -1 to leave it out.

    Raises:
        UserError: An id that carries weight is outside the table.
    """
    outside = (weights > 0) & ((ids < 0) | (ids >= len(table)))
    if bool(outside.any()):
        raise UserError("targets", int(ids[outside][0]), f"ids below {len(table)}", "record them with this teacher")
    new = torch.from_numpy(table).to(ids.device)[ids.clamp(0, len(table) - 1)]
    held = torch.where(new >= 0, weights, torch.zeros_like(weights)).float()
    order = torch.where(held > 0, new, len(table)).sort(dim=-1)  # what is left out goes last
    held = held.gather(-1, order.indices)
    starts = torch.ones_like(order.values, dtype=torch.bool)
    starts[..., 1:] = order.values[..., 1:] != order.values[..., :-1]
    slots = starts.long().cumsum(dim=-1) - 1  # equal ids share a slot
    summed = torch.zeros_like(held).scatter_add_(-1, slots, held)
    distinct = torch.zeros_like(order.values).scatter_(-1, slots, order.values)
    kept, total = summed.sum(dim=-1), weights.float().sum(dim=-1)
    unit = torch.where(kept > 0, kept, torch.ones_like(kept))
    share = kept / torch.where(total > 0, total, torch.ones_like(total))
    return RemappedDraws(torch.where(summed > 0, distinct, 0), summed / unit[..., None], share)


def remap_tokens(
    sequences: NDArray[np.integer[Any]], counts: NDArray[np.bool_] | None, pieces: Sequence[tuple[int, ...]]
) -> RemappedTokens:
    """Packed sequences (S, T) of the full vocabulary in new ids.

    Args:
        sequences: Old ids.
        counts: Which predictions are learned (S, T); None: all.
        pieces: What ``token_pieces`` gave.

    Raises:
        UserError: A sequence holds an id that has no token.
    """
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    flat = np.array([index for piece in pieces for index in piece], np.int32)
    tokens = np.empty(sequences.shape, np.int32)
    source = np.empty(sequences.shape, np.int64)
    width = sequences.shape[1]
    for row, old in enumerate(sequences):
        old_ids = np.asarray(old, np.int64)
        if not (int(old_ids.min()) >= 0 and int(old_ids.max()) < len(lengths) and lengths[old_ids].all()):
            raise UserError("sequences", f"row {row}", "ids that the tokenizer has", "pack them with this tokenizer")
        size = lengths[old_ids]
        position = np.repeat(np.arange(len(old_ids)), size)[:width]
        within = np.arange(len(position)) - (np.cumsum(size) - size)[position]
        tokens[row] = flat[starts[old_ids[position]] + within]
        source[row] = np.where(within == size[position] - 1, position, _NO_SOURCE)
    counted = source >= 0
    if counts is not None:
        counted &= np.take_along_axis(np.asarray(counts), np.maximum(source, 0), axis=1)
    return RemappedTokens(tokens, source, counted)


def remap_held_out(
    held_out: HeldOut, pieces: Sequence[tuple[int, ...]], new_ids: NDArray[np.int64], text_bytes: NDArray[np.int32]
) -> HeldOut:
    """Held-out text and what the teacher says of it, for a trimmed vocabulary: its p given a kept token.

    The log of a position's kept mass is taken from its draws, so that the divergence is too high by about
    (1 - m) / (2 m D) nats where a share m of p is kept.

    Args:
        held_out: In the teacher's ids, with draws.
        pieces: What ``token_pieces`` gave.
        new_ids: (V,) the new id of each old one, -1 for those dropped.
        text_bytes: (V',) bytes of text that each new token stands for.

    Raises:
        UserError: The student keeps no token that was drawn.
    """
    if held_out.draws is None or held_out.log_p is None or held_out.top1 is None:
        raise ValueError("held-out text without draws has nothing to remap")
    found = remap_tokens(held_out.tokens, None, pieces)
    places, has_source = np.maximum(found.source, 0), found.source >= 0
    drawn = np.take_along_axis(held_out.draws.astype(np.int64), places[..., None], axis=1)
    draws = np.where(has_source[..., None], new_ids[drawn], _NO_SOURCE)
    kept = (draws >= 0).mean(axis=-1, keepdims=True)
    if not kept.any():
        raise UserError("submodel.vocab_size", len(text_bytes), "tokens that the teacher writes", "keep more of them")
    log_p = np.take_along_axis(held_out.log_p, places[..., None], axis=1) - np.log(np.where(kept > 0, kept, 1))
    top1 = np.where(has_source, new_ids[np.take_along_axis(held_out.top1, places, axis=1)], _NO_SOURCE)
    return HeldOut(
        found.tokens, text_bytes[found.tokens], draws.astype(np.int32),
        np.where(draws >= 0, log_p, 0).astype(np.float32), top1.astype(np.int32),
    )  # fmt: skip
