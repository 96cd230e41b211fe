"""What each weight's bits cost: against whole forward passes of changed copies, layer by layer, left as it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.quantization import sensitivity
from pipeline.quantization.rounding import quantize_tensor
from pipeline.quantization.sensitivity import divergences
from tests.pipeline.conftest import VOCABULARY, MakeModel

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 12)).astype(np.int32)
ROUNDING = 5e-8  # of log-probabilities in fp32, in nats a position


def _coarse(model: Any, bits: int = 4) -> dict[str, QuantizedTensor]:
    return {
        name: quantize_tensor(p.detach().numpy(), bits=bits, group=32, rounding="rtn")
        for name, p in model.named_parameters()
        if p.ndim == 2
    }


def _direct(model: Any, change: dict[str, QuantizedTensor]) -> float:
    """A copy of the whole model, its own forward pass, torch's divergence in float64."""
    changed = copy.deepcopy(model)
    for name, tensor in change.items():
        changed.get_parameter(name).data = torch.from_numpy(dequantize(tensor))
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        expected, found = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, changed))
    return float(F.kl_div(found, expected, log_target=True, reduction="sum")) / TOKENS.size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_weight_alone_costs_what_a_changed_copy_says(
    make_model: MakeModel, architecture: str, tied: bool
) -> None:
    model = make_model(architecture, tie_word_embeddings=tied)
    coarse = _coarse(model)
    assert ("lm_head.weight" in coarse) != tied and len(coarse) == 3 * 7 + (1 if tied else 2)
    found = divergences(model, TOKENS, [{name: tensor} for name, tensor in coarse.items()])
    expected = [_direct(model, {name: tensor}) for name, tensor in coarse.items()]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=ROUNDING)
    assert min(expected) > 10 * ROUNDING, "nothing is too small to be told from rounding"


def test_weights_that_change_together_are_measured_together(make_model: MakeModel) -> None:
    model = make_model("qwen3", tie_word_embeddings=True)
    coarse, fine = _coarse(model), _coarse(model, bits=8)
    later = {name: tensor for name, tensor in coarse.items() if ".1." in name or ".2." in name}
    mixed = coarse | {name: tensor for name, tensor in fine.items() if "mlp" in name}
    found = divergences(model, TOKENS, [coarse, later, mixed, {}])
    np.testing.assert_allclose(found[:3], [_direct(model, change) for change in (coarse, later, mixed)], rtol=1e-3)
    assert abs(found[3]) <= ROUNDING


def test_batches_make_no_difference(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    changes = [{name: tensor} for name, tensor in _coarse(model).items()]
    whole, seen = divergences(model, TOKENS, changes), list[int]()
    monkeypatch.setattr(sensitivity, "BATCH_TOKENS", 24)
    np.testing.assert_allclose(divergences(model, TOKENS, changes, seen.append), whole, rtol=1e-4, atol=ROUNDING)
    assert seen[-1] == len(changes) * len(TOKENS) and len(seen) == 3 * len(changes) and seen == sorted(seen)


def test_twice_the_same(make_model: MakeModel) -> None:
    model = make_model("llama")
    changes = [{name: tensor} for name, tensor in _coarse(model).items()]
    assert divergences(model, TOKENS, changes) == divergences(model, TOKENS, changes)


def test_layers_in_front_of_a_change_are_not_run_again(make_model: MakeModel) -> None:
    model = make_model("llama")
    coarse, runs = _coarse(model), [0, 0, 0]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    divergences(model, TOKENS, [{name: coarse[name]} for name in coarse if ".1." in name])
    assert runs == [1, 1 + 7, 1 + 7]
    divergences(model, TOKENS, [{"lm_head.weight": coarse["lm_head.weight"]}])
    assert runs == [2, 9, 9]


def test_a_model_comes_back_as_it_was_even_from_an_interruption(make_model: MakeModel) -> None:
    model = make_model("qwen2", tie_word_embeddings=True)
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    changes = [_coarse(model)]
    divergences(model, TOKENS, changes)
    with pytest.raises(KeyboardInterrupt):
        divergences(model, TOKENS, changes, stop)
    broken = dict(changes[0]) | {"model.norm.weight": None}
    with pytest.raises(AttributeError):
        divergences(model, TOKENS, [broken])  # type: ignore[list-item]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert places == [p.data_ptr() for p in model.parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module._forward_pre_hooks for module in model.modules())
