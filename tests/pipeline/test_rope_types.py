"""Scaled rotary embeddings: what the exporters bake in against transformers' own, out to 32,768 positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from edge_runtime.backends import tflite
from edge_runtime.backends.onnx import OnnxBackend
from edge_runtime.formats.decoder import DecoderSpec
from pipeline.distillation.context import Yarn, extend_context, rotary_tables
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.export.onnx_graph import write_onnx
from tests.pipeline.onnx_cases import SIZES, Case, build_model, logits_of

CONTEXT_TOKENS = 32_768
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
ROPES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "linear": PLAIN | {"rope_type": "linear", "factor": 8.0},
    "llama3": PLAIN | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4_096,
    },
    "yarn": PLAIN | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4_096},
    "yarn_own_factor": PLAIN | {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4_096, "attention_factor": 1.0,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
    "yarn_mscale": PLAIN | {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4_096, "mscale": 0.7,
        "mscale_all_dim": 0.3, "truncate": False,
    },
}  # fmt: skip
# Angles go up to 32,767, where float32 knows them to 2e-3: the product is the same in all, sine and cosine are not.
TABLE_BOUND = 3e-7


def build(rope: str, **options: object) -> Any:
    sizes = {"max_position_embeddings": CONTEXT_TOKENS, "rope_parameters": ROPES[rope], **options}
    return build_model(Case(LlamaConfig, LlamaForCausalLM, sizes))


def own_tables(model: Any, spec: DecoderSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """transformers' cosines and sines (context, D / 2)."""
    half = spec.head_dim // 2
    cosines, sines = (table[:, :half].numpy() for table in rotary_tables(model, spec.context_tokens))
    return cosines, sines


@pytest.mark.parametrize("rope", ROPES)
def test_onnx_tables_are_those_of_transformers(rope: str, tmp_path: Path) -> None:
    model = build(rope)
    spec = spec_of(model, CONTEXT_TOKENS)
    write_onnx(tmp_path, spec, float_weights(model), lora=None, accuracy_level=0)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    nodes = [node for node in graph.graph.node if any("rotary." in name for name in node.output)]
    used = {name for node in nodes for name in node.input}
    outputs = [onnx.helper.make_tensor_value_info(f"rotary.{kind}", 1, None) for kind in ("Cos", "Sin")]
    constants = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    tables = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "tables", [], outputs, constants),
        opset_imports=graph.opset_import, ir_version=graph.ir_version,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tables.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, expected in zip(session.run(None, {}), own_tables(model, spec), strict=True):
        np.testing.assert_allclose(found, expected, atol=TABLE_BOUND, rtol=0)


@pytest.mark.parametrize("rope", ROPES)
def test_tflite_tables_are_those_of_transformers(rope: str) -> None:
    model = build(rope)
    spec = DecoderSpec.from_dict(spec_of(model, CONTEXT_TOKENS).to_dict())  # as it comes out of a manifest
    cosines, sines = tflite._rotary_tables(spec)
    expected_cosines, expected_sines = own_tables(model, spec)
    half = spec.head_dim // 2
    for found, expected in (
        (cosines[:, :half], expected_cosines), (cosines[:, half:], expected_cosines),
        (sines[:, half:], expected_sines), (-sines[:, :half], expected_sines),
    ):  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=TABLE_BOUND, rtol=0)


@pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "plain"])
def test_scaling_is_not_lost_on_the_way(rope: str) -> None:
    scaled, plain = spec_of(build(rope), CONTEXT_TOKENS), spec_of(build("plain"), CONTEXT_TOKENS)
    assert scaled.inv_freq != plain.inv_freq
    assert (scaled.rope_attention_factor == 1.0) == (rope in ("linear", "llama3", "yarn_own_factor"))


@pytest.mark.parametrize(
    ("config", "model"),
    [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_a_stretched_student_gives_the_same_logits_in_onnx(config: type, model: type, tmp_path: Path) -> None:
    student = build_model(Case(config, model, {"max_position_embeddings": 16}))
    short = logits_of(student)
    extend_context(student, Yarn(factor=8.0, original_tokens=16))
    student.save_pretrained(tmp_path / "student")
    loaded = model.from_pretrained(tmp_path / "student").eval()
    spec = spec_of(loaded, 128)
    write_onnx(tmp_path, spec, float_weights(loaded), lora=None, accuracy_level=0)
    backend = OnnxBackend.open(tmp_path, spec)
    ids = np.random.default_rng(5).integers(0, SIZES["vocab_size"], 120)
    with torch.no_grad():
        expected = student(torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
    logits = backend.prefill(ids.tolist(), backend.allocate(128), all_logits=True)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    assert np.abs(logits_of(student) - short).max() > 0.1


def test_frequencies_that_depend_on_the_length_are_still_refused() -> None:
    from edge_runtime.formats.errors import ExportError

    model = build_model(
        Case(LlamaConfig, LlamaForCausalLM, {"rope_parameters": PLAIN | {"rope_type": "dynamic", "factor": 2.0}})
    )
    with pytest.raises(ExportError, match="rope_type dynamic"):
        spec_of(model, 128)
