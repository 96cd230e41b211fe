"""Weighted sums of adapters: exact by joining their ranks, or the nearest adapter of a smaller rank.

An adapter changes a projection by ``scale * lora_b @ lora_a``. A weighted sum of such changes is one change whose rank
is the sum of the ranks: the factors stand side by side, weights and scales go into lora_b. Its best approximation of a
given rank is a truncated singular value decomposition (Eckart and Young, 1936), computed on the factors: the change
itself, (out, in), is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import MAX_RANK, Adapter

Pair = tuple[NDArray[np.float32], NDArray[np.float32]]
MAX_WEIGHT = 100.0


@dataclass(frozen=True, slots=True)
class Composition:
    """A sum of adapters.

    Attributes:
        adapter: With scale 1.
        error: What was cut off relative to the whole change, as a ratio of Frobenius norms over all modules, in [0, 1];
            0 for an exact sum.
    """

    adapter: Adapter
    error: float


def compose_adapters(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None) -> Composition:
    """``sum(weight * change)`` of adapters of one base.

    Args:
        adapters: One or more; a module that one of them lacks is not changed by it.
        weights: One each, not 0, at most 100 either way; negative ones take a change away.
        rank: Of the result, 1 to the sum of the ranks; None: the sum, which is exact.

    Raises:
        UserError: Different bases, too high a rank, or a weight out of range.
    """
    _check(adapters, weights)
    total = sum(adapter.rank for adapter in adapters)
    if rank is None and total > MAX_RANK:
        raise UserError("rank", total, f"at most {MAX_RANK} ranks together", "give a rank, the sum is cut to it")
    if rank is not None and not 1 <= rank <= min(total, MAX_RANK):
        raise UserError("rank", rank, f"1 to {min(total, MAX_RANK)}, the ranks together")
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.pairs))
    joined = {module: _join(adapters, weights, module) for module in modules}
    if rank is None or rank == total:
        return Composition(Adapter(total, 1.0, joined, adapters[0].base_digest), 0.0)
    pairs, kept, whole = {}, 0.0, 0.0
    for module, pair in joined.items():
        pairs[module], squares = _truncate(pair, rank)
        kept, whole = kept + float(squares[:rank].sum()), whole + float(squares.sum())
    error = math.sqrt(max(0.0, 1 - kept / whole)) if whole else 0.0
    return Composition(Adapter(rank, 1.0, pairs, adapters[0].base_digest), error)


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise UserError("compose", f"{len(adapters)} adapters, {len(weights)} weights", "as many weights as adapters")
    for weight in weights:
        if not (math.isfinite(weight) and 0 < abs(weight) <= MAX_WEIGHT):
            raise UserError("compose", weight, f"weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, not 0")
    bases = {adapter.base_digest for adapter in adapters}
    if len(bases) > 1 or None in bases:
        shown = ", ".join(sorted(str(base)[:12] for base in bases))
        raise UserError("compose", f"adapters of bases {shown}", "adapters of one base")


def _join(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Pair:
    """lora_a (R, in) and lora_b (out, R); ranks of an adapter that lacks the module are zeros."""
    rows, columns = next(
        (lora_b.shape[0], lora_a.shape[1])
        for lora_a, lora_b in (a.pairs[module] for a in adapters if module in a.pairs)
    )
    parts = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if module in adapter.pairs:
            lora_a, lora_b = adapter.pairs[module]
            parts.append((lora_a, (weight * adapter.scale * lora_b.astype(np.float64)).astype(np.float32)))
        else:
            parts.append((np.zeros((adapter.rank, columns), np.float32), np.zeros((rows, adapter.rank), np.float32)))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts], axis=1)


def _truncate(pair: Pair, rank: int) -> tuple[Pair, NDArray[np.float64]]:
    """The nearest pair of a rank, and the squared singular values of the whole product."""
    of_b, triangle_b = np.linalg.qr(pair[1].astype(np.float64))
    of_a, triangle_a = np.linalg.qr(pair[0].T.astype(np.float64))
    left, values, right = np.linalg.svd(triangle_b @ triangle_a.T)
    root = np.sqrt(values[:rank])
    lora_b, lora_a = of_b @ left[:, :rank] * root, (right[:rank] @ of_a.T) * root[:, None]
    missing = rank - len(root)  # a matrix may be narrower than the rank
    lora_a, lora_b = np.pad(lora_a, ((0, missing), (0, 0))), np.pad(lora_b, ((0, 0), (0, missing)))
    return (lora_a.astype(np.float32), lora_b.astype(np.float32)), values**2
