"""Matrices that take the largest group which divides their columns: quantizers, sizes and every container."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.backends.onnx import OnnxBackend
from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, Weights, dequantize, load_weights
from pipeline.config import load_configs
from pipeline.export.compressed_tensors import write_compressed_tensors
from pipeline.export.compressed_tensors_reader import load_logits, require_same_compressed_tensors
from pipeline.export.gguf import write_gguf
from pipeline.export.gguf_reader import require_same_gguf
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.onnx_reader import read_onnx_weights
from pipeline.export.onnx_reader import weight_bytes as onnx_weight_bytes
from pipeline.export.parity import load_dequantized, require_same_weights
from pipeline.export.tflite_graph import write_tflite
from pipeline.export.tflite_reader import read_tflite_weights
from pipeline.export.train_step_onnx import write_onnx_train_steps
from pipeline.export.train_step_parity import draw_probe, onnx_step, require_same_step, torch_step
from pipeline.model_bytes import least_weights_bytes
from pipeline.quantization.allocation import choose_grids, sizes_of
from pipeline.quantization.calibrated import Calibration, quantize_calibrated
from pipeline.quantization.grid import Grid, fitting_group, padded_columns, stored_bytes
from pipeline.quantization.qad import QuantizedStudent, fake_quantized, trained_codes
from pipeline.quantization.source import Checkpoint, SourceTensor, open_checkpoint
from pipeline.quantization.streaming import quantize_checkpoint
from pipeline.sizes import ModelSizes

from .conftest import SIZES, VOCABULARY, MakeModel

# Inputs of 192 take groups of 64, o_proj's of 128 its own, down_proj's of 160 those of 32.
WIDTHS = {"hidden_size": 192, "head_dim": 32, "intermediate_size": 160, "num_hidden_layers": 2}
GRID = Grid(4, 128, positive_scales=False)
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (4, 24)).astype(np.int32)
LORA = LoraSlots(PROJECTIONS, rank=2)
SMOLLM2 = ModelSizes(49_152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)


def expected_group(name: str) -> int:
    return 128 if "o_proj" in name else 32 if "down_proj" in name else 64


def quantized(model: Any, folder: Path, grid: Grid = GRID) -> tuple[Checkpoint, DecoderSpec, Weights]:
    """Codes as stage quantize makes and reads them, in a file."""
    model.save_pretrained(folder / "model")
    source = open_checkpoint(folder / "model", 64, grid.group)
    quantize_checkpoint(source, source.grids(grid), "rtn", folder / "weights.safetensors", folder / "work")
    return source, *load_weights(folder / "weights.safetensors")


@given(st.integers(1, 5000), st.sampled_from([32, 64, 128]))
def test_the_largest_group_that_divides_is_taken_and_none_pads(columns: int, group: int) -> None:
    found, padded = fitting_group(columns, group), padded_columns(columns, group)
    dividing = [size for size in (32, 64, 128) if size <= group and columns % size == 0]
    assert found == (max(dividing) if dividing else group)
    assert padded == (columns if dividing else columns + -columns % group)


@pytest.mark.parametrize(("hidden_size", "ffn", "groups", "padded"), [
    (192, 160, (64, 32), 160), (96, 384, (32, 128), 384), (172, 172, (128, 128), 256), (1000, 128, (128, 128), 128),
])  # fmt: skip
def test_an_ffn_is_padded_only_where_no_group_divides_it(
    make_model: MakeModel, tmp_path: Path, hidden_size: int, ffn: int, groups: tuple[int, int], padded: int
) -> None:
    model = make_model("llama", hidden_size=hidden_size, intermediate_size=ffn, num_hidden_layers=1)
    source, spec, weights = quantized(model, tmp_path)
    assert (spec.hidden_size, spec.intermediate_size) == (hidden_size, padded)
    for name, group in zip(("up_proj", "down_proj"), groups, strict=True):
        value = weights[f"model.layers.0.mlp.{name}.weight"]
        assert isinstance(value, QuantizedTensor) and value.group == group
    assert source.grids(replace(GRID, group=0)) == dict.fromkeys(source.matrices, replace(GRID, group=0))


@pytest.mark.parametrize("positive", [True, False])
def test_codes_are_in_the_groups_that_fit_and_nothing_is_padded(
    make_model: MakeModel, tmp_path: Path, positive: bool
) -> None:
    model = make_model("qwen2", **WIDTHS)
    source, spec, weights = quantized(model, tmp_path, replace(GRID, positive_scales=positive))
    assert spec.intermediate_size == 160
    assert len(source.matrices) == 2 + 2 * 7
    for name in source.matrices:
        value = weights[name]
        assert isinstance(value, QuantizedTensor)
        assert value.group == expected_group(name) and value.padded_columns == value.columns
        groups = model.get_parameter(name).detach().numpy().reshape(len(value.scales), -1, value.group)
        reach = np.maximum(groups.max(2) / 7, -groups.min(2) / 8) if positive else np.abs(groups).max(2) / 8
        np.testing.assert_allclose(np.abs(value.scales.astype(np.float32)), reach, rtol=2e-3)


@pytest.mark.parametrize("rounding", ["gptq", "weighted_mse"])
def test_codes_chosen_on_text_and_trained_ones_keep_the_groups(
    make_model: MakeModel, tmp_path: Path, rounding: Any
) -> None:
    make_model("llama", tie_word_embeddings=True, **WIDTHS).save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model", 64, 128)
    grids = source.grids(GRID)
    found = quantize_calibrated(source, TOKENS, Calibration(rounding, grids), tmp_path / "work", "test")
    codes = {name: found[name] for name in grids}
    assert {name: value.group for name, value in codes.items()} == {name: expected_group(name) for name in grids}
    student = QuantizedStudent(make_model("llama", tie_word_embeddings=True, **WIDTHS), codes, grids)
    trained = trained_codes(student)
    for name, value in codes.items():
        assert (trained[name].packed == value.packed).all() and (trained[name].scales == value.scales).all()
        assert (fake_quantized(student)[name].detach().numpy() == dequantize(value)).all()


def test_a_mixture_of_bits_keeps_the_groups_and_its_bytes_are_the_stored_ones(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("llama", **WIDTHS)
    source, _, weights = quantized(model, tmp_path)
    grids = source.grids(GRID)
    sizes = sizes_of(source, grids)
    values = list(weights.values())
    assert sizes.least == sum(v.weight_bytes if isinstance(v, QuantizedTensor) else v.nbytes for v in values)
    chosen, figures = choose_grids(model, sizes, TOKENS, grids, rounding="rtn", weight_ratio_max=0.4, together=False)
    assert {grid.bits for grid in chosen.values()} == {4, 8}
    assert {name: grid.group for name, grid in chosen.items()} == {name: expected_group(name) for name in grids}
    quantize_checkpoint(source, chosen, "rtn", tmp_path / "mixed", tmp_path / "work")
    stored = sum(
        v.weight_bytes if isinstance(v, QuantizedTensor) else v.nbytes
        for v in load_weights(tmp_path / "mixed")[1].values()
    )
    assert figures["chosen"]["weight_ratio"] == round(stored / (2 * source.params), 5) <= 0.4


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_onnx_computes_with_the_groups_of_each_matrix(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture, tie_word_embeddings=architecture == "qwen2", **WIDTHS)
    _, spec, weights = quantized(model, tmp_path)
    folder = tmp_path / "onnx"
    folder.mkdir()
    places = write_onnx(folder, spec, weights, lora=LORA, accuracy_level=0)
    for file in ("model.onnx", "model_lora.onnx"):
        require_same_weights(file, weights, read_onnx_weights(folder / file))
    nodes = {node.name for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
    prefix = "model.layers.1.self_attn"
    assert f"{prefix}.q_proj+k_proj+v_proj" in nodes, "one matrix: what reads the same states has the same groups"
    stored = sum(v.weight_bytes if isinstance(v, QuantizedTensor) else v.nbytes for v in weights.values())
    assert onnx_weight_bytes(folder / "model.onnx") == stored
    reference = load_dequantized(model, weights)
    with torch.no_grad():
        expected = reference(input_ids=torch.arange(20)[None]).logits[0].numpy()
    backend = OnnxBackend.open(folder, spec)
    found = backend.prefill(range(20), backend.allocate(20), all_logits=True)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))
    backend.close()
    write_onnx_train_steps(folder, spec, places, LORA, buckets=[16], batch_sequences=1)
    probe = draw_probe(reference, spec, LORA, TOKENS[:1, :16])
    expected_step = torch_step(reference, probe)
    assert require_same_step("onnx", expected_step, onnx_step(folder / "train_16.onnx", probe, threads=1)) < 4e-5


def test_gguf_repeats_scales_of_each_group(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", **WIDTHS)
    _, spec, weights = quantized(model, tmp_path)
    path = tmp_path / "model.gguf"
    write_gguf(path, spec, weights, config=model.config, vocabulary=None, name="toy", licence="Apache-2.0")
    blocks = sum(v.packed.nbytes + v.packed.size // 16 * 2 for v in weights.values() if isinstance(v, QuantizedTensor))
    vectors = sum(v.nbytes for v in weights.values() if not isinstance(v, QuantizedTensor))
    assert require_same_gguf(path, spec, weights) == blocks + vectors


@pytest.mark.parametrize("linear_only", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_dequantized_model(
    make_model: MakeModel, tmp_path: Path, tied: bool, linear_only: bool
) -> None:
    """Packed whole it reads one group, the shortest; linear layers alone keep their own."""
    model = make_model("llama", tie_word_embeddings=tied, **WIDTHS)
    _, spec, weights = quantized(model, tmp_path)
    folder, config = tmp_path / "folder", tmp_path / "model" / "config.json"
    folder.mkdir()
    write_compressed_tensors(folder, spec, weights, config=config, linear_only=linear_only)
    require_same_compressed_tensors(folder, weights, linear_only=linear_only)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert [group["weights"]["group_size"] for group in groups] == ([64, 32, 128] if linear_only else [32])
    reference = load_dequantized(model, weights)
    with torch.no_grad():
        expected = np.stack([reference(torch.from_numpy(row[None]).long()).logits[0].numpy() for row in TOKENS])
    np.testing.assert_array_equal(load_logits(folder, TOKENS), expected)


def test_tflite_holds_the_groups_of_each_matrix(make_model: MakeModel, tmp_path: Path) -> None:
    """Settings keep TFLite to groups of 32; the file itself takes any mixture."""
    _, spec, weights = quantized(make_model("llama", **WIDTHS), tmp_path, replace(GRID, positive_scales=True))
    write_tflite(tmp_path / "model.tflite", spec, weights, profile="current", lora=None, prefill_tokens=8)
    require_same_weights("tflite", weights, read_tflite_weights(tmp_path / "model.tflite"))


def test_the_plan_counts_the_groups_that_fit(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen2", **WIDTHS)
    _, _, weights = quantized(model, tmp_path)
    stored = sum(v.weight_bytes if isinstance(v, QuantizedTensor) else v.nbytes for v in weights.values())
    sizes = ModelSizes(VOCABULARY, 192, 160, 2, 4, 2, 32, tie_word_embeddings=False, biased=True)
    assert least_weights_bytes(sizes, _planned(128)) == stored
    assert sizes.params == sum(parameter.numel() for parameter in model.parameters())
    assert SIZES["num_key_value_heads"] == sizes.num_key_value_heads


@pytest.mark.parametrize(("group", "most"), [(32, 0.282), (128, 0.265)])
def test_the_135m_shape_keeps_its_bytes(group: int, most: float) -> None:
    """576 columns are 4.5 groups of 128: padded to 640 they would take 0.281 of fp16."""
    spec = DecoderSpec(49_152, 576, 1536, 30, 9, 3, 64, 512, 1e-5, (1.0,) * 32, tied_embeddings=True)
    shapes = {"model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    shapes |= {f"{module}.weight": spec.projection_shape(projection) for module, projection in spec.module_names()}
    tensors = {name: SourceTensor(name, Path(), 0, "F32", shape, shape) for name, shape in shapes.items()}
    grids = Checkpoint(Path(), spec, tensors).grids(Grid(4, group, True))
    vectors_bytes = 4 * SMOLLM2.vector_params
    total_bytes = sum(stored_bytes(shapes[name], grid) for name, grid in grids.items()) + vectors_bytes
    assert total_bytes <= most * 2 * SMOLLM2.params and SMOLLM2.params == 134_515_008
    assert total_bytes == least_weights_bytes(SMOLLM2, _planned(group))


def _planned(group: int) -> Any:
    (config,) = load_configs(["submodel=small", "export.containers=[onnx]", f"quantize.group={group}"]).values()
    return config
