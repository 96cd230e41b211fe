"""What of a transformers model reaches the exporters, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edge_runtime.formats.errors import ExportError
from pipeline.export.checkpoint import float_weights, spec_of

CONTEXT_TOKENS = 128
MODELS = {
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_and_every_parameter_arrive(config: type[PretrainedConfig], tied: bool) -> None:
    model = _model(config, tie_word_embeddings=tied)
    spec, weights = spec_of(model, CONTEXT_TOKENS), float_weights(model)
    assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (80, 5, 1, 16)
    assert (spec.intermediate_size, spec.vocab_size, spec.num_layers, spec.context_tokens) == (172, 511, 2, 128)
    assert spec.tied_embeddings is tied and ("lm_head.weight" in weights) is not tied
    assert sum(weight.size for weight in weights.values()) == model.num_parameters()
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(weights[name], parameter.detach().numpy())


def test_weights_are_copies_that_training_does_not_change() -> None:
    model = _model(LlamaConfig)
    weights = float_weights(model)
    before = weights["model.norm.weight"].copy()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    np.testing.assert_array_equal(weights["model.norm.weight"], before)


def test_yarn_changes_frequencies_and_amplitude() -> None:
    model = _model(LlamaConfig, rope_parameters=YARN)
    spec, plain = spec_of(model, CONTEXT_TOKENS), spec_of(_model(LlamaConfig), CONTEXT_TOKENS)
    assert spec.inv_freq == tuple(model.model.rotary_emb.inv_freq.tolist()) != plain.inv_freq
    assert spec.rope_attention_factor == model.model.rotary_emb.attention_scaling > plain.rope_attention_factor == 1


def test_rotary_frequencies_keep_full_precision_in_a_bfloat16_model() -> None:
    model = _model(LlamaConfig, rope_parameters=YARN)
    expected = spec_of(model, CONTEXT_TOKENS)
    assert spec_of(model.to(torch.bfloat16), CONTEXT_TOKENS) == expected


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act gelu"),
        (LlamaConfig, {"max_position_embeddings": 100}, "context_tokens 128"),
        (LlamaConfig, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        (MistralConfig, {"sliding_window": 127}, "sliding_window 127"),
        (Qwen2Config, SLIDING, "sliding_window 64"),
        (Qwen3Config, SLIDING, "sliding_window 64"),
    ],
)
def test_options_that_no_container_can_hold_are_refused(
    config: type[PretrainedConfig], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        spec_of(_model(config, **options), CONTEXT_TOKENS)


def test_other_architectures_are_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64))
    with pytest.raises(ExportError, match="GPT2LMHeadModel"):
        spec_of(model, CONTEXT_TOKENS)


def test_parameters_without_a_place_are_refused_by_name() -> None:
    model = _model(LlamaConfig)
    model.model.layers[1].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.extra\.weight"):
        float_weights(model)


def test_a_window_as_long_as_the_context_changes_nothing() -> None:
    model = _model(MistralConfig, sliding_window=CONTEXT_TOKENS)
    assert spec_of(model, CONTEXT_TOKENS).context_tokens == CONTEXT_TOKENS


def _model(config: type[PretrainedConfig], **options: object) -> PreTrainedModel:
    torch.manual_seed(7)
    sizes = {
        "vocab_size": 511,
        "hidden_size": 80,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "sliding_window": None,
    }
    if config is LlamaConfig:
        del sizes["sliding_window"]
    return MODELS[config](config(**(sizes | options)))
