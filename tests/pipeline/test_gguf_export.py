"""GGUF files, read by the gguf package and by transformers' own GGUF loader."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import CODE_RANGE, QuantizedTensor, Weights, dequantize, load_weights, save_weights
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.gguf import MODEL_FILE, encode_blocks, write_gguf
from pipeline.export.gguf_metadata import architecture_of, rope_factors
from pipeline.export.gguf_reader import require_same_gguf
from pipeline.export.parity import load_dequantized
from pipeline.quantization.rounding import pad_intermediate, quantize_tensor

MakeModel = Callable[..., Any]
TOKENS = torch.arange(48)[None] * 5 % 320
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}  # fmt: skip


def quantized(model: Any, group: int = 32, eight: str = "o_proj") -> tuple[DecoderSpec, Weights]:
    """Signed scales, four bits but for one kind of matrix."""
    spec, floats = pad_intermediate(spec_of(model, 64), float_weights(model), group)
    return spec, {
        name: value
        if value.ndim != 2
        else quantize_tensor(value, bits=8 if eight in name else 4, group=group, rounding="rtn", positive_scales=False)
        for name, value in floats.items()
    }


def write(path: Path, model: Any, spec: DecoderSpec, weights: Weights) -> gguf.GGUFReader:
    write_gguf(path, spec, weights, config=model.config, vocabulary=None, name="toy", licence="Apache-2.0")
    return gguf.GGUFReader(path)


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@given(
    st.integers(1, 5), st.integers(1, 6), st.sampled_from([32, 64, 128]), st.sampled_from([4, 8]), st.integers(0, 2**32)
)
@settings(max_examples=60, deadline=None)
def test_blocks_dequantize_to_code_times_scale(rows: int, blocks: int, group: int, bits: int, seed: int) -> None:
    """Also where the last group is longer than what is left of the row."""
    random = np.random.default_rng(seed)
    columns, padded = 32 * blocks, -(-32 * blocks // group) * group
    low, high = CODE_RANGE[bits]
    codes = random.integers(low, high + 1, (rows, padded)).astype(np.int8)
    scales = (random.choice([-1, 1], (rows, padded // group)) * random.random((rows, padded // group))).astype("f2")
    tensor = QuantizedTensor.of_codes(codes, scales, bits, columns)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    found = gguf.dequantize(encode_blocks(tensor), kind)
    np.testing.assert_array_equal(found.view(np.uint32), dequantize(tensor).view(np.uint32))


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_file_as_the_same_model(
    architecture: str, group: int, make_model: MakeModel, tmp_path: Path
) -> None:
    """The intermediate size is padded from 80; tied and untied heads, eight bits beside four."""
    tied = architecture in ("qwen2", "mistral")
    model = make_model(architecture, intermediate_size=80, tie_word_embeddings=tied)
    spec, weights = quantized(model, group)
    reader = write(tmp_path / MODEL_FILE, model, spec, weights)
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) != tied
    assert require_same_gguf(tmp_path / MODEL_FILE, spec, weights) == sum(int(t.n_bytes) for t in reader.tensors)
    load_dequantized(model, weights)
    padded = type(model.config)(**(model.config.to_dict() | {"intermediate_size": spec.intermediate_size}))
    # Its Llama and Mistral are one; of Qwen3 it guesses the width of heads.
    config = {} if architecture in ("llama", "mistral") else {"config": padded}
    with redirect_stderr(io.StringIO()), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=MODEL_FILE, dtype=torch.float32, **config
        ).eval()
        # Padded columns change the order of sums in the FFN, nothing else does.
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=2e-5)


def test_a_qwen2_with_narrow_heads_is_written_as_a_llama(make_model: MakeModel, tmp_path: Path) -> None:
    """llama.cpp's graph of Qwen2 wants heads as wide as the model; that of a Llama takes Qwen2's biases."""
    model = make_model("qwen2", num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.copy_(torch.randn_like(layer.self_attn.q_proj.weight) * 0.1)
    narrow = make_model("qwen2", num_attention_heads=8, num_key_value_heads=2, hidden_size=64, head_dim=16)
    spec = spec_of(narrow, 64)
    assert (spec.num_heads * spec.head_dim, spec.hidden_size) == (128, 64)
    assert architecture_of(narrow.config, spec) == "llama"
    weights = quantized(narrow)[1]
    reader = write(tmp_path / MODEL_FILE, narrow, spec, weights)
    assert value(reader, "general.architecture") == "llama"
    biases = {tensor.name: tensor for tensor in reader.tensors if tensor.name.endswith("attn_q.bias")}
    assert len(biases) == spec.num_layers
    halves = weights["model.layers.0.self_attn.q_proj.bias"].reshape(8, 2, 8)
    np.testing.assert_array_equal(biases["blk.0.attn_q.bias"].data.reshape(8, 8, 2), halves.swapaxes(1, 2))
    require_same_gguf(tmp_path / MODEL_FILE, spec, weights)


def test_keys_say_what_the_configuration_says(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen3", head_dim=32, rms_norm_eps=3e-6, tie_word_embeddings=True)
    reader = write(tmp_path / MODEL_FILE, model, *quantized(model, eight="none"))
    expected = {
        "general.architecture": "qwen3", "general.name": "toy", "general.license": "Apache-2.0", "general.file_type": 2,
        "qwen3.context_length": 256, "qwen3.embedding_length": 64, "qwen3.block_count": 3,
        "qwen3.feed_forward_length": 96, "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32, "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 10000.0, "qwen3.vocab_size": 320, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "qwen3.attention.layer_norm_rms_epsilon") == np.float32(3e-6)


def test_rope_scaling_is_told(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters=YARN)
    reader = write(tmp_path / "yarn.gguf", model, *quantized(model))
    assert value(reader, "llama.rope.scaling.type") == "yarn"
    assert value(reader, "llama.rope.scaling.factor") == 4.0
    assert value(reader, "llama.rope.scaling.original_context_length") == 64
    assert value(reader, "llama.rope.scaling.yarn_beta_fast") == 16.0
    assert value(reader, "llama.rope.scaling.yarn_beta_slow") == 2.0
    # llama.cpp multiplies by 0.1 ln(factor) + 1 itself.
    found = value(reader, "llama.rope.scaling.attn_factor") * (0.1 * np.log(4) + 1)
    assert found == pytest.approx(1.25, rel=1e-6)
    linear = make_model("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    reader = write(tmp_path / "linear.gguf", linear, *quantized(linear))
    assert value(reader, "llama.rope.scaling.type") == "linear"
    assert value(reader, "llama.rope.scaling.factor") == 2.0


def test_frequencies_of_llama_3_are_stored_as_divisors(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", rope_parameters=LLAMA3)
    spec, weights = quantized(model)
    reader = write(tmp_path / MODEL_FILE, model, spec, weights)
    (factors,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1e4 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, spec.inv_freq, rtol=1e-6)
    assert factors.max() == pytest.approx(8.0) and factors.min() == pytest.approx(1.0)
    assert rope_factors(make_model("llama").config, spec) is None
    require_same_gguf(tmp_path / MODEL_FILE, spec, weights)


def test_two_writes_give_the_same_bytes_whether_mapped_or_not(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    save_weights(tmp_path / "weights.safetensors", spec, weights)
    write(tmp_path / "a.gguf", model, spec, weights)
    write(tmp_path / "b.gguf", model, *load_weights(tmp_path / "weights.safetensors"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight",
                                  "model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])  # fmt: skip
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_found(name: str, place: int, make_model: MakeModel, tmp_path: Path) -> None:
    """The first byte of a tensor is half of a scale, the last one two codes."""
    model = make_model("llama")
    spec, weights = quantized(model)
    path = tmp_path / MODEL_FILE
    reader = write(path, model, spec, weights)
    short = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
        name, name.replace("model.layers.", "blk.").replace("self_attn.k_proj", "attn_k").replace(
            "self_attn.o_proj", "attn_output")
    )  # fmt: skip
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == short)
    raw = bytearray(path.read_bytes())
    raw[int(tensor.data_offset) + (0 if place == 0 else int(tensor.n_bytes) - 1)] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ExportError, match="differs from the stored codes"):
        require_same_gguf(path, spec, weights)


def test_the_sign_of_a_scale_counts_where_all_codes_are_zero(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    name = "model.layers.0.mlp.up_proj.weight"
    zero = QuantizedTensor.of_codes(np.zeros((96, 64), np.int8), np.full((96, 2), -0.0, np.float16), 4, 64)
    write(tmp_path / MODEL_FILE, model, spec, {**weights, name: zero})
    require_same_gguf(tmp_path / MODEL_FILE, spec, {**weights, name: zero})
    positive = QuantizedTensor(zero.packed, np.abs(zero.scales), 4, 64)
    with pytest.raises(ExportError, match="ffn_up"):
        require_same_gguf(tmp_path / MODEL_FILE, spec, {**weights, name: positive})


def test_a_cut_or_foreign_file_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    path = tmp_path / MODEL_FILE
    write(path, model, spec, weights)
    raw = path.read_bytes()
    for damaged in (b"", b"NOPE" + raw[4:], raw[: len(raw) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ExportError):
            require_same_gguf(path, spec, weights)


def test_widths_that_are_no_whole_blocks_are_refused_with_both_numbers(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=80, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    with pytest.raises(ExportError, match=r"blocks of 32, 80 columns"):
        write(tmp_path / MODEL_FILE, model, *quantized(model))
    assert not (tmp_path / MODEL_FILE).exists()


def test_what_llama_cpp_does_not_compute_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    biased = make_model("qwen3", attention_bias=True)
    with pytest.raises(ExportError, match=r"o_proj\.bias.*qwen3"):
        write(tmp_path / MODEL_FILE, biased, *quantized(biased))
    rounded = make_model("llama", rope_parameters={**YARN, "truncate": False})
    with pytest.raises(ExportError, match="truncate"):
        write(tmp_path / MODEL_FILE, rounded, *quantized(rounded))
