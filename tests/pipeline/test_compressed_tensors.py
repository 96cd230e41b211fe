"""compressed-tensors folders, read by the package itself and by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import CODE_RANGE, QuantizedTensor, Weights, load_weights, save_weights
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.compressed_tensors import copy_texts, pack_int32, write_compressed_tensors
from pipeline.export.compressed_tensors_reader import load_logits, require_same_compressed_tensors
from pipeline.export.parity import load_dequantized
from pipeline.quantization.rounding import pad_intermediate, quantize_tensor

MakeModel = Callable[..., Any]
TOKENS = np.random.default_rng(3).integers(0, 320, (2, 24)).astype(np.int32)


def quantized(
    model: Any, *, group: int = 32, bits: Callable[[str], int] = lambda name: 4
) -> tuple[DecoderSpec, Weights]:
    spec, floats = pad_intermediate(spec_of(model, 64), float_weights(model), group)
    return spec, {
        name: value
        if value.ndim != 2
        else quantize_tensor(value, bits=bits(name), group=group, rounding="rtn", positive_scales=False)
        for name, value in floats.items()
    }


def write(
    folder: Path, model: Any, spec: DecoderSpec, weights: Weights, *, linear_only: bool = False, **options: Any
) -> Path:
    model.config.architectures = [type(model).__name__]
    config = folder.parent / f"{folder.name}.json"
    model.config.to_json_file(config, use_diff=False)
    folder.mkdir()
    write_compressed_tensors(folder, spec, weights, config=config, linear_only=linear_only, **options)
    return folder


def logits(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long(), use_cache=False).logits.numpy()


@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_codes_are_packed_as_the_package_packs_them(rows: int, groups: int, bits: int, seed: int) -> None:
    low, high = CODE_RANGE[bits]
    codes = np.random.default_rng(seed).integers(low, high + 1, (rows, 32 * groups)).astype(np.int8)
    tensor = QuantizedTensor.of_codes(codes, np.ones((rows, groups), np.float16), bits, 32 * groups)
    packed = torch.from_numpy(pack_int32(tensor))
    assert torch.equal(packed, pack_to_int32(torch.from_numpy(codes), bits))
    np.testing.assert_array_equal(unpack_from_int32(packed, bits, torch.Size(codes.shape)).numpy(), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_the_dequantized_model(
    architecture: str, tied: bool, bits: int, make_model: MakeModel, tmp_path: Path
) -> None:
    """Equal to the last bit: the unpacked weights are, and the code is the same. The intermediate is padded from 80."""
    model = make_model(architecture, intermediate_size=80, tie_word_embeddings=tied, num_hidden_layers=2)
    spec, weights = quantized(model, bits=lambda name: bits)
    folder = write(tmp_path / "packed", model, spec, weights)
    stored = require_same_compressed_tensors(folder, weights, linear_only=False)
    assert 0 < (folder / "model.safetensors").stat().st_size - stored < 16_000  # the header
    wide = make_model(architecture, intermediate_size=96, tie_word_embeddings=tied, num_hidden_layers=2)
    np.testing.assert_array_equal(load_logits(folder, TOKENS), logits(load_dequantized(wide, weights)))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_layers_alone_make_the_dequantized_model(
    tied: bool, mixed: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    """Equal to the last bit, embedding and head included."""
    model = make_model("llama", tie_word_embeddings=tied)
    spec, weights = quantized(
        model, bits=lambda name: 8 if mixed and ("o_proj" in name or "layers.1.mlp" in name) else 4
    )
    folder = write(tmp_path / "linear", model, spec, weights, linear_only=True)
    require_same_compressed_tensors(folder, weights, linear_only=True)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "run_compressed" not in config and len(config["config_groups"]) == (2 if mixed else 1)
    expected = torch.from_numpy(logits(load_dequantized(model, weights)))
    assert torch.equal(torch.from_numpy(load_logits(folder, TOKENS)), expected)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        assert torch.equal(plain(torch.from_numpy(TOKENS).long(), use_cache=False).logits, expected)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == np.float32
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight_scale").dtype == np.float16
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118


def test_two_grids_beside_packed_embeddings_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    """transformers would read the second with the first one's bits."""
    model = make_model("llama")
    spec, weights = quantized(model, bits=lambda name: 8 if "o_proj" in name else 4)
    with pytest.raises(ExportError, match=r"4 bits in groups of 32, 8 bits.*safetensors_linear"):
        write(tmp_path / "packed", model, spec, weights)


def test_shards_hold_the_same_tensors(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    save_weights(tmp_path / "weights.safetensors", spec, weights)
    one = write(tmp_path / "one", model, spec, weights)
    several = write(tmp_path / "several", model, *load_weights(tmp_path / "weights.safetensors"), shard_bytes=30_000)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in several.glob("model-*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    total = require_same_compressed_tensors(one, weights, linear_only=False)
    assert require_same_compressed_tensors(several, weights, linear_only=False) == total
    assert index["metadata"]["total_size"] == total
    np.testing.assert_array_equal(load_logits(several, TOKENS), load_logits(one, TOKENS))


@pytest.mark.parametrize("linear_only", [False, True])
@pytest.mark.parametrize(
    "part",
    ["model.layers.1.self_attn.v_proj.weight_packed", "lm_head.weight", "model.norm.weight",
     "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.weight_shape"],
)  # fmt: skip
def test_a_changed_bit_is_found(part: str, linear_only: bool, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    path = write(tmp_path / "folder", model, spec, weights, linear_only=linear_only) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    entry = header[part] if part in header else header[f"{part}_packed"]
    for place in (start + entry["data_offsets"][0], start + entry["data_offsets"][1] - 1):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(ExportError, match="differs from the stored codes"):
            require_same_compressed_tensors(path.parent, weights, linear_only=linear_only)


def test_the_sign_of_a_zero_scale_counts(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    name = "model.layers.0.mlp.up_proj.weight"
    zero = QuantizedTensor.of_codes(np.zeros((96, 64), np.int8), np.full((96, 2), -0.0, np.float16), 4, 64)
    folder = write(tmp_path / "folder", model, spec, {**weights, name: zero})
    require_same_compressed_tensors(folder, {**weights, name: zero}, linear_only=False)
    positive = QuantizedTensor(zero.packed, np.abs(zero.scales), 4, 64)
    with pytest.raises(ExportError, match="up_proj"):
        require_same_compressed_tensors(folder, {**weights, name: positive}, linear_only=False)


def test_columns_that_are_no_whole_groups_are_refused_with_both_numbers(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=80, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    with pytest.raises(ExportError, match="80 columns are no multiple of 32"):
        write(tmp_path / "folder", model, *quantized(model))


def test_a_cut_file_and_a_missing_tensor_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    spec, weights = quantized(model)
    path = write(tmp_path / "folder", model, spec, weights) / "model.safetensors"
    fewer = {name: value for name, value in weights.items() if name != "model.norm.weight"}
    with pytest.raises(ExportError, match=r"tensors differ: model\.norm\.weight"):
        require_same_compressed_tensors(path.parent, fewer, linear_only=False)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ExportError, match="cannot be read back"):
        require_same_compressed_tensors(path.parent, weights, linear_only=False)


def test_texts_make_a_folder_that_transformers_opens(
    tokenizer: Tokenizer, make_model: MakeModel, tmp_path: Path
) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir(), folder.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    make_model("llama").generation_config.save_pretrained(source)
    copy_texts(folder, student=source, tokenizer=source, bos=0, eos=[1])
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "def function_3(x):\n    return 'é'"
    assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    shutil.rmtree(folder)
    folder.mkdir()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    copy_texts(folder, student=tmp_path, tokenizer=source, bos=None, eos=[])
    assert "bos_token" not in json.loads((folder / "tokenizer_config.json").read_text())
