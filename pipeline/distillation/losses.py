"""Losses over logits (B, T, V), averaged over positions."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.distillation.signals import DenseSignal, Signal, SparseSignal


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of position t's logits against token t + 1."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))


def forward_kl(logits: torch.Tensor, signal: Signal) -> torch.Tensor:
    """KL(teacher || student) up to a constant that does not depend on the student.

    With a dense signal the constant is zero. With draws it is the teacher's entropy: the value is
    an unbiased estimate of the cross entropy, and its gradient one of the KL's.
    """
    if isinstance(signal, DenseSignal):
        return dense_kl(signal.log_probs, torch.log_softmax(logits.float(), dim=-1)).mean()
    return sampled_cross_entropy(logits, signal)


def sampled_cross_entropy(logits: torch.Tensor, signal: SparseSignal) -> torch.Tensor:
    """Mean of ``logsumexp(logits) - logits[draw]`` over draws and positions."""
    scores = logits.float()
    picked = scores.gather(-1, signal.ids).mean(dim=-1)
    return (torch.logsumexp(scores, dim=-1) - picked).mean()


def dense_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) a position, from log-probabilities (..., V)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
