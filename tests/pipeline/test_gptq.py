"""GPTQ against a slow oracle, against rounding alone, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.quantization import gptq
from pipeline.quantization.gptq import accumulate_hessian, make_hessian, quantize_with_hessian
from pipeline.quantization.grid import Grid
from pipeline.quantization.rounding import quantize_tensor
from pipeline.quantization.scales import candidates, pack, quantize_weighted, to_fp16, unpack

GRIDS = [Grid(bits, 32, positive) for bits in (4, 8) for positive in (True, False)]


def _inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated, of uneven energy."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.logspace(0, 1, columns)[torch.randperm(columns, generator=generator)] / columns**0.5


def _weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def _uniform(columns: int) -> torch.Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(0))


def _hessian(inputs: torch.Tensor) -> torch.Tensor:
    hessian = make_hessian(inputs.shape[1])
    accumulate_hessian(hessian, inputs)
    return hessian


def _error(weight: torch.Tensor, tensor: QuantizedTensor, hessian: torch.Tensor) -> float:
    left = weight.double() - torch.from_numpy(dequantize(tensor)).double()
    return float(((left @ hessian.double()) * left).sum())


def test_the_hessian_is_the_sum_over_batches_of_any_shape() -> None:
    inputs = _inputs(60, 24)
    hessian = make_hessian(24)
    for batch in (inputs[:10].view(2, 5, 24), inputs[10:]):
        accumulate_hessian(hessian, batch)
    torch.testing.assert_close(hessian.double(), inputs.double().T @ inputs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_those_of_direct_optimal_brain_quantization(grid: Grid) -> None:
    """With the scales given: column after column, the rest updated by the inverse of what is left, in float64."""
    weight, hessian = _weight(6, 64), _hessian(_inputs(300, 64))
    found = quantize_with_hessian(weight, hessian.clone(), grid)
    scales = torch.from_numpy(found.scales.astype(np.float64)).repeat_interleave(32, dim=1)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(64, dtype=torch.float64)
    energy = hessian.diagonal().view(2, 32)
    order = [
        group * 32 + column
        for group in energy.sum(dim=1).argsort(stable=True).tolist()
        for column in energy[group].argsort(stable=True).tolist()
    ]
    left, codes, remaining = weight.double().clone(), torch.zeros(6, 64), list(order)
    while remaining:
        column = remaining[-1]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        codes[:, column] = (left[:, column] / scales[:, column]).round().clamp(*grid.code_range)
        error = (left[:, column] - codes[:, column] * scales[:, column]) / inverse[-1, -1]
        left[:, remaining] -= error[:, None] * inverse[-1]
        remaining.pop()
    agree = (codes.numpy() == found.codes).mean()
    assert agree >= (0.995 if grid.bits == 4 else 0.97)  # what lies on an edge may fall to either side in float32


@settings(deadline=None, max_examples=25)
@given(
    columns=st.sampled_from([32, 64, 96, 172]), rows=st.integers(1, 9), samples=st.integers(8, 400),
    grid=st.sampled_from(GRIDS[:2]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_its_outputs_are_nearer_than_those_of_rounding_and_of_least_squares(
    columns: int, rows: int, samples: int, grid: Grid, seed: int
) -> None:
    weight, hessian = _weight(max(rows, 4), columns, seed), _hessian(_inputs(samples, columns, seed + 1))
    error = _error(weight, quantize_with_hessian(weight, hessian.clone(), grid), hessian)
    for rounding in ("rtn", "mse"):
        plain = quantize_tensor(
            weight.numpy(), bits=4, group=32, rounding=rounding, positive_scales=grid.positive_scales
        )
        assert error < _error(weight, plain, hessian)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_independent_inputs_leave_rounding_to_the_nearest_code(grid: Grid) -> None:
    weight, energy = _weight(5, 96), _uniform(96) + 0.5
    found = quantize_with_hessian(weight, energy.diag(), grid)
    scales = np.repeat(found.scales.astype(np.float32), 32, axis=1)
    assert (found.codes == np.clip(np.rint(weight.numpy() / scales), *grid.code_range)).all()
    weighted = quantize_weighted(weight, energy, grid)
    slack = 1.02 if grid.bits == 4 else 1.1  # half the candidates, which matters where the grid is fine
    assert _error(weight, found, energy.diag()) < slack * _error(weight, weighted, energy.diag())


def test_columns_may_come_in_any_order() -> None:
    weight, inputs = _weight(7, 64), _inputs(400, 64)
    groups = torch.tensor([1, 0])
    order = torch.cat([torch.arange(32) + 32 * group for group in groups])
    plain = quantize_with_hessian(weight, _hessian(inputs), GRIDS[0])
    moved = quantize_with_hessian(weight[:, order], _hessian(inputs[:, order]), GRIDS[0])
    assert (moved.codes == plain.codes[:, order.numpy()]).mean() > 0.99
    assert (moved.scales == plain.scales[:, groups.numpy()]).mean() > 0.9


def test_rows_do_not_depend_on_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _weight(23, 64), _hessian(_inputs(300, 64))
    whole = quantize_with_hessian(weight, hessian.clone(), GRIDS[0])
    monkeypatch.setattr(gptq, "_BLOCK_ROWS", 5)
    parts = quantize_with_hessian(weight, hessian.clone(), GRIDS[0])
    assert (parts.codes == whole.codes).mean() > 0.999 and (parts.scales == whole.scales).mean() > 0.99


def test_inputs_that_never_come_are_rounded_alone() -> None:
    weight, inputs = _weight(4, 64), _inputs(200, 64)
    inputs[:, [3, 40, 41]] = 0
    found = quantize_with_hessian(weight, _hessian(inputs), GRIDS[0])
    scales = np.repeat(found.scales.astype(np.float32), 32, axis=1)[:, [3, 40, 41]]
    assert (found.codes[:, [3, 40, 41]] == np.clip(np.rint(weight[:, [3, 40, 41]].numpy() / scales), -8, 7)).all()
    assert np.isfinite(dequantize(quantize_with_hessian(weight, make_hessian(64), GRIDS[0]))).all()


def test_a_failed_factorization_is_damped_more_until_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.5  # an eigenvalue of -0.5: damping 1 does, 0.1 does not
    tried = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: tried.append(float(m[0, 0]) - 1) or original(m))
    assert np.isfinite(dequantize(quantize_with_hessian(_weight(2, 32), indefinite, GRIDS[0]))).all()
    assert tried == pytest.approx([0.01, 0.1, 1.0], rel=1e-4)
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    with pytest.raises(ExportError, match=r"^some\.weight: its Hessian cannot be factorized"):
        quantize_with_hessian(_weight(2, 32), indefinite, GRIDS[0], name="some.weight")


def test_damaged_inputs_and_weights_are_refused() -> None:
    with pytest.raises(ExportError, match=r"^some\.weight: its inputs are not finite"):
        quantize_with_hessian(_weight(2, 32), torch.full((32, 32), torch.nan), GRIDS[0], name="some.weight")
    for value in (torch.nan, torch.inf, 1e7):
        weight = _weight(2, 32)
        weight[1, 5] = value
        for quantize in (
            lambda w: quantize_with_hessian(w, torch.eye(32), GRIDS[0]),
            lambda w: quantize_weighted(w, None, GRIDS[0]),
        ):
            with pytest.raises(ValueError, match="finite"):
                quantize(weight)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_weighted_search_is_as_good_as_a_fine_one(grid: Grid) -> None:
    weight, importance = _weight(8, 32, 0), _uniform(32) ** 3 + 0.01
    found = quantize_weighted(weight, importance, grid)
    error = _error(weight, found, importance.diag())
    cover = candidates(weight, grid, 2)[0][:, None]
    fine = torch.full((8,), torch.inf)
    for factor in torch.linspace(0.4, 1.3, 3000):
        for sign in (1,) if grid.positive_scales else (1, -1):
            scale = to_fp16(sign * cover * factor)
            left = weight - (weight / scale).round().clamp(*grid.code_range) * scale
            fine = torch.minimum(fine, (importance * left.square()).sum(dim=1))
    assert error <= (1.02 if grid.bits == 4 else 1.25) * float(fine.sum())  # two dozen candidates see four bits well
    assert error < _error(weight, quantize_weighted(weight, None, grid), importance.diag())


def test_positive_grids_have_positive_scales_and_others_use_both_signs() -> None:
    weight, hessian = _weight(40, 96), _hessian(_inputs(300, 96))
    for quantize in (
        lambda grid: quantize_with_hessian(weight, hessian.clone(), grid),
        lambda grid: quantize_weighted(weight, hessian.diagonal(), grid),
    ):
        assert quantize(Grid(4, 32, True)).scales.min() >= 2.0**-14
        signed = quantize(Grid(4, 32, False)).scales
        assert (signed < 0).any() and (signed > 0).any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packing_on_the_device_is_that_of_the_format(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, (3, 64), generator=generator)
    scales = torch.rand(3, 2, generator=generator).half()
    made = pack(codes.float(), scales.float(), grid, 60)
    same = QuantizedTensor.of_codes(codes.to(torch.int8).numpy(), scales.numpy(), grid.bits, 60)
    assert (made.packed == same.packed).all() and (made.scales == same.scales).all() and made.shape == same.shape
    made.packed.flags.writeable = False
    assert (unpack(made).numpy() == dequantize(same)).all()
