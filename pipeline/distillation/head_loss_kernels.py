"""The formulas of ``divergences`` as Triton kernels: one program a position, logits read in their own type.

A program reads its row of student (and teacher) logits once for maxima, sums and whatever the loss
lets it collect online, a second time for mixtures, and a last time while it overwrites the student's
logits by their gradient. Everything between load and store is fp32. Rows are independent and every
reduction has a fixed order: equal inputs give equal bits.
"""

# Triton's language has no types, and the package is only where torch was built for a GPU.
# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from pipeline.distillation.divergences import Divergence, LossKind

BLOCK = 4096
_WARPS = 8
_FORWARD, _REVERSE, _SKEW_FORWARD, _SKEW_REVERSE, _JSD = (tl.constexpr(number) for number in range(5))
_NUMBERS = {
    LossKind.FORWARD_KL: 0,
    LossKind.REVERSE_KL: 1,
    LossKind.SKEW_FORWARD_KL: 2,
    LossKind.SKEW_REVERSE_KL: 3,
    LossKind.JSD: 4,
}


def overwrite_dense(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Divergences (N,) fp32 of logits (N, V) each; ``student`` is overwritten by their gradient."""
    _check_rows(student, teacher)
    losses = torch.empty(student.shape[0], device=student.device)
    share = divergence.teacher_share
    _dense_kernel[(student.shape[0],)](
        student,
        teacher,
        losses,
        student.stride(0),
        teacher.stride(0),
        1 / divergence.temperature,
        share,
        math.log(share) if share > 0 else 0.0,
        math.log1p(-share),
        KIND=_NUMBERS[divergence.kind],
        VOCABULARY=student.shape[1],
        BLOCK=BLOCK,
        num_warps=_WARPS,
    )
    return losses


def overwrite_sparse(student: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross entropies (N,) fp32 of logits (N, V) against ids (N, K) of weights (N, K).

    ``student`` is overwritten by their gradient. Equal ids of a position add up. An id outside the
    vocabulary makes its position's loss NaN.
    """
    _check_rows(student)
    ids, weights = ids.contiguous(), weights.float().contiguous()
    losses = torch.empty(student.shape[0], device=student.device)
    _sparse_kernel[(student.shape[0],)](
        student,
        ids,
        weights,
        losses,
        student.stride(0),
        ids.shape[1],
        DRAWS=max(2, triton.next_power_of_2(ids.shape[1])),
        VOCABULARY=student.shape[1],
        BLOCK=BLOCK,
        num_warps=_WARPS,
    )
    return losses


def _check_rows(*logits: torch.Tensor) -> None:
    for tensor in logits:
        if tensor.ndim != 2 or tensor.stride(1) != 1:
            raise ValueError(f"logits {tuple(tensor.shape)} of strides {tensor.stride()} are not rows")


@triton.jit
def _dense_kernel(
    student_ptr,
    teacher_ptr,
    loss_ptr,
    student_stride,
    teacher_stride,
    inverse_temperature,
    share,
    log_share,
    log_rest,
    KIND: tl.constexpr,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    lane = tl.arange(0, BLOCK)
    top_q = -float("inf")
    top_p = -float("inf")
    mass_q = 0.0
    mass_p = 0.0
    cross = 0.0  # forward: sum of p (log p - log q), reverse: of q (log q - log p), before normalising
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lane < VOCABULARY
        z = tl.load(student_row + start + lane, inside, -float("inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher_row + start + lane, inside, -float("inf")).to(tl.float32) * inverse_temperature
        next_q = tl.maximum(top_q, tl.max(z, 0))
        next_p = tl.maximum(top_p, tl.max(t, 0))
        e_q = tl.exp(z - next_q)
        e_p = tl.exp(t - next_p)
        if KIND == _FORWARD:
            gap = tl.where(e_p == 0, 0.0, e_p * (t - z))
            cross = cross * tl.exp(top_p - next_p) + tl.sum(gap, 0)
        if KIND == _REVERSE:
            gap = tl.where(e_q == 0, 0.0, e_q * (z - t))
            cross = cross * tl.exp(top_q - next_q) + tl.sum(gap, 0)
        mass_q = mass_q * tl.exp(top_q - next_q) + tl.sum(e_q, 0)
        mass_p = mass_p * tl.exp(top_p - next_p) + tl.sum(e_p, 0)
        top_q = next_q
        top_p = next_p
    log_mass_q = top_q + tl.log(mass_q)
    log_mass_p = top_p + tl.log(mass_p)
    loss = 0.0
    mean_slope = 0.0
    if KIND == _FORWARD:
        loss = cross / mass_p - log_mass_p + log_mass_q
    elif KIND == _REVERSE:
        loss = cross / mass_q - log_mass_q + log_mass_p
    else:
        for start in range(0, VOCABULARY, BLOCK):
            inside = start + lane < VOCABULARY
            z = tl.load(student_row + start + lane, inside, -float("inf")).to(tl.float32) * inverse_temperature
            t = tl.load(teacher_row + start + lane, inside, -float("inf")).to(tl.float32) * inverse_temperature
            log_q = z - log_mass_q
            log_p = t - log_mass_p
            q = tl.exp(log_q)
            p = tl.exp(log_p)
            log_m = _log_mixture(log_p, log_q, log_share, log_rest)
            of_p = tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_m)), 0)
            of_q = tl.sum(tl.where(q == 0, 0.0, q * (log_q - log_m)), 0)
            if KIND == _SKEW_FORWARD:
                loss += of_p
                mean_slope += tl.sum(tl.where(p == 0, 0.0, p * tl.exp(log_q + log_rest - log_m)), 0)
            if KIND == _SKEW_REVERSE:
                loss += of_q
                slope = log_q - log_m - tl.exp(log_q + log_rest - log_m)
                mean_slope += tl.sum(tl.where(q == 0, 0.0, q * slope), 0)
            if KIND == _JSD:
                loss += share * of_p + (1 - share) * of_q
                mean_slope += of_q
    tl.store(loss_ptr + row, loss)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lane < VOCABULARY
        z = tl.load(student_row + start + lane, inside, -float("inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher_row + start + lane, inside, -float("inf")).to(tl.float32) * inverse_temperature
        log_q = z - log_mass_q
        log_p = t - log_mass_p
        q = tl.exp(log_q)
        if KIND == _FORWARD:
            gradient = q - tl.exp(log_p)
        elif KIND == _REVERSE:
            gradient = tl.where(q == 0, 0.0, q * (log_q - log_p - loss))
        else:
            log_m = _log_mixture(log_p, log_q, log_share, log_rest)
            if KIND == _SKEW_FORWARD:
                p = tl.exp(log_p)
                gradient = q * mean_slope - tl.where(p == 0, 0.0, p * tl.exp(log_q + log_rest - log_m))
            elif KIND == _SKEW_REVERSE:
                slope = log_q - log_m - tl.exp(log_q + log_rest - log_m)
                gradient = tl.where(q == 0, 0.0, q * (slope - mean_slope))
            else:
                gradient = tl.where(q == 0, 0.0, (1 - share) * q * (log_q - log_m - mean_slope))
        gradient = gradient * inverse_temperature
        tl.store(student_row + start + lane, gradient.to(student_ptr.dtype.element_ty), inside)


@triton.jit
def _log_mixture(log_p, log_q, log_share, log_rest):
    """log(share p + (1 - share) q) without leaving logarithms."""
    a = log_p + log_share
    b = log_q + log_rest
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _sparse_kernel(
    student_ptr,
    ids_ptr,
    weights_ptr,
    loss_ptr,
    student_stride,
    draws,
    DRAWS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student_ptr + row * student_stride
    lane = tl.arange(0, BLOCK)
    draw = tl.arange(0, DRAWS)
    ids = tl.load(ids_ptr + row * draws + draw, draw < draws, -1)
    weights = tl.load(weights_ptr + row * draws + draw, draw < draws, 0.0)
    known = (ids >= 0) & (ids < VOCABULARY)
    unknown = (draw < draws) & (known == 0)
    picked = tl.load(student_row + ids, known, 0.0).to(tl.float32)
    same = ids[:, None] == ids[None, :]
    merged = tl.sum(tl.where(same, weights[None, :], 0.0), 1)  # equal ids all store the same value
    top = -float("inf")
    mass = 0.0
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lane < VOCABULARY
        z = tl.load(student_row + start + lane, inside, -float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    log_mass = top + tl.log(mass)
    weight = tl.sum(weights, 0)
    loss = weight * log_mass - tl.sum(weights * picked, 0)
    loss = tl.where(tl.sum(unknown.to(tl.int32), 0) > 0, float("nan"), loss)
    tl.store(loss_ptr + row, loss)
    for start in range(0, VOCABULARY, BLOCK):
        inside = start + lane < VOCABULARY
        z = tl.load(student_row + start + lane, inside, -float("inf")).to(tl.float32)
        gradient = weight * tl.exp(z - log_mass)
        tl.store(student_row + start + lane, gradient.to(student_ptr.dtype.element_ty), inside)
    tl.debug_barrier()  # the row is written before its drawn places are written again
    at_draws = weight * tl.exp(picked - log_mass) - merged
    tl.store(student_row + ids, at_draws.to(student_ptr.dtype.element_ty), known)
