"""Small random models of every architecture and rope that GGUF is written for, quantized."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import Weights
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.quantization.rounding import pad_intermediate, quantize_tensor

_SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 240, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
_LLAMA, _QWEN2, _QWEN3 = (
    (LlamaConfig, LlamaForCausalLM),
    (Qwen2Config, Qwen2ForCausalLM),
    (Qwen3Config, Qwen3ForCausalLM),
)
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
# Name to classes, options of the configuration, group, and the kind of matrix that has 8 bits.
TOYS: dict[str, tuple[tuple[Any, Any], dict[str, Any], int, str]] = {
    "llama": (_LLAMA, {}, 32, ""),
    "llama, biases, 8-bit o_proj": (_LLAMA, {"attention_bias": True, "mlp_bias": True}, 32, "o_proj"),
    "llama, linear rope, group 64": (_LLAMA, {"rope_parameters": _LINEAR}, 64, ""),
    "llama, YaRN, group 128": (_LLAMA, {"rope_parameters": _YARN}, 128, ""),
    "llama, YaRN with its own factor": (_LLAMA, {"rope_parameters": _YARN | {"attention_factor": 1.4}}, 32, ""),
    "llama, llama3 rope, tied": (_LLAMA, {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, 32, ""),
    "mistral": ((MistralConfig, MistralForCausalLM), {"sliding_window": None}, 32, ""),
    "qwen2": (_QWEN2, {}, 32, ""),
    "qwen2, YaRN, tied": (_QWEN2, {"rope_parameters": _YARN, "tie_word_embeddings": True}, 32, ""),
    "qwen2, heads wider than the model": (_QWEN2, {"head_dim": 64}, 32, ""),
    "qwen3, 8-bit embedding": (_QWEN3, {"head_dim": 64, "tie_word_embeddings": True}, 32, "embed"),
    "qwen3, YaRN": (_QWEN3, {"rope_parameters": _YARN}, 32, ""),
}


def build_toy(name: str) -> tuple[Any, DecoderSpec, Weights]:
    """A model whose every part counts (norms off one, biases off zero), its sizes with a padded FFN, its codes."""
    (config_class, model_class), options, group, eight = TOYS[name]
    torch.manual_seed(5)
    model = model_class(config_class(**(_SIZES | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    spec, floats = pad_intermediate(spec_of(model, 128), float_weights(model), group)
    return (
        model,
        spec,
        {
            key: value
            if value.ndim != 2
            else quantize_tensor(
                value, bits=8 if eight and eight in key else 4, group=group, rounding="rtn", positive_scales=False
            )
            for key, value in floats.items()
        },
    )
