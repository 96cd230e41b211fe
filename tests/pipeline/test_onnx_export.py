"""The ONNX files against transformers and PEFT holding the same (dequantized) weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from transformers import Qwen2Config, Qwen2ForCausalLM

from edge_runtime.backends import onnx as backend_module
from edge_runtime.backends.onnx import OnnxBackend
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize
from edge_runtime.formats.lora import Adapter
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_data import Stored, join
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.onnx_reader import read_onnx_weights, weight_bytes
from tests.pipeline.onnx_cases import (
    CASES,
    CONTEXT_TOKENS,
    IDS,
    Case,
    Exported,
    Weights,
    build_model,
    export_case,
    logits_of,
    round_to_nearest,
)

# Largest difference seen over all cases: 5e-6, at logits of standard deviation 1.
FLOAT_BOUND = 1e-5
# PEFT still reads a property that transformers 5 has renamed.
PEFT_WARNINGS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    done: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in done:
            done[name] = export_case(CASES[name], tmp_path_factory.mktemp(name))
        return done[name]

    return export


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_dequantized_model(exported: Callable[[str], Exported], name: str) -> None:
    case = exported(name)
    backend = case.open()
    logits = backend.prefill(list(IDS), backend.allocate(len(IDS)), all_logits=True)
    assert case.logits.std() > 0.5  # otherwise the bound below would say little
    np.testing.assert_allclose(logits, case.logits, atol=FLOAT_BOUND, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_int8_activations_change_logits_by_less_than_3_percent(exported: Callable[[str], Exported], name: str) -> None:
    case = exported(name)
    backend = case.open(accuracy_level=4)
    logits = backend.prefill(list(IDS), backend.allocate(len(IDS)), all_logits=True)
    error = np.sqrt(np.mean((logits - case.logits) ** 2)) / case.logits.std()
    assert 1e-4 < error < 0.03  # the lower bound: level 4 really quantizes activations


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_yarn"])
def test_prefill_in_pieces_and_decode_equal_scoring(
    exported: Callable[[str], Exported], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "PREFILL_CHUNK_TOKENS", 8)
    case = exported(name)
    backend = case.open()
    cache = backend.allocate(CONTEXT_TOKENS)
    np.testing.assert_allclose(backend.prefill(IDS[:20], cache), case.logits[19], atol=FLOAT_BOUND, rtol=0)
    scored = backend.prefill(IDS[20:45], cache, all_logits=True)
    np.testing.assert_allclose(scored, case.logits[20:45], atol=FLOAT_BOUND, rtol=0)
    steps = [backend.decode(int(token), cache) for token in IDS[45:]]
    np.testing.assert_allclose(steps, case.logits[45:], atol=FLOAT_BOUND, rtol=0)
    assert cache.length_tokens == len(IDS)


@pytest.mark.parametrize("tied", [True, False])
def test_float_weights_make_a_reference_file(tmp_path: Path, tied: bool) -> None:
    model = build_model(Case(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": tied}))
    spec, weights = spec_of(model, CONTEXT_TOKENS), float_weights(model)
    write_onnx(tmp_path, spec, weights, lora=None, accuracy_level=4)
    backend = OnnxBackend.open(tmp_path, spec)
    logits = backend.prefill(IDS, backend.allocate(len(IDS)), all_logits=True)
    np.testing.assert_allclose(logits, logits_of(model), atol=FLOAT_BOUND, rtol=0)
    assert weight_bytes(tmp_path / "model.onnx") == sum(weight.nbytes for weight in weights.values())
    assert ("lm_head.weight" in weights) is not tied


@pytest.mark.parametrize("file", ["model.onnx", "model_lora.onnx"])
@pytest.mark.parametrize("name", CASES)
def test_codes_scales_and_floats_read_back_bit_for_bit(
    exported: Callable[[str], Exported], name: str, file: str
) -> None:
    case = exported(name)
    read = read_onnx_weights(case.directory / "0" / file)
    assert sorted(read) == sorted(case.weights)
    for key, weight in case.weights.items():
        if isinstance(weight, QuantizedTensor):
            assert (read[key].bits, read[key].columns) == (weight.bits, weight.columns)
            np.testing.assert_array_equal(read[key].codes, weight.codes)
            np.testing.assert_array_equal(read[key].scales.view(np.uint16), weight.scales.view(np.uint16))
        else:
            np.testing.assert_array_equal(read[key], weight)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_codes_scales_and_norms_stored_once(exported: Callable[[str], Exported], name: str) -> None:
    case = exported(name)
    expected = sum(
        weight.weight_bytes if isinstance(weight, QuantizedTensor) else weight.nbytes
        for weight in case.weights.values()
    )
    for file in ("model.onnx", "model_lora.onnx"):
        assert weight_bytes(case.directory / "0" / file) == expected
    padding = (case.directory / "0" / "weights.bin").stat().st_size - expected
    assert 0 <= padding < 64 * 2 * len(case.weights)


@pytest.mark.parametrize("name", ["llama", "llama_biased_8_bit", "qwen2_group_16"])
def test_onnxruntime_dequantizes_every_matrix_to_the_same_numbers(
    exported: Callable[[str], Exported], name: str
) -> None:
    case = exported(name)
    model = onnx.load(case.directory / "0" / "model_lora.onnx")  # reads the data file by itself
    seen = 0
    for node in model.graph.node:
        weight = case.weights.get(node.input[1].removesuffix(".blocks")) if node.op_type == "MatMulNBits" else None
        if isinstance(weight, QuantizedTensor):
            np.testing.assert_array_equal(_times_identity(model, node), dequantize(weight).T)
            seen += 1
    assert seen == 2 * 5 + 1  # gate and up are one matrix


@pytest.mark.parametrize("name", ["llama_tied_hidden_172", "qwen3"])
def test_files_pass_the_checker_with_every_operator_known_or_contributed(
    exported: Callable[[str], Exported], name: str
) -> None:
    case = exported(name)
    for file in ("model.onnx", "model_lora.onnx"):
        path = case.directory / "0" / file
        onnx.checker.check_model(str(path))
        assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {"", "com.microsoft"}


def test_loading_folds_scales_and_rotary_tables(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    case = exported("llama_yarn")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(case.directory / "4" / "model.onnx", options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "folded.onnx", load_external_data=False).graph.node}
    assert not left & {"Cast", "Range", "Cos", "Sin", "Transpose", "Reshape"}
    assert {"MatMulNBits", "GroupQueryAttention", "QuickGelu"} <= left


@PEFT_WARNINGS
def test_adapters_equal_peft_and_the_base_returns_bit_for_bit(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    case = exported("qwen2_group_16")
    backend = case.open()
    base = _score(backend)
    first, first_logits = _peft(case, rank=4, alpha=8, targets=["q_proj", "v_proj", "down_proj"])
    second, second_logits = _peft(case, rank=8, alpha=4, targets=["v_proj"])
    assert np.abs(first_logits - case.logits).max() > 0.1  # the adapters matter
    for adapter, expected in ((first, first_logits), (second, second_logits), (first, first_logits)):
        backend.set_adapter(adapter)
        np.testing.assert_allclose(_score(backend), expected, atol=2 * FLOAT_BOUND, rtol=0)
    backend.set_adapter(None)
    np.testing.assert_array_equal(_score(backend), base)


@PEFT_WARNINGS
def test_a_padded_intermediate_is_exact_and_its_adapter_is_padded_too(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    case = exported("llama")
    slots = LoraSlots(("gate_proj", "down_proj"), rank=4)
    write_onnx(tmp_path, case.spec, _pad_intermediate(case.weights, 192), lora=slots, accuracy_level=0)
    backend = OnnxBackend.open(tmp_path, case.spec)
    np.testing.assert_allclose(_score(backend), case.logits, atol=FLOAT_BOUND, rtol=0)
    adapter, expected = _peft(case, rank=4, alpha=8, targets=["gate_proj", "down_proj"])
    backend.set_adapter(adapter)
    np.testing.assert_allclose(_score(backend), expected, atol=2 * FLOAT_BOUND, rtol=0)


def test_projections_of_different_kinds_run_one_by_one(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    case = exported("llama")
    weights = dict(case.weights)
    prefix = "model.layers.0"
    weights[f"{prefix}.self_attn.k_proj.weight"] = dequantize(weights[f"{prefix}.self_attn.k_proj.weight"])
    up = weights[f"{prefix}.mlp.up_proj.weight"]
    wide = QuantizedTensor.of_codes(up.codes, up.scales, 8, up.columns)  # the same codes in whole bytes
    weights[f"{prefix}.mlp.up_proj.weight"] = wide
    write_onnx(tmp_path, case.spec, weights, lora=None, accuracy_level=0)
    np.testing.assert_allclose(_score(OnnxBackend.open(tmp_path, case.spec)), case.logits, atol=FLOAT_BOUND, rtol=0)
    read = read_onnx_weights(tmp_path / "model.onnx")
    assert read[f"{prefix}.mlp.up_proj.weight"].bits == 8
    np.testing.assert_array_equal(read[f"{prefix}.mlp.up_proj.weight"].codes, up.codes)


def test_only_neighbours_in_the_file_are_joined() -> None:
    dtype = np.dtype(np.float32)
    first, second = Stored(dtype, (2, 4), 64), Stored(dtype, (3, 4), 96)
    assert join([first, second]) == Stored(dtype, (5, 4), 64)
    assert join([first, replace(second, offset_bytes=128)]) is None
    assert join([first, replace(second, shape=(3, 5))]) is None


def test_weights_are_read_one_group_at_a_time(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    case = exported("llama")
    lazy = LazyWeights(case.weights)
    write_onnx(tmp_path, case.spec, lazy, lora=None, accuracy_level=0)
    assert lazy.most_alive <= 3  # query, key and value
    assert (tmp_path / "weights.bin").read_bytes() == (case.directory / "0" / "weights.bin").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec, weights: weights.pop("model.layers.1.self_attn.k_proj.weight"), "missing"),
        (lambda spec, weights: weights.update({"model.layers.2.x.weight": np.zeros(3, np.float32)}), "no place"),
        (lambda spec, weights: weights.update({"model.norm.weight": np.zeros(81, np.float32)}), r"\(81,\).*\(80,\)"),
        (lambda spec, weights: weights.update(_requantized(weights, group=24)), "group 24"),
        (lambda spec, weights: weights.update(_requantized(weights, bits=3)), "3 bits"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    exported: Callable[[str], Exported], tmp_path: Path, change: Callable[..., object], message: str
) -> None:
    case = exported("llama")
    weights = dict(case.weights)
    change(case.spec, weights)
    with pytest.raises(ExportError, match=message):
        write_onnx(tmp_path, case.spec, weights, lora=None, accuracy_level=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": LoraSlots(("q_proj", "qkv"), 8)}, "qkv"),
        ({"lora": LoraSlots(("q_proj",), 0)}, "rank 0"),
        ({"accuracy_level": 2}, "accuracy_level 2"),
        ({"head_dim": 24}, "head_dim 24"),
        ({"num_kv_heads": 3}, "5 heads"),
    ],
)
def test_options_without_a_counterpart_are_refused(
    exported: Callable[[str], Exported], tmp_path: Path, options: dict[str, object], message: str
) -> None:
    case = exported("llama")
    chosen = {"lora": None, "accuracy_level": 0} | {k: v for k, v in options.items() if k in ("lora", "accuracy_level")}
    spec = replace(case.spec, **{k: v for k, v in options.items() if k not in chosen})
    with pytest.raises(ExportError, match=message):
        write_onnx(tmp_path, spec, case.weights, **chosen)


class LazyWeights(Mapping[str, "QuantizedTensor | NDArray[np.float32]"]):
    """Copies on every access; counts how many matrices are alive at once."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._given: list[weakref.ref[NDArray[np.uint8]]] = []
        self.most_alive = 0

    def __getitem__(self, name: str) -> QuantizedTensor | NDArray[np.float32]:
        weight = self._weights[name]
        if not isinstance(weight, QuantizedTensor):
            return weight
        copy = replace(weight, packed=weight.packed.copy())
        self._given.append(weakref.ref(copy.packed))
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self._given))
        return copy

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _requantized(weights: Weights, *, bits: int = 4, group: int = 32) -> Weights:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = weights[name]
    assert isinstance(weight, QuantizedTensor)
    return {name: round_to_nearest(dequantize(weight), bits, group)}


def _score(backend: OnnxBackend) -> NDArray[np.float32]:
    return backend.prefill(IDS, backend.allocate(len(IDS)), all_logits=True)


def _peft(case: Exported, *, rank: int, alpha: int, targets: list[str]) -> tuple[Adapter, NDArray[np.float32]]:
    """A random adapter, and the logits of PEFT's model with it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(case.model, config)
    pairs: dict[str, list[NDArray[np.float32]]] = {}
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if ".lora_" in name:
                parameter.normal_(std=0.1)
                module = name.removeprefix("base_model.model.").partition(".lora_")[0]
                pairs.setdefault(module, []).append(parameter.numpy().copy())
        logits = wrapped(torch.tensor(IDS)[None], use_cache=False).logits[0].numpy()
    wrapped.unload()
    return Adapter(rank, alpha / rank, {module: (a, b) for module, (a, b) in pairs.items()}, None), logits


def _pad_intermediate(weights: Weights, size: int) -> Weights:
    padded = dict(weights)
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedTensor) or ".mlp." not in name:
            continue
        more = size - (weight.codes.shape[0] if "down_proj" not in name else size)
        rows = ((0, more), (0, 0))
        columns = size if "down_proj" in name else weight.columns
        padded[name] = QuantizedTensor.of_codes(
            np.pad(weight.codes, rows), np.pad(weight.scales, rows), weight.bits, columns
        )
    return padded


def _times_identity(model: ModelProto, node: onnx.NodeProto) -> NDArray[np.float32]:
    """What ONNX Runtime multiplies by, one column at a time: the node run on an identity matrix."""
    columns = next(attribute.i for attribute in node.attribute if attribute.name == "K")
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.input[0], alone.output[0] = "x", "y"
    del alone.input[3:]  # a bias
    scales = node.input[2].removesuffix(".f32")
    cast = helper.make_node("Cast", [scales], [node.input[2]], to=TensorProto.FLOAT)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in (node.input[1], scales)]
    graph = helper.make_graph(
        [cast, alone],
        "matrix",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(single.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]
