"""From a transformers model to the two things every container is made of: a spec and weights.

Everything a container cannot represent is refused here, once, so that no exporter has to guess.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderSpec
from edge_runtime.formats.errors import ExportError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change frequencies with the length
_LAYER_TENSOR = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.([qkvo]_proj\.(weight|bias)|[qk]_norm\.weight)"
    r"|mlp\.(gate|up|down)_proj\.(weight|bias)"
    r"|(input|post_attention)_layernorm\.weight)"
)
_OUTER_TENSORS = {f"{EMBEDDING}.weight", f"{FINAL_NORM}.weight", f"{HEAD}.weight"}


def load_student(path: Path) -> Any:
    """A student as the distill stage wrote it: a transformers model in fp32, for inference."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return model.eval()


def spec_of(model: PreTrainedModel, context_tokens: int) -> DecoderSpec:
    """Sizes of ``model``, with rotary frequencies as its own code computes them.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 causal language model.
        context_tokens: Longest sequence that the exported files shall hold, in tokens.

    Raises:
        ExportError: The architecture or one of its options has no counterpart in the containers.
    """
    config = model.config
    _refuse_unknown(model, context_tokens)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    inv_freq, attention_factor = _rotary(model, head_dim)
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        context_tokens=context_tokens,
        rms_norm_eps=float(config.rms_norm_eps),
        inv_freq=inv_freq,
        tied_embeddings=_is_tied(model),
        rope_attention_factor=attention_factor,
    )


def float_weights(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """Copies of all parameters as float32, by Hugging Face name; no ``lm_head.weight`` when it is tied.

    Raises:
        ExportError: A parameter has no place in the containers or is not a floating-point tensor.
    """
    tied = _is_tied(model)
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in _OUTER_TENSORS and not _LAYER_TENSOR.fullmatch(name):
            raise ExportError(f"{name}: no container has a place for this parameter")
        if not parameter.dtype.is_floating_point:
            raise ExportError(f"{name}: stored as {parameter.dtype}; load the checkpoint unquantized to export it")
        if tied and name == f"{HEAD}.weight":
            continue
        weights[name] = _to_float32(parameter)
    return weights


def _refuse_unknown(model: PreTrainedModel, context_tokens: int) -> None:
    config = model.config
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise ExportError(f"architecture {name}: only {', '.join(ARCHITECTURES)} can be exported")
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"hidden_act {config.hidden_act}: only silu can be exported")
    if not 1 <= context_tokens <= config.max_position_embeddings:
        raise ExportError(
            f"context_tokens {context_tokens}: this model was made for 1 to {config.max_position_embeddings} tokens"
        )
    window = _sliding_window(config)
    if window is not None and window < context_tokens:
        raise ExportError(f"sliding_window {window} is shorter than context_tokens {context_tokens}; lower the latter")
    for option in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, option, None) is not None:
            raise ExportError(f"{option} {getattr(config, option)}: soft-capped logits cannot be exported")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ExportError(
            f"{config.num_attention_heads} heads do not divide into {config.num_key_value_heads} key/value heads"
        )


def _sliding_window(config: object) -> int | None:
    """Tokens a query can see, or None when some option switches the window off."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def _rotary(model: PreTrainedModel, head_dim: int) -> tuple[tuple[float, ...], float]:
    config = model.config
    parameters = getattr(config, "rope_parameters", None) or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ExportError(f"rope_type {rope_type}: only {', '.join(ROPE_TYPES)} can be exported")
    # Built anew: the model's own buffer is rounded when the model was cast to bfloat16.
    rotary = type(model.model.rotary_emb)(config=config)
    inv_freq = tuple(float(value) for value in rotary.inv_freq)
    if len(inv_freq) * 2 != head_dim:
        raise ExportError(
            f"rotary dimension {len(inv_freq) * 2} of head_dim {head_dim}: partial rotary is not supported"
        )
    return inv_freq, float(rotary.attention_scaling)


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    return head is embedding or (not head.is_meta and head.data_ptr() == embedding.data_ptr())


def _to_float32(parameter: torch.Tensor) -> NDArray[np.float32]:
    import torch

    tensor = parameter.detach().to(device="cpu", dtype=torch.float32, copy=True)
    return np.ascontiguousarray(tensor.numpy())
