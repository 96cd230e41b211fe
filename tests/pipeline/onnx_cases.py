"""Small models of every supported kind, quantized and exported once a test module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edge_runtime.backends.onnx import OnnxBackend
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx

Weights = dict[str, QuantizedTensor | NDArray[np.float32]]
SLOTS = LoraSlots(("q_proj", "v_proj", "down_proj"), rank=8)
CONTEXT_TOKENS = 128
IDS = np.random.default_rng(5).integers(0, 511, 60)
SIZES = {
    "vocab_size": 511,
    "hidden_size": 80,  # two and a half groups of 32
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1e4,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Case:
    config: type
    model: type
    options: Mapping[str, object]
    bits: int = 4
    group: int = 32


CASES = {
    "llama": Case(LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied_hidden_172": Case(
        LlamaConfig, LlamaForCausalLM, {"hidden_size": 172, "num_attention_heads": 4, "tie_word_embeddings": True}
    ),
    "llama_biased_8_bit": Case(LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}, bits=8),
    "llama_yarn": Case(LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "llama_llama3_rope": Case(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "qwen2_group_16": Case(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, group=16),
    "qwen2_group_128": Case(Qwen2Config, Qwen2ForCausalLM, {}, group=128),
    "qwen3": Case(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": Case(MistralConfig, MistralForCausalLM, {"num_key_value_heads": 5, "sliding_window": None}),
}


@dataclass(frozen=True)
class Exported:
    """One case: the dequantized model and its files at both accuracy levels."""

    model: PreTrainedModel
    spec: DecoderSpec
    weights: Weights
    logits: NDArray[np.float32]
    directory: Path

    def open(self, accuracy_level: int = 0) -> OnnxBackend:
        return OnnxBackend.open(self.directory / str(accuracy_level), self.spec)


def export_case(case: Case, directory: Path) -> Exported:
    model = build_model(case)
    spec, floats = spec_of(model, CONTEXT_TOKENS), float_weights(model)
    weights = {name: round_to_nearest(w, case.bits, case.group) if w.ndim == 2 else w for name, w in floats.items()}
    state = {name: dequantize(w) if isinstance(w, QuantizedTensor) else w for name, w in weights.items()}
    missing, unexpected = model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    for accuracy_level in (0, 4):
        (directory / str(accuracy_level)).mkdir()
        write_onnx(directory / str(accuracy_level), spec, weights, lora=SLOTS, accuracy_level=accuracy_level)
    return Exported(model, spec, weights, logits_of(model), directory)


def build_model(case: Case) -> PreTrainedModel:
    """Random weights that make every part count: norms off one, biases off zero, logits of order one."""
    torch.manual_seed(7)
    model = case.model(case.config(**(SIZES | dict(case.options)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def round_to_nearest(weight: NDArray[np.float32], bits: int, group: int) -> QuantizedTensor:
    """Round to nearest with a scale of largest magnitude / largest code."""
    rows, columns = weight.shape
    padded = -(-columns // group) * group
    blocks = np.pad(weight, ((0, 0), (0, padded - columns))).reshape(rows, padded // group, group)
    largest = 2 ** (bits - 1) - 1
    scales = (np.abs(blocks).max(axis=2, keepdims=True) / largest).astype(np.float16)
    codes = np.clip(np.rint(blocks / scales.astype(np.float32)), -largest, largest).astype(np.int8)
    return QuantizedTensor.of_codes(codes.reshape(rows, padded), scales[:, :, 0], bits, columns)


def logits_of(model: PreTrainedModel) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.tensor(IDS)[None], use_cache=False).logits[0].numpy()
