"""The decoder's shape as the manifest holds it."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest

from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec, module_name

SPEC = DecoderSpec(
    vocab_size=511, hidden_size=80, intermediate_size=172, num_layers=2, num_heads=5, num_kv_heads=1, head_dim=16,
    context_tokens=128, rms_norm_eps=1e-6, inv_freq=tuple(1e4 ** (-n / 8) for n in range(8)), tied_embeddings=True,
    rope_attention_factor=1.13862943611,
)  # fmt: skip
INTEGERS = [field.name for field in fields(DecoderSpec) if field.type == "int"]
NUMBERS = ["rms_norm_eps", "rope_attention_factor"]


def test_a_spec_survives_json_bit_for_bit() -> None:
    loaded = DecoderSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert loaded == SPEC and isinstance(loaded.inv_freq, tuple) and hash(loaded) == hash(SPEC)
    assert len(INTEGERS) == 8


def test_every_key_is_required_and_none_else_taken() -> None:
    values = SPEC.to_dict()
    for name in values:
        with pytest.raises(ValueError, match=rf"decoder keys differ: \['{name}'\]"):
            DecoderSpec.from_dict({key: value for key, value in values.items() if key != name})
    with pytest.raises(ValueError, match=r"decoder keys differ: \['window'\]"):
        DecoderSpec.from_dict(values | {"window": 5})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, "5", None, True, [1]])
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"decoder\.{name} must be a positive integer"):
        DecoderSpec.from_dict(SPEC.to_dict() | {name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0.0, -1e-6, 1e9, math.nan, math.inf, "1", None, True])
def test_numbers_are_positive_and_finite(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"decoder\.{name} must be a positive number"):
        DecoderSpec.from_dict(SPEC.to_dict() | {name: value})


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=r"decoder\.tied_embeddings must be true or false"):
        DecoderSpec.from_dict(SPEC.to_dict() | {"tied_embeddings": value})


@pytest.mark.parametrize("first", [None, "1.0", math.nan, math.inf, -1.0, [1.0], True])
def test_frequencies_are_numbers(first: Any) -> None:
    with pytest.raises(ValueError, match=r"decoder\.inv_freq"):
        DecoderSpec.from_dict(SPEC.to_dict() | {"inv_freq": [first, *SPEC.inv_freq[1:]]})


@pytest.mark.parametrize("value", [None, 5, "12345678", {}, [], [1.0] * 7, [1.0] * 16])
def test_there_is_one_frequency_for_two_dimensions_of_a_head(value: Any) -> None:
    with pytest.raises(ValueError, match=r"decoder\.inv_freq must hold head_dim / 2 numbers"):
        DecoderSpec.from_dict(SPEC.to_dict() | {"inv_freq": value})


def test_projection_shapes_are_those_of_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=511, hidden_size=80, intermediate_size=172, num_hidden_layers=2, num_attention_heads=5,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    modules = dict(transformers.LlamaForCausalLM(config).named_modules())
    for name, projection in SPEC.module_names():
        assert tuple(modules[name].weight.shape) == SPEC.projection_shape(projection)
    linear = [name for name, module in modules.items() if type(module).__name__ == "Linear" and name != "lm_head"]
    assert sorted(name for name, _ in SPEC.module_names()) == sorted(linear)


def test_names_come_layer_by_layer() -> None:
    names = list(replace(SPEC, num_layers=3).module_names(("q_proj", "down_proj")))
    assert names[:2] == [("model.layers.0.self_attn.q_proj", "q_proj"), ("model.layers.0.mlp.down_proj", "down_proj")]
    assert len(names) == 6 and names[-1][0] == module_name(2, "down_proj")
    assert len(list(SPEC.module_names())) == 2 * len(PROJECTIONS)
