"""The losses against torch's own, and the sampled one against the dense one in expectation."""

from __future__ import annotations

import torch
from torch.nn import functional

from pipeline.distillation.losses import dense_kl, forward_kl, next_token_loss, sampled_cross_entropy
from pipeline.distillation.signals import DenseSignal, SparseSignal, draw

DRAWS = 4096


def test_next_token_loss_is_that_of_transformers_shift() -> None:
    logits, tokens = _logits(1, (3, 7, 20)), torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(1))
    rows = [functional.cross_entropy(logits[b, t], tokens[b, t + 1]) for b in range(3) for t in range(6)]
    torch.testing.assert_close(next_token_loss(logits, tokens), torch.stack(rows).mean(), rtol=1e-6, atol=0)


def test_dense_kl_is_torchs() -> None:
    log_p, log_q = (torch.log_softmax(_logits(seed, (2, 5, 30)).double(), -1) for seed in (2, 3))
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(dense_kl(log_p, log_q), expected, rtol=1e-12, atol=0)


def test_forward_kl_of_a_dense_signal_averages_positions() -> None:
    logits, log_p = _logits(2, (2, 5, 30)), torch.log_softmax(_logits(3, (2, 5, 30)), -1)
    log_q = torch.log_softmax(logits, -1).reshape(10, 30)
    expected = functional.kl_div(log_q, log_p.reshape(10, 30), reduction="batchmean", log_target=True)
    torch.testing.assert_close(forward_kl(logits, DenseSignal(log_p)), expected, rtol=1e-6, atol=0)
    assert abs(float(forward_kl(log_p, DenseSignal(log_p)))) < 1e-7


def test_forward_kl_computes_in_fp32_what_came_in_bf16() -> None:
    logits, log_p = _logits(2, (1, 5, 30)).bfloat16(), torch.log_softmax(_logits(3, (1, 5, 30)), -1)
    value = forward_kl(logits, DenseSignal(log_p))
    assert value.dtype == torch.float32 and torch.equal(value, forward_kl(logits.float(), DenseSignal(log_p)))


def test_sampled_loss_is_cross_entropy_with_each_draw_as_the_label() -> None:
    logits = _logits(4, (2, 3, 25))
    ids = torch.randint(25, (2, 3, 6), generator=torch.Generator().manual_seed(3))
    expected = functional.cross_entropy(logits[:, :, None].expand(-1, -1, 6, -1).reshape(-1, 25), ids.reshape(-1))
    for value in (sampled_cross_entropy(logits, SparseSignal(ids)), forward_kl(logits, SparseSignal(ids))):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_the_sampled_gradient_is_the_dense_one_in_expectation() -> None:
    """Gradient q - p_hat against q - p: the difference is a multinomial mean of known covariance."""
    teacher, logits = _logits(5, (1, 4, 12)).double(), _logits(6, (1, 4, 12)).double().requires_grad_()
    log_p = torch.log_softmax(teacher, -1)
    # forward_kl casts to fp32; scaling keeps the comparison at the statistical error, 1e-2, far above 1e-7
    (dense,) = torch.autograd.grad(forward_kl(logits, DenseSignal(log_p)), logits)
    ids = draw(teacher, DRAWS, torch.Generator().manual_seed(7))
    (sampled,) = torch.autograd.grad(forward_kl(logits, SparseSignal(ids)), logits)
    p = log_p.exp()
    deviation = (p * (1 - p) / DRAWS).sqrt() / 4  # averaged over four positions
    z = ((sampled - dense) / deviation).flatten()
    assert float(z.abs().max()) < 4 and 0.6 < float(z.square().mean()) < 1.6
    (exact,) = torch.autograd.grad(dense_kl(log_p, torch.log_softmax(logits, -1)).mean(), logits)
    torch.testing.assert_close(dense, exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(exact, (torch.softmax(logits, -1) - p).detach() / 4, rtol=0, atol=1e-12)


def _logits(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
