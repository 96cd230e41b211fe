"""What a GGUF file says of a model beside its weights: architecture, sizes, rope, vocabulary.

llama.cpp's graphs of Qwen2 and Qwen3 rotate halves as Hugging Face does; its graph of a Llama rotates neighbours and
takes any rotary frequencies, any head width and biases, so a Qwen2 that the narrower graph refuses is written as one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from pipeline.export.gguf_vocabulary import Vocabulary

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}  # what most of the file is


def architecture_of(config: Any, spec: DecoderSpec) -> str:
    """llama.cpp's graph for a transformers config.

    Raises:
        ExportError: It has none that computes this model.
    """
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ExportError(f"model_type {config.model_type}: GGUF is written for {', '.join(_ARCHITECTURES)}")
    if architecture == "qwen2" and (spec.num_heads * spec.head_dim != spec.hidden_size or _rope(config) == "llama3"):
        return "llama"
    if architecture == "qwen3" and _rope(config) == "llama3":
        raise ExportError("rope_type llama3: llama.cpp's qwen3 has no such frequencies; leave gguf out")
    return architecture


def rope_factors(config: Any, spec: DecoderSpec) -> NDArray[np.float32] | None:
    """What each rotary frequency is divided by, (head_dim / 2,), where a factor alone cannot say it (llama3)."""
    if _rope(config) != "llama3":
        return None
    plain = _theta(config) ** -(np.arange(0, spec.head_dim, 2) / spec.head_dim)
    return np.asarray(plain / np.array(spec.inv_freq), np.float32)


def add_metadata(
    writer: Any,
    spec: DecoderSpec,
    config: Any,
    vocabulary: Vocabulary | None,
    name: str,
    licence: str,
    *,
    eight_bit: bool,
) -> None:
    """Put all keys into a ``gguf.GGUFWriter``."""
    import gguf

    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_file_type(_FILE_TYPES["Q8_0" if eight_bit else "Q4_0"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(_context_tokens(config))
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    _add_rope(writer, spec, config)
    _add_vocabulary(writer, vocabulary)


def _add_rope(writer: Any, spec: DecoderSpec, config: Any) -> None:
    from gguf import RopeScalingType

    parameters, kind = config.rope_parameters, _rope(config)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(_theta(config))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(parameters["factor"]))
    if kind == "yarn":
        if not parameters.get("truncate", True):
            raise ExportError("rope_parameters.truncate false: llama.cpp's YaRN rounds; leave gguf out")
        factor = float(parameters["factor"])
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(parameters.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(parameters.get("beta_slow") or 1))
        # llama.cpp multiplies by YaRN's own factor in any case.
        writer.add_rope_scaling_attn_factors(spec.rope_attention_factor / (1 + 0.1 * math.log(factor)))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos[0])
    if len(vocabulary.eos) > 1:
        writer.add_eot_token_id(vocabulary.eos[1])
    writer.add_add_bos_token(vocabulary.bos is not None)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _context_tokens(config: Any) -> int:
    """Tokens that the model was made for; a window that llama.cpp does not keep to ends them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    return int(min(config.max_position_embeddings, window) if slides else config.max_position_embeddings)


def _rope(config: Any) -> str:
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def _theta(config: Any) -> float:
    return float(config.rope_parameters["rope_theta"])
