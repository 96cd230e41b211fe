from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edge_runtime.formats.errors import UserError
from pipeline.distillation.context import LongMixture, Yarn, extend_context, mix_long, rotary_tables, train_long
from pipeline.distillation.needles import NeedleFormat
from pipeline.distillation.trainer import TrainPlan

FORM = NeedleFormat(np.arange(10, 60, dtype=np.int32), np.array([1, 2], np.int32), np.array([1], np.int32))
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}  # fmt: skip
YARN = Yarn(factor=8.0, original_tokens=128)


def build(name: str = "llama", **options: Any) -> Any:
    config, model = MODELS[name]
    torch.manual_seed(0)
    return model(config(**(SIZES | options))).eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_stretched_model_is_the_one_that_transformers_builds_and_loads(name: str, tmp_path: Path) -> None:
    theta = 5e5
    model = build(name, rope_parameters={"rope_type": "default", "rope_theta": theta})
    plain = build(name, rope_parameters={"rope_type": "default", "rope_theta": theta})
    tokens = torch.arange(300)[None] % 64

    extend_context(model, YARN)

    expected = build(name, rope_parameters=YARN.parameters(theta), max_position_embeddings=1_024)
    expected.load_state_dict(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == 1_024
    with torch.no_grad():
        logits = [built(tokens).logits for built in (expected, model, loaded, plain)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert (logits[0] - logits[3]).abs().max() > 1e-3
    for table, other in zip(rotary_tables(model, 1_024), rotary_tables(expected, 1_024), strict=True):
        assert torch.equal(table, other)


def test_frequencies_are_those_of_the_paper() -> None:
    model = build(head_dim=64)
    inverse = model.model.rotary_emb.inv_freq.double().clone()
    extend_context(model, Yarn(16.0, 128, beta_fast=8.0, beta_slow=1.0))
    turns = 128 * inverse / (2 * np.pi)
    found = model.model.rotary_emb.inv_freq.double()
    fast, slow = turns > 12, turns < 0.8
    assert fast.any() and slow.any()
    torch.testing.assert_close(found[fast], inverse[fast], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[slow], inverse[slow] / 16, rtol=1e-6, atol=0)
    assert (found[1:] < found[:-1]).all() and ((found <= inverse) & (found >= inverse / 16 * (1 - 1e-6))).all()
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * np.log(16) + 1)


def test_an_attention_factor_of_ones_own_is_used() -> None:
    model = build()
    extend_context(model, Yarn(4.0, 128, attention_factor=1.25))
    cosines, _ = rotary_tables(model, 1)
    assert cosines[0, 0].item() == 1.25
    assert model.config.rope_parameters["attention_factor"] == 1.25


def test_a_bfloat16_model_keeps_exact_frequencies() -> None:
    model, exact = build().to(torch.bfloat16), build()
    extend_context(model, YARN)
    extend_context(exact, YARN)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("yarn", "words"),
    [
        (Yarn(1.0, 128), "context.factor"),
        (Yarn(65.0, 128), "at most 64"),
        (Yarn(8.0, 129), "1 to 128"),
        (Yarn(1.3, 7), "whole number"),
        (Yarn(8.0, 128, attention_factor=0.0), "attention_factor"),
        (Yarn(8.0, 128, beta_fast=1.0), "beta_slow"),
    ],
)
def test_numbers_out_of_range_are_refused_and_change_nothing(yarn: Yarn, words: str) -> None:
    model = build()
    before = dict(model.config.rope_parameters)
    with pytest.raises(UserError, match=words):
        extend_context(model, yarn)
    assert model.config.rope_parameters == before and model.config.max_position_embeddings == 128


def test_models_that_cannot_be_stretched_are_refused() -> None:
    model = build()
    extend_context(model, YARN)
    with pytest.raises(UserError, match="rope_type yarn"):
        extend_context(model, YARN)
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        extend_context(GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=8, n_layer=1, n_head=1, vocab_size=8)), YARN)


def test_the_mixture_has_its_share_of_needles_and_leaves_the_rest_as_it_is() -> None:
    stream = np.arange(1_000, 1_000 + 10 * 200 + 7, dtype=np.int32)
    made = mix_long(stream, FORM, LongMixture(200, 0.3, needles=5, questions=4), seed=4)
    again = mix_long(stream, FORM, LongMixture(200, 0.3, needles=5, questions=4), seed=4)
    assert made.counts is not None and made.tokens.shape == (10, 200)
    np.testing.assert_array_equal(made.tokens, again.tokens)
    changed = (made.tokens < 1_000).any(axis=1)
    assert changed.sum() == 3 and made.counts[~changed].all() and not made.counts[changed].all()
    np.testing.assert_array_equal(made.tokens[~changed], stream[:2_000].reshape(10, 200)[~changed])
    with pytest.raises(UserError, match="at least one sequence of 200"):
        mix_long(stream[:199], FORM, LongMixture(200, needles=5, questions=4), seed=0)
    with pytest.raises(UserError, match="retrieval_ratio"):
        mix_long(stream, FORM, LongMixture(200, 1.1, needles=5, questions=4), seed=0)


def test_the_long_phase_trains_a_stretched_model_and_no_other(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(3, 10, 256 * 8).astype(np.int32)
    mixture = LongMixture(256, 0.5, needles=12, questions=8)
    plan = TrainPlan(12, 2, 3e-3, 0.0, 0.1, False, 0, 100, micro_sequences=1)
    model = build()
    with pytest.raises(UserError, match="1 to 128, this model's context"):
        train_long(model, stream, FORM, mixture, plan, tmp_path, "long")
    extend_context(model, YARN)
    history = train_long(model, stream, FORM, mixture, plan, tmp_path, "long")
    assert history[-1]["step"] == 12 and history[-1]["loss"] < history[0]["loss"] - 0.5
