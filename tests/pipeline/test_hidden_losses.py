"""The hidden-state loss against torch's cosine, and which layers meet."""

from __future__ import annotations

import pytest
import torch

from pipeline.distillation.hidden_losses import hidden_loss, layer_pairs, start_projection


def test_it_is_twice_one_minus_the_cosine_whatever_the_lengths() -> None:
    student, teacher = _states(1, 5), _states(2, 5) * 30
    expected = 2 * (1 - torch.cosine_similarity(student, teacher)).sum()
    value = hidden_loss(student, teacher)
    torch.testing.assert_close(value.total, expected, rtol=1e-12, atol=0)
    assert int(value.weight) == 7
    assert float(hidden_loss(teacher * 4, teacher).total) < 1e-12


def test_a_projection_meets_the_teachers_width_and_learns() -> None:
    student, teacher = _states(1, 3).requires_grad_(), _states(2, 5)
    projection = start_projection(3, 5, torch.Generator().manual_seed(0)).double().detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: hidden_loss(s, teacher, None, p).total, (student, projection))
    total = hidden_loss(student, teacher, None, projection).total
    expected = 2 * (1 - torch.cosine_similarity(student @ projection.T, teacher)).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def test_masked_positions_may_hold_anything_and_the_teacher_learns_nothing() -> None:
    counts = torch.tensor([True, False, True, True, False, True, True])
    student, teacher = _states(1, 5), _states(2, 5)
    expected = hidden_loss(student[counts], teacher[counts]).total
    spoiled = student.masked_fill(~counts[:, None], torch.nan).requires_grad_()
    watched = teacher.clone().requires_grad_()
    value = hidden_loss(spoiled, watched, counts)
    assert torch.equal(value.total.detach(), expected) and int(value.weight) == 5
    value.total.backward()
    assert spoiled.grad is not None and not spoiled.grad[~counts].any() and watched.grad is None
    nothing = hidden_loss(spoiled, teacher, torch.zeros(7, dtype=torch.bool))
    assert float(nothing.total.detach()) == 0 and int(nothing.weight) == 0


def test_a_state_of_zeros_has_a_finite_gradient() -> None:
    student = torch.zeros(7, 5, requires_grad=True)
    hidden_loss(student, _states(2, 5).float()).total.backward()
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_layers_are_spread_evenly_and_the_last_meets_the_last() -> None:
    assert layer_pairs(24, 28, 1) == ((23, 27),)
    assert layer_pairs(6, 12, 3) == ((1, 3), (3, 7), (5, 11))
    assert layer_pairs(3, 3, 3) == ((0, 0), (1, 1), (2, 2))


@pytest.mark.parametrize(("students", "teachers", "pairs"), [(4, 3, 1), (4, 8, 5), (4, 8, 0)])
def test_layers_that_cannot_be_paired_are_refused(students: int, teachers: int, pairs: int) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs of {students} and {teachers} layers"):
        layer_pairs(students, teachers, pairs)


def test_widths_that_differ_without_a_projection_are_refused() -> None:
    with pytest.raises(ValueError, match="do not meet at width 3"):
        hidden_loss(_states(1, 3), _states(2, 5))


def _states(seed: int, width: int) -> torch.Tensor:
    return torch.randn(7, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
