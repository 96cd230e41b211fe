"""What a TFLite file holds, read back by our reader and by LiteRT, and what is refused before it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.export import tflite_flatbuffer
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.tflite_graph import write_tflite
from pipeline.export.tflite_reader import read_tflite_weights, weight_bytes

Floats = NDArray[np.float32]
Weights = dict[str, QuantizedTensor | Floats]

GROUP = 32
TIED = DecoderSpec(
    vocab_size=511,
    hidden_size=160,
    intermediate_size=172,  # padded to 192 by the quantizer
    num_layers=2,
    num_heads=5,
    num_kv_heads=1,
    head_dim=32,
    context_tokens=160,
    rms_norm_eps=1e-5,
    inv_freq=tuple(float(10_000.0 ** (-i / 16)) for i in range(16)),
    tied_embeddings=True,
)
TABLES_BYTES = 60_000  # tensors, operators and names of two signatures of two layers, with room to grow
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(params=["tied", "untied"])
def spec(request: pytest.FixtureRequest) -> DecoderSpec:
    return replace(TIED, tied_embeddings=request.param == "tied")


@pytest.mark.parametrize("quantizer", ["int4", "int8"])
def test_reader_returns_every_code_and_scale(spec: DecoderSpec, quantizer: str, tmp_path: Path) -> None:
    weights = _weights(spec, _int4 if quantizer == "int4" else _int8)
    _export(tmp_path, spec, weights, profile="current" if quantizer == "int4" else "legacy")

    read = read_tflite_weights(tmp_path / "model.tflite")

    assert set(read) == set(weights)
    for name, value in weights.items():
        found = read[name]
        if isinstance(value, QuantizedTensor):
            assert isinstance(found, QuantizedTensor)
            assert (found.bits, found.columns) == (value.bits, value.columns), name
            np.testing.assert_array_equal(found.codes, value.codes, err_msg=name)
            np.testing.assert_array_equal(found.scales.view(np.uint16), value.scales.view(np.uint16), err_msg=name)
        else:
            np.testing.assert_array_equal(found, value, err_msg=name)


def test_litert_reads_the_same_codes_and_scales(tmp_path: Path) -> None:
    weights = _weights(TIED, _int4)
    _export(tmp_path, TIED, weights)
    interpreter = Interpreter(model_path=str(tmp_path / "model.tflite"))
    details = {detail["name"]: detail for detail in interpreter.get_tensor_details()}

    for name, value in weights.items():
        if isinstance(value, QuantizedTensor):
            quantization = details[name]["quantization_parameters"]
            np.testing.assert_array_equal(interpreter.get_tensor(details[name]["index"]), value.codes, err_msg=name)
            np.testing.assert_array_equal(quantization["scales"], value.scales.reshape(-1), err_msg=name)
            assert quantization["block_size"] == GROUP


def test_weight_bytes_counts_codes_scales_and_norms_once(tmp_path: Path) -> None:
    weights = _weights(TIED, _int4)
    _export(tmp_path, TIED, weights)

    expected = sum(
        value.weight_bytes if isinstance(value, QuantizedTensor) else value.nbytes for value in weights.values()
    )
    assert weight_bytes(tmp_path / "model.tflite") == expected
    # Both signatures and both ends of the model share one copy; the rest is tables.
    assert (tmp_path / "model.tflite").stat().st_size < expected + TABLES_BYTES


def test_weight_bytes_counts_the_scale_of_an_int8_tensor(tmp_path: Path) -> None:
    weights = _weights(TIED, _int8)
    _export(tmp_path, TIED, weights, profile="legacy")

    sizes = [v.codes.nbytes + 4 if isinstance(v, QuantizedTensor) else v.nbytes for v in weights.values()]
    assert weight_bytes(tmp_path / "model.tflite") == sum(sizes)


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    weights = _weights(TIED, _int4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _export(tmp_path / name, TIED, weights)

    assert (tmp_path / "a/model.tflite").read_bytes() == (tmp_path / "b/model.tflite").read_bytes()


def test_constant_data_is_aligned_to_16_bytes(tmp_path: Path) -> None:
    weights = _weights(TIED, _int4)
    _export(tmp_path, TIED, weights)
    content = (tmp_path / "model.tflite").read_bytes()

    value = weights["model.layers.1.post_attention_layernorm.weight"]
    assert isinstance(value, np.ndarray)
    scales = weights[DOWN_PROJ]
    assert isinstance(scales, QuantizedTensor)
    assert content.find(scales.scales.tobytes()) % 16 == 0
    assert content.find(value.tobytes()) % 16 == 0


@pytest.mark.parametrize("scale", [0.0, -0.01, np.nan, np.inf])
def test_scale_that_is_not_positive_and_finite_is_refused(scale: float, tmp_path: Path) -> None:
    weights = _weights(TIED, _int4)
    value = weights[Q_PROJ]
    assert isinstance(value, QuantizedTensor)
    value.scales[3, 1] = scale

    with pytest.raises(ExportError, match=f"{Q_PROJ}: smallest scale .* positive finite"):
        _export(tmp_path, TIED, weights)
    assert not list(tmp_path.iterdir())


def test_hidden_size_that_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    spec = replace(TIED, hidden_size=80)

    with pytest.raises(ExportError, match="hidden size 80 is not divisible by the group 32"):
        _export(tmp_path, spec, _weights(spec, _int4))


def test_attention_width_that_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    spec = replace(TIED, head_dim=24, inv_freq=TIED.inv_freq[:12])

    with pytest.raises(ExportError, match=r"o_proj.*heads \* head_dim 120 is not divisible by the group 32"):
        _export(tmp_path, spec, _weights(spec, _int4))


@pytest.mark.parametrize(
    ("profile", "quantizer", "message"),
    [
        ("current", "int8", "8-bit codes, but the current profile"),
        ("legacy", "int4", "4-bit codes with .* but the legacy profile"),
        ("old", "int4", "profile 'old'"),
    ],
)
def test_codes_of_another_profile_are_refused(profile: str, quantizer: str, message: str, tmp_path: Path) -> None:
    weights = _weights(TIED, _int4 if quantizer == "int4" else _int8)
    with pytest.raises(ExportError, match=message):
        _export(tmp_path, TIED, weights, profile=profile)


def test_group_that_litert_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="group 16, but LiteRT runs groups"):
        _export(tmp_path, TIED, _weights(TIED, lambda weight: _int4(weight, group=16)))


def test_unknown_adapter_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="adapter targets \\['qkv_proj'\\]"):
        _export(tmp_path, TIED, _weights(TIED, _int4), lora=LoraSlots(("qkv_proj",), 8))


@pytest.mark.parametrize("missing", [Q_PROJ, "model.norm.weight"])
def test_missing_weight_is_refused(missing: str, tmp_path: Path) -> None:
    weights = _weights(TIED, _int4)
    del weights[missing]
    with pytest.raises(ExportError, match=f"{missing}: missing"):
        _export(tmp_path, TIED, weights)


@pytest.mark.parametrize("extra", ["lm_head.weight", "model.layers.7.self_attn.q_proj.bias"])
def test_weight_without_a_place_is_refused(extra: str, tmp_path: Path) -> None:
    weights = _weights(TIED, _int4) | {extra: np.zeros((511, 160), np.float32)}
    with pytest.raises(ExportError, match=f"{extra}: the decoder has no place"):
        _export(tmp_path, TIED, weights)


def test_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights = _weights(TIED, _unchanged)
    weights[Q_PROJ] = np.zeros((160, 128), np.float32)
    with pytest.raises(ExportError, match="shape \\(160, 128\\), but the decoder's sizes say \\(160, 160\\)"):
        _export(tmp_path, TIED, weights)


def test_file_beyond_what_a_flatbuffer_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite_flatbuffer, "MAX_FILE_BYTES", 100_000)
    with pytest.raises(ExportError, match="bytes of weights, but a TFLite file holds at most 100000"):
        _export(tmp_path, TIED, _weights(TIED, _int4))


@pytest.mark.parametrize("kept", [0, 6, 200, 0.5, 0.99])
def test_reader_refuses_a_cut_file(kept: float, tmp_path: Path) -> None:
    _export(tmp_path, TIED, _weights(TIED, _int4))
    content = (tmp_path / "model.tflite").read_bytes()
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])

    with pytest.raises(ExportError, match=r"cut\.tflite"):
        read_tflite_weights(cut)


def _weights(spec: DecoderSpec, quantizer: Callable[[Floats], QuantizedTensor | Floats]) -> Weights:
    """Random weights with biases and query/key norms."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> QuantizedTensor | Floats:
        return quantizer(random.normal(0, 0.05, shape).astype(np.float32))

    def vector(size: int) -> Floats:
        return random.uniform(0.7, 1.3, size).astype(np.float32)

    hidden = spec.hidden_size
    weights: Weights = {
        "model.embed_tokens.weight": matrix(spec.vocab_size, hidden),
        "model.norm.weight": vector(hidden),
    }
    if not spec.tied_embeddings:
        weights["lm_head.weight"] = matrix(spec.vocab_size, hidden)
    for module, projection in spec.module_names():
        weights[f"{module}.weight"] = matrix(*spec.projection_shape(projection))
        weights[f"{module}.bias"] = vector(spec.projection_shape(projection)[0])
    for layer in range(spec.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = vector(hidden)
        for norm in ("q_norm", "k_norm"):
            weights[f"model.layers.{layer}.self_attn.{norm}.weight"] = vector(spec.head_dim)
    return weights


def _export(
    folder: Path, spec: DecoderSpec, weights: Weights, *, profile: str = "current", lora: LoraSlots | None = None
) -> None:
    path = folder / "model.tflite"
    write_tflite(path, spec, weights, profile=profile, lora=lora, prefill_tokens=8)  # type: ignore[arg-type]


def _unchanged(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return weight


def _int4(weight: NDArray[np.float32], group: int = GROUP) -> QuantizedTensor:
    """Round to nearest with positive scales; columns padded to whole groups."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    scales = np.maximum(np.abs(padded).max(axis=2) / 7, 1e-4).astype(np.float16)
    codes = np.clip(np.rint(padded / scales.astype(np.float32)[..., None]), -8, 7).astype(np.int8)
    return QuantizedTensor.of_codes(codes.reshape(rows, -1), scales, bits=4, columns=columns)


def _int8(weight: NDArray[np.float32]) -> QuantizedTensor:
    """Round to nearest with one scale for the whole tensor."""
    scale = np.float16(np.abs(weight).max() / 127)
    codes = np.clip(np.rint(weight / np.float32(scale)), -127, 127).astype(np.int8)
    return QuantizedTensor.of_codes(codes, np.full((1, 1), scale, np.float16), bits=8, columns=weight.shape[1])
