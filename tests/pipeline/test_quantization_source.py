"""Checkpoints as quantization opens them: what is refused, in one line that says which tensor and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_runtime.formats.errors import ExportError, UserError
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.parity import load_dequantized
from pipeline.quantization import source
from pipeline.quantization.source import open_checkpoint, read_rows, row_blocks
from tests.pipeline.conftest import MakeModel
from tests.pipeline.quantization_cases import CONTEXT_TOKENS, change_tensor, save_checkpoint

DOWN, HEAD, EMBEDDING = "model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(make_model("qwen2", intermediate_size=172), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder: Path, error: type[Exception] = UserError) -> str:
    """The line that opening and reading everything ends with."""
    with pytest.raises(error) as caught:
        for tensor in open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors.values():
            read_rows(tensor)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_sizes_come_from_the_config_alone(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture)
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path), CONTEXT_TOKENS, 32)
    assert checkpoint.spec == spec_of(model, CONTEXT_TOKENS)
    floats = float_weights(model)
    assert set(checkpoint.tensors) == set(floats)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(read_rows(tensor), floats[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("block_weights", [1, 4000, 1 << 20])
def test_blocks_of_rows_are_the_tensor(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block_weights: int
) -> None:
    monkeypatch.setattr(source, "BLOCK_WEIGHTS", block_weights)
    model = make_model("llama", mlp_bias=True, intermediate_size=172)
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path, dtype), CONTEXT_TOKENS, 128)
    assert checkpoint.spec.intermediate_size == 256
    state = model.state_dict()
    for name, tensor in checkpoint.tensors.items():
        found = np.concatenate([read_rows(tensor, start, stop) for start, stop in row_blocks(tensor)])
        expected = np.zeros(tensor.shape, np.float32)
        expected[tuple(slice(size) for size in state[name].shape)] = state[name].float().numpy()
        np.testing.assert_array_equal(found, expected)
        assert (tensor.shape != tensor.stored) == (".mlp." in name and "down_proj.bias" not in name)


@pytest.mark.parametrize("hidden_size", [172, 1000])
def test_a_hidden_size_that_does_not_divide_stays_as_it_is(
    make_model: MakeModel, tmp_path: Path, hidden_size: int
) -> None:
    model = make_model("llama", hidden_size=hidden_size, num_hidden_layers=1)
    checkpoint = open_checkpoint(save_checkpoint(model, tmp_path), CONTEXT_TOKENS, 32)
    assert checkpoint.spec.hidden_size == hidden_size
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].shape == (96, hidden_size)


class TestTiedWeights:
    def test_a_copy_of_the_embedding_is_stored_once(self, folder: Path) -> None:
        embedding = open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors[EMBEDDING]
        values = torch.from_numpy(read_rows(embedding)).to(torch.bfloat16)
        change_tensor(folder, HEAD, lambda _: values)
        checkpoint = open_checkpoint(folder, CONTEXT_TOKENS, 32)
        assert checkpoint.spec.tied_embeddings and HEAD not in checkpoint.tensors and HEAD not in checkpoint.matrices
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        load_dequantized(model, {EMBEDDING: np.ones(embedding.shape, np.float32)})
        assert (model.lm_head.weight == 1).all() and (model.model.embed_tokens.weight == 1).all()

    def test_one_different_weight_makes_it_another_matrix(self, folder: Path) -> None:
        embedding = open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors[EMBEDDING]
        values = torch.from_numpy(read_rows(embedding)).to(torch.bfloat16)
        values[-1, -1] += 1
        change_tensor(folder, HEAD, lambda _: values)
        checkpoint = open_checkpoint(folder, CONTEXT_TOKENS, 32)
        assert not checkpoint.spec.tied_embeddings and HEAD in checkpoint.matrices
        change_config(folder, tie_word_embeddings=True)
        assert "lm_head.weight that differs from model.embed_tokens.weight" in refused(folder)
        change_tensor(folder, HEAD, lambda _: None)
        assert open_checkpoint(folder, CONTEXT_TOKENS, 32).spec.tied_embeddings

    def test_a_tied_head_that_the_file_repeats_is_dropped(self, folder: Path) -> None:
        embedding = read_rows(open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors[EMBEDDING])
        change_tensor(folder, HEAD, lambda _: torch.from_numpy(embedding))  # in another type, but equal
        change_config(folder, tie_word_embeddings=True)
        assert HEAD not in open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors


class TestRefusals:
    def test_a_missing_shard(self, folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        assert f"missing {shard.name}" in refused(folder)

    @pytest.mark.parametrize("left_bytes", [0, 4, 100, -1, -5000])
    def test_a_shard_that_is_cut(self, folder: Path, left_bytes: int) -> None:
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:left_bytes])
        assert shard.name in refused(folder) and "whole safetensors file" in refused(folder)

    def test_a_file_that_shrinks_after_it_was_opened(self, folder: Path) -> None:
        tensor = open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors[DOWN]
        tensor.path.write_bytes(tensor.path.read_bytes()[: tensor.offset_bytes + 10])
        with pytest.raises(UserError, match=r"down_proj\.weight: got 'model-.* ends in it'"):
            read_rows(tensor)

    def test_an_index_that_names_what_a_shard_lacks(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        values["weight_map"]["model.layers.9.bias"] = values["weight_map"][DOWN]
        index.write_text(json.dumps(values))
        assert "without model.layers.9.bias" in refused(folder)

    def test_a_tensor_that_the_decoder_has_no_place_for(self, folder: Path) -> None:
        change_config(folder, num_hidden_layers=2, layer_types=None)
        assert "tensor model.layers.2." in refused(folder)

    def test_a_tensor_that_is_missing(self, folder: Path) -> None:
        change_tensor(folder, DOWN, lambda _: None)
        assert f"no tensor {DOWN}" in refused(folder)
        change_tensor(folder, HEAD, lambda _: None)
        assert "no tensor" in refused(folder)

    def test_a_tensor_of_another_shape(self, folder: Path) -> None:
        change_tensor(folder, DOWN, lambda tensor: tensor[:, 1:].contiguous())
        assert f"{DOWN} of shape (64, 171)" in refused(folder) and "(64, 172)" in refused(folder)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
    def test_a_type_that_is_not_taken(self, folder: Path, dtype: torch.dtype) -> None:
        change_tensor(folder, DOWN, lambda tensor: tensor.to(dtype))
        name = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float64: "F64"}[dtype]
        assert f"{DOWN} as {name}" in refused(folder) and "F32, F16, BF16" in refused(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
    def test_weights_that_are_not_finite(self, folder: Path, name: str, value: float) -> None:
        def spoil(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[-1] = value
            return tensor

        change_tensor(folder, name, spoil)
        assert f"weights {name}: got 'NaN or infinity'" in refused(folder)

    def test_a_quantized_checkpoint(self, folder: Path) -> None:
        change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
        assert "a quantized checkpoint" in refused(folder)

    def test_an_option_that_no_container_has(self, folder: Path) -> None:
        change_config(folder, hidden_act="gelu")
        assert "hidden_act gelu" in refused(folder, ExportError)

    def test_rotary_frequencies_of_older_files_are_passed_over(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        from safetensors.torch import save_file

        save_file({name: torch.ones(8)}, folder / "more.safetensors")
        values["weight_map"][name] = "more.safetensors"
        index.write_text(json.dumps(values))
        assert name not in open_checkpoint(folder, CONTEXT_TOKENS, 32).tensors
