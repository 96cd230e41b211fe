"""Small bases of every kind, a batch, and the loss and gradients that PEFT and torch find for them in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from transformers import Qwen3Config, Qwen3ForCausalLM  # isort: skip

from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.quantization.rounding import pad_intermediate, quantize_tensor
from tests.pipeline.onnx_cases import LLAMA3, SIZES, YARN, Case, Weights, build_model

CONTEXT_TOKENS, RANK, SCALE = 64, 3, 1.7
TINY = dict(SIZES) | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 172}
CASES = {
    "untied": Case(LlamaConfig, LlamaForCausalLM, TINY),
    "tied": Case(LlamaConfig, LlamaForCausalLM, TINY | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "biased": Case(LlamaConfig, LlamaForCausalLM, TINY | {"attention_bias": True, "mlp_bias": True}),
    "yarn": Case(LlamaConfig, LlamaForCausalLM, TINY | {"rope_parameters": YARN}),
    "llama3": Case(LlamaConfig, LlamaForCausalLM, TINY | {"rope_parameters": LLAMA3}),
    "qwen2": Case(Qwen2Config, Qwen2ForCausalLM, TINY | {"tie_word_embeddings": True}),
    "qwen3": Case(Qwen3Config, Qwen3ForCausalLM, TINY | {"head_dim": 32, "tie_word_embeddings": True}),
}
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Base:
    """The codes of a case and a model that computes with them; ``padded`` widens the FFN to a whole group first."""

    model: PreTrainedModel
    spec: DecoderSpec
    weights: Weights


@cache
def base_of(name: str, *, padded: bool = False) -> Base:
    model = build_model(CASES[name])
    spec, floats = spec_of(model, CONTEXT_TOKENS), float_weights(model)
    if padded:
        spec, floats = pad_intermediate(spec, floats, 32)
    weights: Weights = {
        name: quantize_tensor(value, bits=4, group=32, rounding="rtn", positive_scales=True)
        if value.ndim == 2
        else value
        for name, value in floats.items()
    }
    state = model.state_dict()
    with torch.no_grad():
        for name, value in weights.items():
            array = dequantize(value) if isinstance(value, QuantizedTensor) else value
            state[name].copy_(torch.tensor(array[tuple(slice(size) for size in state[name].shape)]))
    return Base(model, spec, weights)


def draw_batch(spec: DecoderSpec, batch: int, tokens: int, seed: int = 0) -> tuple[NDArray[np.int32], Floats]:
    """(ids, mask) of random tokens; about a third is not counted."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, spec.vocab_size, (batch, tokens)).astype(np.int32)
    return ids, (generator.random((batch, tokens)) < 0.7).astype(np.float32)


def draw_factors(spec: DecoderSpec, targets: tuple[str, ...] = PROJECTIONS, rank: int = RANK) -> dict[str, Floats]:
    """A and B of every targeted module, none of them zero."""
    generator = np.random.default_rng(3)
    factors = {}
    for module, projection in spec.module_names(targets):
        rows, columns = spec.projection_shape(projection)
        for half, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            factors[f"{module}.{half}"] = (generator.normal(size=shape) * shape[1] ** -0.5).astype(np.float32)
    return factors


def peft_step(
    model: PreTrainedModel, factors: Mapping[str, Floats], scale: float, ids: NDArray[np.int32], mask: Floats
) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """(summed loss, gradients by factor) in float64."""
    modules = sorted({name.rpartition(".")[0] for name in factors})
    rank = factors[f"{modules[0]}.lora_A"].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=modules)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).double()
    parameters = {}
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameters[key] = parameter
            with torch.no_grad():
                parameter.copy_(torch.tensor(factors[key]))
    inputs = torch.tensor(ids.astype(np.int64))
    scores = adapted(input_ids=inputs, use_cache=False).logits[:, :-1].log_softmax(dim=-1)
    taken = scores.gather(2, inputs[:, 1:, None])[:, :, 0]
    loss = -(taken * torch.tensor(mask[:, :-1], dtype=torch.float64)).sum()
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in parameters.items()}


def worst_difference(expected: Mapping[str, NDArray[np.float64]], found: Mapping[str, Floats]) -> float:
    """Largest norm of a gradient's error over the gradient's norm."""
    assert set(expected) == set(found)
    return max(
        float(np.linalg.norm(found[name] - wanted) / np.linalg.norm(wanted)) for name, wanted in expected.items()
    )
