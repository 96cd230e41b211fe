"""float8 linears against exact products of the rounded factors; which teachers are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edge_runtime.formats.errors import UserError
from pipeline.distillation import float8_teacher
from pipeline.distillation.float8_teacher import FLOAT8, Float8Linear, quantize_teacher


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_the_product_of_its_factors_rounded_by_row(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight[3] *= 500  # one loud row and one loud position must not cost the others their digits
    inputs = torch.randn(2, 5, 64).bfloat16()
    inputs[1, 2] *= 3000
    outputs = Float8Linear(linear)(inputs)
    expected = _rounded(inputs.flatten(0, 1)) @ _rounded(linear.weight).T
    if linear.bias is not None:
        expected += linear.bias.double()
    assert outputs.shape == (2, 5, 32) and outputs.dtype == torch.bfloat16
    quiet = [column for column in range(32) if column != 3]
    found, wanted = outputs.flatten(0, 1).double(), expected
    for columns in (quiet, [3]):
        error = (found - wanted)[:, columns].norm(dim=-1) / wanted[:, columns].norm(dim=-1)
        assert float(error.max()) < 4e-3  # bf16's rounding of the output
    exact = linear(inputs).flatten(0, 1).double()[:, quiet]
    apart = (found[:, quiet] - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(apart.min()) > 0.01 and float(apart.max()) < 0.06


def test_zeros_stay_zeros() -> None:
    linear = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    assert not Float8Linear(linear)(torch.zeros(3, 16, dtype=torch.bfloat16)).any()
    linear.weight.zero_()
    assert not Float8Linear(linear)(torch.ones(3, 16, dtype=torch.bfloat16)).any()


def test_every_linear_of_the_layers_is_replaced_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_teacher, "_check_device", lambda device: None)
    teacher = _teacher(48)
    tokens = torch.arange(12)[None]
    before = teacher(input_ids=tokens, use_cache=False).logits
    assert quantize_teacher(teacher) == 14
    kinds = {type(module) for module in teacher.model.layers.modules()}
    assert Float8Linear in kinds and nn.Linear not in kinds and type(teacher.lm_head) is nn.Linear
    assert {str(value.dtype) for name, value in teacher.state_dict().items() if "proj.weight" in name} == {
        "torch.float8_e4m3fn"
    }
    after = teacher(input_ids=tokens, use_cache=False).logits
    assert 1e-4 < float((after - before).norm() / before.norm()) < 0.1


def test_a_size_that_the_hardware_cannot_multiply_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(float8_teacher, "_check_device", lambda device: None)
    teacher = _teacher(40)
    with pytest.raises(UserError, match="divisible by 16"):
        quantize_teacher(teacher)
    assert not any(isinstance(module, Float8Linear) for module in teacher.modules())


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="float8 needs a GPU"):
        quantize_teacher(_teacher(48))


def _rounded(rows: torch.Tensor) -> torch.Tensor:
    scale = rows.abs().amax(-1, keepdim=True).float() / 448
    return (rows / scale).to(FLOAT8).double() * scale.double()


def _teacher(ffn: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
