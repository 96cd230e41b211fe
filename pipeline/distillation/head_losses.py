"""The loss fused with the output matrix: logits exist for one chunk of positions at a time.

The student's last hidden states meet the head inside the loss. A chunk's logits are overwritten by
their own gradient, which is multiplied into the gradients of hidden states and head at once, in the
forward pass; the backward pass only scales them. The teacher comes as hidden states and head too.
So the peak is two chunks of logits, whatever the batch (Liger Kernel, arXiv 2410.10989, does it for
cross entropy). Masked positions are dropped before any product with a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation import divergences
from pipeline.distillation.batches import LossSum
from pipeline.distillation.divergences import Divergence, LossKind, dense_divergence
from pipeline.distillation.signals import DenseSignal, SparseSignal

DEFAULT_CHUNK_TOKENS = 2048
MAX_VOCABULARY_PADDING = 1024


@dataclass(frozen=True, slots=True)
class Labels:
    """The tokens to predict, (N,) int64: the signal of ``cross_entropy``."""

    ids: torch.Tensor


HeadSignal = DenseSignal | SparseSignal | Labels


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    signal: HeadSignal,
    loss: LossKind,
    counts: torch.Tensor | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    max_vocabulary_padding: int = MAX_VOCABULARY_PADDING,
) -> LossSum:
    """Loss of ``softmax(hidden @ head.T)`` against a signal, summed over counted positions.

    Products are made in the type of ``hidden`` (autocast's where that is on), softmax and sums in
    fp32, the head's gradient is accumulated in fp32; fp64 stays fp64. The same inputs give the same
    bits. A position whose logits are not finite makes the total NaN.

    Args:
        hidden: (N, H), normalised last hidden states of the student.
        head: (V, H), its output matrix; fp32 beside bf16 hidden states is fine.
        signal: For the same N positions; ``DenseSignal(hidden (N, Ht), head (Vt, Ht))``,
            ``SparseSignal(ids (N, K), weights (N, K))`` or ``Labels(ids (N,))``.
        loss: Which loss; see ``LossKind``.
        counts: (N,) bool, positions that count; None counts all. On the CPU beside a GPU's hidden
            states it costs no synchronisation.
        chunk_tokens: Positions whose logits exist at a time, from 1. On a GPU 2,048 fills the chip.
        temperature: Of both softmaxes, above 0; dense losses only. No factor of its square.
        beta: The teacher's share in ``jsd``, 0 to 1.
        skew: Of ``skew_forward_kl`` and ``skew_reverse_kl``, 0 to below 1.
        max_vocabulary_padding: How many rows one head may have more than the other. Surplus rows
            are taken for padding and cut off, so both softmaxes are over the smaller vocabulary.

    Raises:
        UserError: Loss and signal do not go together, or a number is outside its range.
        ValueError: Shapes disagree, or on a CPU an id lies outside the vocabulary (on a GPU, where
            looking costs a synchronisation, the total is NaN then).
    """
    divergence = _divergence(loss, signal, temperature, beta, skew)
    _check_shapes(hidden, head, signal, counts, chunk_tokens)
    if counts is not None:
        index = counts.nonzero().squeeze(-1).to(hidden.device, non_blocking=True)
        hidden, signal = hidden.index_select(0, index), _select(signal, index)
    vocabulary = _vocabulary(head, signal, max_vocabulary_padding)
    if hidden.device.type == "cpu":
        _check_ids(signal, vocabulary)
    kind = hidden.device.type
    product_type = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    plan = _Plan(signal, divergence, vocabulary, chunk_tokens, product_type, torch.is_grad_enabled())
    with torch.autocast(kind, enabled=False):
        total: torch.Tensor = _HeadLoss.apply(hidden, head, plan)  # type: ignore[no-untyped-call]
    return LossSum(total, total.detach().new_full((), hidden.shape[0]))  # filled there: no copy to wait for


@dataclass(frozen=True, slots=True)
class _Plan:
    signal: HeadSignal
    divergence: Divergence | None
    vocabulary: int
    chunk_tokens: int
    product_type: torch.dtype
    gradients: bool


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, plan: _Plan) -> torch.Tensor:
        of_hidden = hidden.new_zeros(hidden.shape) if plan.gradients and ctx.needs_input_grad[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_head = head.new_zeros(head.shape, dtype=wide) if plan.gradients and ctx.needs_input_grad[1] else None
        matrix = head[: plan.vocabulary].to(plan.product_type)
        losses = hidden.new_zeros(hidden.shape[0], dtype=wide)
        for start in range(0, hidden.shape[0], plan.chunk_tokens):
            rows = slice(start, start + plan.chunk_tokens)
            inputs = hidden[rows].to(plan.product_type)
            logits = inputs @ matrix.T
            losses[rows] = _overwrite(logits, plan, rows)  # now the gradient of the logits
            if of_hidden is not None:
                of_hidden[rows] = logits @ matrix
            if of_head is not None:
                _add_product(of_head[: plan.vocabulary], logits.T, inputs)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(of_hidden, of_head)
        ctx.head_type = head.dtype
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_hidden, of_head = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * scale,
            None if of_head is None else (of_head * scale).to(ctx.head_type),
            None,
        )


def _overwrite(logits: torch.Tensor, plan: _Plan, rows: slice) -> torch.Tensor:
    """Losses of a chunk (n,); its logits (n, V) become their gradient."""
    formulas: Any = divergences
    if logits.is_cuda and logits.dtype is not torch.float64:
        from pipeline.distillation import head_loss_kernels

        formulas = head_loss_kernels
    signal = _select(plan.signal, rows)
    losses: torch.Tensor
    if isinstance(signal, DenseSignal):
        teacher = signal.hidden @ signal.head[: plan.vocabulary].to(signal.hidden.dtype).T
        losses = formulas.overwrite_dense(plan.divergence, logits, teacher)
    elif isinstance(signal, SparseSignal):
        losses = formulas.overwrite_sparse(logits, signal.ids, signal.weights)
    else:
        ones = torch.ones(len(signal.ids), 1, device=logits.device)
        losses = formulas.overwrite_sparse(logits, signal.ids[:, None], ones)
    return losses


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right`` without rounding the product to the narrower type of the factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _divergence(loss: LossKind, signal: HeadSignal, temperature: float, beta: float, skew: float) -> Divergence | None:
    needed = {LossKind.SAMPLED_KL: SparseSignal, LossKind.CROSS_ENTROPY: Labels}.get(loss, DenseSignal)
    if not isinstance(signal, needed):
        step = "stored targets are learned with sampled_kl, an online teacher with the others"
        raise UserError("loss.kind", f"{loss.value} of a {type(signal).__name__}", f"a {needed.__name__}", step)
    if needed is DenseSignal:
        return dense_divergence(loss, temperature, beta, skew)
    if temperature != 1:
        raise UserError("loss.temperature", temperature, f"1 for {loss.value}: draws were made and tokens written at 1")
    return None


def _check_shapes(
    hidden: torch.Tensor, head: torch.Tensor, signal: HeadSignal, counts: torch.Tensor | None, chunk_tokens: int
) -> None:
    if chunk_tokens < 1:
        raise UserError("loss.chunk_tokens", chunk_tokens, "1 or more")
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and head {tuple(head.shape)} are not (N, H) and (V, H)")
    lengths = {len(tensor) for tensor in _by_position(signal)} | ({len(counts)} if counts is not None else set())
    if lengths != {len(hidden)}:
        raise ValueError(f"{len(hidden)} positions of the student meet {sorted(lengths)} of the signal and counts")
    if counts is not None and counts.dtype is not torch.bool:
        raise ValueError(f"counts is {counts.dtype}, not bool")


def _check_ids(signal: HeadSignal, vocabulary: int) -> None:
    if isinstance(signal, DenseSignal) or not signal.ids.numel():
        return
    low, high = (int(edge) for edge in signal.ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"ids from {low} to {high} do not fit a vocabulary of {vocabulary}")


def _vocabulary(head: torch.Tensor, signal: HeadSignal, max_padding: int) -> int:
    """Rows of the heads that both models have."""
    if not isinstance(signal, DenseSignal):
        return head.shape[0]
    students, teachers = head.shape[0], signal.head.shape[0]
    if abs(students - teachers) > max_padding:
        allowed = f"the teacher's {teachers}, or up to {max_padding} rows of padding more or less"
        raise UserError("vocabulary of the student", students, allowed, "share a tokenizer, or use an aligned loss")
    return min(students, teachers)


def _select(signal: HeadSignal, rows: slice | torch.Tensor) -> HeadSignal:
    """The signal of some positions: a slice gives views."""
    if isinstance(signal, DenseSignal):
        return DenseSignal(signal.hidden[rows], signal.head)
    if isinstance(signal, SparseSignal):
        return SparseSignal(signal.ids[rows], signal.weights[rows])
    return Labels(signal.ids[rows])


def _by_position(signal: HeadSignal) -> tuple[torch.Tensor, ...]:
    if isinstance(signal, DenseSignal):
        return (signal.hidden,)
    return (signal.ids, signal.weights) if isinstance(signal, SparseSignal) else (signal.ids,)
