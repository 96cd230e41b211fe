"""How far the student's distribution q is from the teacher's p, a position, with the gradient in closed form.

Every divergence is a sum over the vocabulary of a function of p and q. With q = softmax(z) its
gradient with respect to z is ``q * (g - sum(q * g))``, g the derivative of the sum's term with
respect to q, so no graph of logits is kept. Logits of the student are overwritten by the gradient.

These are the plain formulas, on any device; ``head_loss_kernels`` holds the same ones for a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from edge_runtime.formats.errors import UserError


class LossKind(StrEnum):
    """What a student learns from a signal.

    The first five need a dense signal. p is the teacher, q the student, m a mixture of both:

    - ``forward_kl``: KL(p || q), covers all of the teacher's modes.
    - ``reverse_kl``: KL(q || p), seeks one mode.
    - ``skew_forward_kl``: KL(p || s p + (1 - s) q); ``skew_reverse_kl``: KL(q || (1 - s) p + s q)
      (DistiLLM, arXiv 2402.03898), bounded where one of the two has no mass.
    - ``jsd``: b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q (GKD, arXiv 2306.13649);
      its ends b = 0 and b = 1 are defined there as forward and reverse KL.
    - ``sampled_kl``: cross entropy against stored draws: forward KL up to the teacher's entropy.
    - ``cross_entropy``: against labels.
    """

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    SKEW_FORWARD_KL = "skew_forward_kl"
    SKEW_REVERSE_KL = "skew_reverse_kl"
    JSD = "jsd"
    SAMPLED_KL = "sampled_kl"
    CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, slots=True)
class Divergence:
    """A dense divergence: its kind, the teacher's share of the mixture m, and the temperature of both softmaxes."""

    kind: LossKind
    teacher_share: float
    temperature: float


def dense_divergence(kind: LossKind, temperature: float, beta: float, skew: float) -> Divergence:
    """Check the numbers of a dense divergence and bring them to one form.

    Args:
        kind: One of the five dense kinds.
        temperature: Divides both logits, above 0. The loss is not multiplied by its square.
        beta: The teacher's share in ``jsd``, 0 to 1.
        skew: The share of the first distribution mixed into the second of ``skew_*``, 0 to below 1.

    Raises:
        UserError: A number outside its range.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError("loss.temperature", temperature, "a finite number above 0")
    if not 0 <= beta <= 1:
        raise UserError("loss.beta", beta, "0 to 1")
    if not 0 <= skew < 1:
        raise UserError("loss.skew", skew, "0 to below 1")
    if kind is LossKind.JSD and beta in (0, 1):
        kind = LossKind.FORWARD_KL if beta == 0 else LossKind.REVERSE_KL
    if kind is LossKind.SKEW_FORWARD_KL and skew == 0:
        kind = LossKind.FORWARD_KL
    if kind is LossKind.SKEW_REVERSE_KL and skew == 0:
        kind = LossKind.REVERSE_KL
    share = {LossKind.JSD: beta, LossKind.SKEW_FORWARD_KL: skew, LossKind.SKEW_REVERSE_KL: 1 - skew}
    return Divergence(kind, share.get(kind, 0.0), temperature)


def overwrite_dense(divergence: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Divergences (N,) of logits (N, V) each; ``student`` is overwritten by their gradient.

    Computed in fp32, in fp64 where the student's logits are.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(wide) / divergence.temperature, dim=-1)
    log_p = torch.log_softmax(teacher.to(wide) / divergence.temperature, dim=-1)
    losses, gradient = _FORMULAS[divergence.kind](log_p, log_q, divergence.teacher_share)
    student.copy_(gradient.div_(divergence.temperature))
    return losses


def overwrite_sparse(student: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross entropies (N,) of logits (N, V) against ids (N, K) int64 of weights (N, K) fp32.

    ``student`` is overwritten by their gradient. Equal ids of a position add up.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(wide), dim=-1)
    weights = weights.to(wide)
    losses = -(log_q.gather(-1, ids) * weights).sum(dim=-1)
    gradient = log_q.exp_().mul_(weights.sum(dim=-1, keepdim=True)).scatter_add_(-1, ids, -weights)
    student.copy_(gradient)
    return losses


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, _share: float) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    return _expectation(p, log_p - log_q), log_q.exp() - p


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, _share: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, ratio = log_q.exp(), log_q - log_p
    losses = _expectation(q, ratio)
    return losses, _product(q, ratio - losses[:, None])


def _skew_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    p, q, log_m = log_p.exp(), log_q.exp(), _log_mixture(log_p, log_q, share)
    moved = _product(p, (log_q + math.log1p(-share) - log_m).exp())
    return _expectation(p, log_p - log_m), q * moved.sum(dim=-1, keepdim=True) - moved


def _skew_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, log_m = log_q.exp(), _log_mixture(log_p, log_q, share)
    ratio = log_q - log_m
    slope = ratio - (ratio + math.log1p(-share)).exp()
    return _expectation(q, ratio), _product(q, slope - _expectation(q, slope)[:, None])


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    q, log_m = log_q.exp(), _log_mixture(log_p, log_q, share)
    ratio = log_q - log_m
    of_student = _expectation(q, ratio)
    losses = share * _expectation(log_p.exp(), log_p - log_m) + (1 - share) * of_student
    return losses, _product(q, ratio - of_student[:, None]).mul_(1 - share)


_FORMULAS = {
    LossKind.FORWARD_KL: _forward_kl,
    LossKind.REVERSE_KL: _reverse_kl,
    LossKind.SKEW_FORWARD_KL: _skew_forward_kl,
    LossKind.SKEW_REVERSE_KL: _skew_reverse_kl,
    LossKind.JSD: _jsd,
}


def _log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _expectation(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return _product(p, values).sum(dim=-1)


def _product(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """p * values, and 0 where p is 0 whatever the value: its logarithm may be infinite there."""
    return torch.where(p == 0, 0.0, p * values)
