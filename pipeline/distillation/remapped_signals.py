"""A full vocabulary's targets and sequences, made to fit a trimmed one.

Two ways for a drawn id that was dropped. ``vocabulary.new_ids`` as the table: it is left out and the rest of the
position weighs more; the student learns p given "a kept token". ``first_pieces`` as the table: it stands for the first
piece of its string, which is what a student of the trimmed vocabulary writes next; no mass is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

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
