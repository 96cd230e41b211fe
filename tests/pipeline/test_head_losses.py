"""Fused losses against the plain ones over whole logits, TRL's function among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from edge_runtime.formats.errors import UserError
from pipeline.distillation.divergences import LossKind, dense_divergence, overwrite_dense
from pipeline.distillation.head_losses import Labels, head_loss
from pipeline.distillation.signals import DenseSignal, SparseSignal

POSITIONS, WIDTH, TEACHER_WIDTH, VOCABULARY = 11, 6, 9, 23
DENSE = (
    LossKind.FORWARD_KL,
    LossKind.REVERSE_KL,
    LossKind.SKEW_FORWARD_KL,
    LossKind.SKEW_REVERSE_KL,
    LossKind.JSD,
)


def plain_loss(kind: LossKind, student: torch.Tensor, teacher: torch.Tensor, beta: float, skew: float) -> torch.Tensor:
    """Each loss as its paper defines it, by torch's kl_div over whole logits, (N, V) -> (N,)."""
    log_q, log_p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    def mixed(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
        return (share * log_a.exp() + (1 - share) * log_b.exp()).log()

    return {
        LossKind.FORWARD_KL: lambda: kl(log_p, log_q),
        LossKind.REVERSE_KL: lambda: kl(log_q, log_p),
        LossKind.SKEW_FORWARD_KL: lambda: kl(log_p, mixed(log_p, log_q, skew)),
        LossKind.SKEW_REVERSE_KL: lambda: kl(log_q, mixed(log_q, log_p, skew)),
        LossKind.JSD: lambda: (
            beta * kl(log_p, mixed(log_p, log_q, beta)) + (1 - beta) * kl(log_q, mixed(log_p, log_q, beta))
        ),
    }[kind]()


@pytest.fixture(scope="module")
def trl_jsd() -> Callable[..., torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, says TRL at import
        from trl.experimental.gkd import GKDTrainer
    loss: Callable[..., torch.Tensor] = GKDTrainer.generalized_jsd_loss
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_jsd_and_its_ends_are_trls(trl_jsd: Callable[..., torch.Tensor], beta: float, temperature: float) -> None:
    student, teacher = _student(torch.float64), _teacher(torch.float64)
    labels = torch.zeros(1, POSITIONS, dtype=torch.int64).masked_fill(~_counts(), -100)
    logits = [(hidden @ head.T)[None] for hidden, head in (student, (teacher.hidden, teacher.head))]
    expected = trl_jsd(*logits, labels=labels, beta=beta, temperature=temperature, reduction="sum")
    wanted = torch.autograd.grad(expected, student)
    value = head_loss(*student, teacher, LossKind.JSD, _counts(), 4, temperature=temperature, beta=beta)
    torch.testing.assert_close(value.total, expected, rtol=1e-12, atol=0)
    for found, want in zip(torch.autograd.grad(value.total, student), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_dense_losses_and_gradients_are_the_plain_ones(kind: LossKind, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = _student(dtype), _teacher(dtype)
    wide = [tensor.double().detach().requires_grad_() for tensor in student]
    logits = wide[0] @ wide[1].T / 1.3, teacher.hidden.double() @ teacher.head.double().T / 1.3
    expected = plain_loss(kind, *logits, beta=0.3, skew=0.2)[_counts()].sum()
    value = head_loss(*student, teacher, kind, _counts(), 3, temperature=1.3, beta=0.3, skew=0.2)
    assert value.total.dtype == dtype and float(value.weight) == int(_counts().sum())
    torch.testing.assert_close(value.total.double(), expected, rtol=tolerance, atol=0)
    scaled = torch.autograd.grad(value.total / 7, student)
    for found, want in zip(scaled, torch.autograd.grad(expected / 7, wide), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", DENSE)
def test_gradients_are_those_of_finite_differences(kind: LossKind) -> None:
    teacher = _teacher(torch.float64)

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return head_loss(hidden, head, teacher, kind, _counts(), 4, temperature=0.8, beta=0.4, skew=0.3).total

    assert torch.autograd.gradcheck(total, _student(torch.float64))


def test_sampled_loss_is_cross_entropy_against_the_weights() -> None:
    student = _student(torch.float64)
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:5] for _ in range(POSITIONS)])
    weights = torch.rand(POSITIONS, 5, generator=generator)
    weights[2, 3:], ids[2, 3:] = 0, 0  # unused places
    weights /= weights.sum(-1, keepdim=True)
    share = torch.zeros(POSITIONS, VOCABULARY).scatter_add(1, ids, weights).double()
    expected = functional.cross_entropy(student[0] @ student[1].T, share, reduction="none")[_counts()].sum()
    wanted = torch.autograd.grad(expected, student)
    value = head_loss(*student, SparseSignal(ids, weights), LossKind.SAMPLED_KL, _counts(), 4)
    torch.testing.assert_close(value.total, expected, rtol=1e-13, atol=0)
    for found, want in zip(torch.autograd.grad(value.total, student), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-13)


def test_equal_ids_of_a_position_add_up() -> None:
    student = _student(torch.float64)
    twice = SparseSignal(torch.tensor([[4, 4, 7]] * POSITIONS), torch.tensor([[0.25, 0.25, 0.5]] * POSITIONS))
    once = SparseSignal(torch.tensor([[4, 7]] * POSITIONS), torch.tensor([[0.5, 0.5]] * POSITIONS))
    results = [
        (value.total, *torch.autograd.grad(value.total, student))
        for value in (head_loss(*student, signal, LossKind.SAMPLED_KL) for signal in (twice, once))
    ]
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-14, atol=1e-15)


def test_cross_entropy_is_torchs() -> None:
    student = _student(torch.float64)
    labels = torch.arange(POSITIONS) * 2
    expected = functional.cross_entropy(student[0] @ student[1].T, labels, reduction="sum")
    value = head_loss(*student, Labels(labels), LossKind.CROSS_ENTROPY, None, 4)
    torch.testing.assert_close(value.total, expected, rtol=1e-13, atol=0)
    wanted = torch.autograd.grad(expected, student)
    for found, want in zip(torch.autograd.grad(value.total, student), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("chunk_tokens", [1, 4, POSITIONS, 100])
def test_chunks_change_nothing_but_rounding(kind: LossKind, chunk_tokens: int) -> None:
    whole, parts = (_run(kind, _teacher(torch.float32), _counts(), size) for size in (POSITIONS, chunk_tokens))
    for found, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=2e-6)


def test_the_same_inputs_give_the_same_bits() -> None:
    first, second = (_run(LossKind.JSD, _teacher(torch.float32), _counts(), 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_masked_positions_may_hold_anything() -> None:
    teacher, (hidden, head) = _teacher(torch.float32), _student(torch.float32)
    clean = _run(LossKind.FORWARD_KL, teacher, _counts(), 4)
    spoiled_teacher = DenseSignal(teacher.hidden.masked_fill(~_counts()[:, None], torch.nan), teacher.head)
    spoiled = hidden.detach().masked_fill(~_counts()[:, None], torch.inf).requires_grad_()
    total = head_loss(spoiled, head, spoiled_teacher, LossKind.FORWARD_KL, _counts(), 4).total
    found = (total, *torch.autograd.grad(total, (spoiled, head)))
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert not found[1][~_counts()].any()


@pytest.mark.parametrize("kind", DENSE)
def test_a_counted_position_that_is_not_finite_makes_the_total_nan(kind: LossKind) -> None:
    hidden, head = _student(torch.float32)
    spoiled = hidden.detach().clone()
    spoiled[3, 2] = torch.nan
    assert bool(_counts()[3])
    assert bool(head_loss(spoiled, head, _teacher(torch.float32), kind, _counts()).total.isnan())


@pytest.mark.parametrize("kind", DENSE)
def test_probabilities_that_vanish_leave_loss_and_gradients_finite(kind: LossKind) -> None:
    generator = torch.Generator().manual_seed(9)
    hidden, head = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 4), (50, 4)))
    teacher = DenseSignal(torch.randn(5, 4, generator=generator) * 200, torch.randn(50, 4, generator=generator))
    total = head_loss(hidden * 200, head, teacher, kind).total
    log_q = torch.log_softmax(hidden.double() @ head.double().T * 200, -1)
    assert bool((log_q.float().exp() == 0).any())
    assert all(bool(torch.isfinite(x).all()) for x in (total, *torch.autograd.grad(total, (hidden, head))))


@pytest.mark.parametrize("kind", DENSE)
def test_a_token_that_both_exclude_is_as_if_it_were_not_there(kind: LossKind) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    excluded = [torch.cat((logits, torch.full((5, 1), -torch.inf)), dim=1) for logits in (student, teacher)]
    divergence = dense_divergence(kind, 1.2, beta=0.3, skew=0.2)
    losses = overwrite_dense(divergence, student, teacher)
    torch.testing.assert_close(overwrite_dense(divergence, *excluded), losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(excluded[0][:, :9], student, rtol=0, atol=1e-15)
    assert not excluded[0][:, 9].any()


@pytest.mark.parametrize("counts", [torch.zeros(POSITIONS, dtype=torch.bool), None])
def test_a_batch_without_counted_positions_is_zero_with_zero_gradients(counts: torch.Tensor | None) -> None:
    hidden, head = _student(torch.float32)
    teacher = _teacher(torch.float32)
    if counts is None:
        hidden, teacher = hidden.detach()[:0].requires_grad_(), DenseSignal(teacher.hidden[:0], teacher.head)
    value = head_loss(hidden, head, teacher, LossKind.JSD, counts)
    gradients = torch.autograd.grad(value.total, (hidden, head))
    assert float(value.total.detach()) == 0 and float(value.weight) == 0
    assert all(not gradient.any() for gradient in gradients) and gradients[1].shape == head.shape


@pytest.mark.parametrize("surplus", [-3, 3])
def test_surplus_rows_of_one_head_are_padding(surplus: int) -> None:
    teacher, (hidden, head) = _teacher(torch.float32), _student(torch.float32)
    shared = VOCABULARY - 3
    heads = (head, teacher.head[:shared]) if surplus > 0 else (head.detach()[:shared].requires_grad_(), teacher.head)
    value = head_loss(hidden, heads[0], DenseSignal(teacher.hidden, heads[1]), LossKind.FORWARD_KL)
    cut = head_loss(hidden, head[:shared], DenseSignal(teacher.hidden, teacher.head[:shared]), LossKind.FORWARD_KL)
    assert torch.equal(value.total, cut.total)
    (gradient,) = torch.autograd.grad(value.total, heads[0])
    assert gradient.shape == heads[0].shape and not gradient[shared:].any() and bool(gradient[:shared].any())
    with pytest.raises(UserError, match=r"up to 2 rows of padding"):
        signal = DenseSignal(teacher.hidden, heads[1])
        head_loss(hidden, heads[0], signal, LossKind.FORWARD_KL, max_vocabulary_padding=2)


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    positions, vocabulary, chunk = 64, 4096, 4
    generator = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, 2, generator=generator).requires_grad_() for n in (positions, vocabulary))
    teacher = DenseSignal(torch.randn(positions, 2, generator=generator), torch.randn(vocabulary, 2))
    with _Largest() as largest:
        head_loss(hidden, head, teacher, LossKind.JSD, None, chunk).total.backward()
    assert largest.elements == chunk * vocabulary


def test_a_head_that_does_not_learn_costs_no_gradient_and_evaluation_none_at_all() -> None:
    teacher, (hidden, head) = _teacher(torch.float32), _student(torch.float32)
    with _Products() as frozen:
        head_loss(hidden, head.detach(), teacher, LossKind.FORWARD_KL).total.backward()
    with _Products() as evaluated, torch.no_grad():
        head_loss(hidden, head, teacher, LossKind.FORWARD_KL)
    assert (frozen.count, evaluated.count) == (3, 2)
    assert hidden.grad is not None and head.grad is None


def test_bf16_hidden_states_beside_an_fp32_head_keep_the_heads_gradient_in_fp32() -> None:
    hidden, head = _student(torch.float32)
    teacher = _teacher(torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    total = head_loss(narrow, head, teacher, LossKind.FORWARD_KL, None, 4).total
    of_hidden, of_head = torch.autograd.grad(total, (narrow, head))
    assert (total.dtype, of_hidden.dtype, of_head.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    wanted = _run(LossKind.FORWARD_KL, teacher, None, POSITIONS)
    for found, want in zip((total.detach(), of_hidden, of_head), wanted, strict=True):
        assert float((found.float() - want).norm() / want.norm()) < 1e-2
    assert not torch.equal(of_head, of_head.bfloat16().float())


def test_autocast_sets_the_type_of_the_products() -> None:
    hidden, head = _student(torch.float32)
    teacher = _teacher(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        automatic = head_loss(hidden, head, teacher, LossKind.FORWARD_KL).total
    by_hand = head_loss(hidden.bfloat16(), head, teacher, LossKind.FORWARD_KL).total
    assert automatic.dtype == torch.float32 and torch.equal(automatic, by_hand)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(automatic, (hidden, head)))


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("beta", {"beta": 1.1}),
        ("skew", {"skew": 1.0}),
        ("chunk_tokens", {"chunk_tokens": 0}),
        ("kind", {"loss": LossKind.SAMPLED_KL}),
        ("kind", {"loss": LossKind.CROSS_ENTROPY}),
    ],
)
def test_numbers_and_pairs_that_make_no_sense_are_refused(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"loss.{field}"):
        head_loss(*_student(torch.float32), _teacher(torch.float32), **{"loss": LossKind.JSD, **arguments})


def test_stored_draws_are_learned_at_temperature_one_only() -> None:
    with pytest.raises(UserError, match=r"loss\.temperature"):
        head_loss(*_student(torch.float32), _draws(0), LossKind.SAMPLED_KL, temperature=2.0)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="do not fit a vocabulary of 23"):
        head_loss(*_student(torch.float32), _draws(wrong), LossKind.SAMPLED_KL)


def test_shapes_that_disagree_are_refused() -> None:
    (hidden, head), teacher = _student(torch.float32), _teacher(torch.float32)
    with pytest.raises(ValueError, match="11 positions of the student"):
        head_loss(hidden, head, DenseSignal(teacher.hidden[1:], teacher.head), LossKind.JSD)
    with pytest.raises(ValueError, match="11 positions of the student"):
        head_loss(hidden, head, teacher, LossKind.JSD, _counts()[1:])
    with pytest.raises(ValueError, match="not bool"):
        head_loss(hidden, head, teacher, LossKind.JSD, _counts().long())
    with pytest.raises(ValueError, match=r"not \(N, H\) and \(V, H\)"):
        head_loss(hidden, teacher.head, teacher, LossKind.JSD)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", DENSE)
def test_the_kernels_are_the_formulas(kind: LossKind) -> None:
    teacher = _teacher(torch.float32)
    plain = _run(kind, teacher, _counts(), 4)
    hidden, head = (tensor.detach().cuda().requires_grad_() for tensor in _student(torch.float32))
    total = head_loss(hidden, head, DenseSignal(teacher.hidden.cuda(), teacher.head.cuda()), kind, _counts(), 4).total
    for found, want in zip((total, *torch.autograd.grad(total, (hidden, head))), plain, strict=True):
        torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in str(func)
        return func(*args, **(kwargs or {}))


def _run(
    kind: LossKind, teacher: DenseSignal, counts: torch.Tensor | None, chunk_tokens: int
) -> tuple[torch.Tensor, ...]:
    student = _student(torch.float32)
    total = head_loss(*student, teacher, kind, counts, chunk_tokens).total
    return total.detach(), *torch.autograd.grad(total, student)


def _student(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()


def _teacher(dtype: torch.dtype) -> DenseSignal:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(POSITIONS, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, TEACHER_WIDTH, generator=generator, dtype=torch.float64)
    return DenseSignal(hidden.to(dtype), head.to(dtype))


def _draws(last: int) -> SparseSignal:
    return SparseSignal(torch.tensor([[3, last]] * POSITIONS), torch.full((POSITIONS, 2), 0.5))


def _counts() -> torch.Tensor:
    counts = torch.ones(POSITIONS, dtype=torch.bool)
    counts[[0, 4, 5, 10]] = False
    return counts
