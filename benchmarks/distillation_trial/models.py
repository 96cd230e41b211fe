"""Models of Qwen2's code with random weights: only shapes matter for time and memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True)
class Sizes:
    """A decoder's sizes; the vocabulary is shared."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Setting:
    """A teacher, a student, their vocabulary, the sequence length, and the draws of a stored position."""

    teacher: Sizes
    student: Sizes
    vocabulary: int
    sequence_tokens: int
    draws: int


QWEN = Setting(
    Sizes(3584, 28, 28, 4, 18944, False),
    Sizes(896, 24, 14, 2, 4864, True),
    vocabulary=152_064,
    sequence_tokens=1024,
    draws=32,
)
TINY = Setting(Sizes(64, 2, 4, 2, 96, False), Sizes(32, 2, 4, 2, 64, True), 512, 32, 8)


def build_model(sizes: Sizes, setting: Setting, device: torch.device, seed: int, dtype: torch.dtype) -> Any:
    """A causal model, weights N(0, 0.02) as Qwen2 starts."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=setting.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=sizes.tied,
        initializer_range=INITIAL_STD,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def freeze(model: Any) -> Any:
    """A teacher: no gradients."""
    return model.eval().requires_grad_(False)


def sharing_copy(model: Any) -> Any:
    """Another module tree over the same tensors."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def storage_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of distinct tensors."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def layer_tensors(model: Any) -> list[torch.Tensor]:
    """Parameters and buffers of the decoder's layers."""
    layers = model.get_decoder().layers
    return [*layers.parameters(), *layers.buffers()]


def flops_per_token(setting: Setting, teacher: bool, student: bool) -> float:
    """Multiply-adds of matrices and causal attention, times two: forward once, or forward and backward."""
    return (_forward_flops(setting.teacher, setting) if teacher else 0.0) + (
        3 * _forward_flops(setting.student, setting) if student else 0.0
    )


def _forward_flops(sizes: Sizes, setting: Setting) -> float:
    head_size = sizes.hidden // sizes.heads
    attention = 2 * sizes.hidden * sizes.hidden + 2 * sizes.hidden * sizes.kv_heads * head_size
    matrices = sizes.layers * (attention + 3 * sizes.hidden * sizes.ffn) + sizes.hidden * setting.vocabulary
    return 2.0 * matrices + 2.0 * sizes.layers * setting.sequence_tokens * sizes.hidden
