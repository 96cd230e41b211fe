"""bf16 weights with fp32 originals against AdamW on fp32 weights."""

from __future__ import annotations

import copy

import torch

from pipeline.distillation.master_weights import attach_masters

LEARNING_RATE = 1e-5  # far below bf16's resolution at 1: without originals nothing would move


def test_steps_too_small_for_bf16_add_up_in_the_masters() -> None:
    model = _model().bfloat16()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    reference = copy.deepcopy(model).float()
    weights = attach_masters(model.parameters())
    optimizer = torch.optim.AdamW(weights.masters, lr=LEARNING_RATE)
    plain = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE)
    for seed in range(400):
        inputs = _inputs(seed)
        model(inputs.bfloat16()).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        weights.publish()
        reference.zero_grad()
        reference(inputs).square().sum().backward()
        plain.step()
    for parameter, master, start, want in zip(
        weights.parameters, weights.masters, before, reference.parameters(), strict=True
    ):
        moved = float((want - start.float()).detach().norm())
        assert float((master - want).detach().norm()) < 0.05 * moved
        assert torch.equal(parameter.detach(), master.detach().bfloat16())
        assert not torch.equal(parameter.detach(), start)


def test_gradients_of_several_passes_are_summed_in_fp32_and_freed() -> None:
    model = _model().bfloat16()
    single = []
    for seed in range(8):
        model.zero_grad()
        model(_inputs(seed).bfloat16()).sum().backward()
        single.append([parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    weights = attach_masters(model.parameters())
    for seed in range(8):
        model(_inputs(seed).bfloat16()).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    for index, master in enumerate(weights.masters):
        expected = single[0][index].clone()
        for gradients in single[1:]:
            expected += gradients[index]
        assert master.grad is not None and master.grad.dtype == torch.float32
        assert torch.equal(master.grad, expected)


def test_a_tied_parameter_is_given_once_and_sums_both_uses() -> None:
    table = torch.nn.Parameter(torch.randn(4, 3).bfloat16())
    weights = attach_masters([table])
    (table[1].sum() + (table @ torch.ones(3, dtype=torch.bfloat16)).sum()).backward()
    assert weights.masters[0].grad is not None
    expected = torch.ones(4, 3)
    expected[1] = 2
    assert torch.equal(weights.masters[0].grad, expected)


def test_detached_parameters_keep_their_gradients() -> None:
    model = _model()
    attach_masters(model.parameters()).detach()
    model(_inputs(0)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def _inputs(seed: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
