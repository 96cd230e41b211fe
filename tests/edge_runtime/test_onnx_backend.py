"""The ONNX backend's contract: caches, adapters, and what it refuses."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge_runtime.backends.base import Backend
from edge_runtime.backends.onnx import OnnxBackend, OnnxCache
from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import AdapterError, BackendError, UserError
from edge_runtime.formats.int4 import QuantizedTensor
from edge_runtime.formats.lora import Adapter
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx

SPEC = DecoderSpec(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_tokens=64,
    rms_norm_eps=1e-5,
    inv_freq=tuple(float(10000 ** (-index / 8)) for index in range(8)),
    tied_embeddings=True,
)
RANDOM = np.random.default_rng(3)
TEXT = [int(token) for token in RANDOM.integers(0, SPEC.vocab_size, 40)]
Weights = dict[str, QuantizedTensor | NDArray[np.float32]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("package"), _weights())


@pytest.fixture
def backend(directory: Path) -> OnnxBackend:
    return OnnxBackend.open(directory, SPEC)


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    """Files that a test may damage."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_it_is_a_backend(backend: OnnxBackend) -> None:
    seam: Backend = backend
    assert (seam.name, seam.spec) == ("onnx", SPEC)


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(backend: OnnxBackend) -> None:
    fresh, used = backend.allocate(64), backend.allocate(64)
    backend.prefill(TEXT[:10], fresh)
    expected = backend.decode(7, fresh)
    backend.prefill(TEXT[:10], used)
    backend.prefill(TEXT[20:40], used)
    used.truncate(10)
    assert (used.length_tokens, used.capacity_tokens) == (10, 64)
    np.testing.assert_array_equal(backend.decode(7, used), expected)


@pytest.mark.parametrize("length_tokens", [-1, 11])
def test_truncating_to_what_is_not_there_is_refused(backend: OnnxBackend, length_tokens: int) -> None:
    cache = backend.allocate(16)
    backend.prefill(TEXT[:10], cache)
    with pytest.raises(UserError, match="0 to 10"):
        cache.truncate(length_tokens)


def test_two_sequences_do_not_touch_each_other(backend: OnnxBackend) -> None:
    alone, first, second = backend.allocate(32), backend.allocate(32), backend.allocate(20)
    backend.prefill(TEXT[:8], alone)
    expected = [backend.decode(token, alone) for token in TEXT[8:12]]
    backend.prefill(TEXT[:8], first)
    backend.prefill(TEXT[30:36], second)
    for token, logits in zip(TEXT[8:12], expected, strict=True):
        backend.decode(5, second)
        np.testing.assert_array_equal(backend.decode(token, first), logits)


def test_returned_logits_stay_as_they_are(backend: OnnxBackend) -> None:
    cache = backend.allocate(16)
    first = backend.prefill(TEXT[:4], cache)
    second = backend.decode(1, cache)
    before = first.copy(), second.copy()
    backend.decode(2, cache)
    np.testing.assert_array_equal((first, second), before)


@pytest.mark.parametrize("token", [-1, 300])
def test_tokens_outside_of_the_vocabulary_are_refused_and_not_stored(backend: OnnxBackend, token: int) -> None:
    cache = backend.allocate(16)
    for call in (lambda: backend.prefill([1, token, 2], cache), lambda: backend.decode(token, cache)):
        with pytest.raises(UserError, match="0 to 299"):
            call()
    assert cache.length_tokens == 0


def test_more_tokens_than_fit_are_refused_and_the_cache_stays_usable(backend: OnnxBackend) -> None:
    cache = backend.allocate(8)
    with pytest.raises(UserError, match="at most 8 more"):
        backend.prefill(TEXT[:9], cache)
    backend.prefill(TEXT[:8], cache)
    with pytest.raises(UserError, match="at most 0 more"):
        backend.decode(1, cache)
    assert cache.length_tokens == 8
    cache.truncate(7)
    assert backend.decode(1, cache).shape == (300,)


def test_an_empty_prompt_is_refused(backend: OnnxBackend) -> None:
    with pytest.raises(UserError, match="at least one token"):
        backend.prefill([], backend.allocate(4))


@pytest.mark.parametrize("capacity_tokens", [0, 65])
def test_a_cache_beyond_the_context_is_refused(backend: OnnxBackend, capacity_tokens: int) -> None:
    with pytest.raises(UserError, match="1 to 64"):
        backend.allocate(capacity_tokens)


def test_a_cache_of_another_backend_is_refused(backend: OnnxBackend) -> None:
    class Foreign:
        length_tokens, capacity_tokens = 0, 8

        def truncate(self, length_tokens: int) -> None: ...

    with pytest.raises(BackendError, match="Foreign"):
        backend.decode(1, Foreign())


def test_a_cache_survives_the_change_to_an_adapter_and_back(backend: OnnxBackend) -> None:
    adapter, without_effect = _adapter(), _adapter(scale=0.0)
    expected = _decode_under(backend, [without_effect, adapter, without_effect])
    got = _decode_under(backend, [None, adapter, None])
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=0)
    assert np.abs(got[1] - _decode_under(backend, [None, None, None])[1]).max() > 0.01


def test_only_one_copy_of_the_weights_is_in_memory(backend: OnnxBackend) -> None:
    cache = backend.allocate(8)
    backend.prefill(TEXT[:4], cache)
    base = weakref.ref(backend._session)
    backend.set_adapter(_adapter())
    assert base() is None


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: _adapter(projection="k_proj"), r"layers\.0\.self_attn\.k_proj.*q_proj, v_proj"),
        (lambda: _adapter(rank=5), "rank 5.*1 to 4"),
        (lambda: _adapter(in_features=65), r"q_proj.*\(2, 65\).*needed \(2, 64\)"),
        (lambda: replace(_adapter(), rank=3), r"needed \(3, 64\)"),
        (lambda: replace(_adapter(), pairs={}), "no module"),
        (lambda: _adapter(fill=np.nan), "not finite"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_change_nothing(
    backend: OnnxBackend, adapter: Callable[[], Adapter], message: str
) -> None:
    before = backend.prefill(TEXT, backend.allocate(64))
    with pytest.raises(AdapterError, match=message):
        backend.set_adapter(adapter())
    np.testing.assert_array_equal(backend.prefill(TEXT, backend.allocate(64)), before)


def test_a_package_without_slots_says_so(tmp_path: Path) -> None:
    backend = OnnxBackend.open(_write(tmp_path, _weights(), lora=None), SPEC)
    with pytest.raises(AdapterError, match="no adapter slots"):
        backend.set_adapter(_adapter())


def test_a_damaged_adapter_file_leaves_the_base_in_use(copy: Path) -> None:
    (copy / "model_lora.onnx").write_bytes((copy / "model_lora.onnx").read_bytes()[:500])
    backend = OnnxBackend.open(copy, SPEC)
    before = backend.prefill(TEXT, backend.allocate(64))
    with pytest.raises(BackendError, match=r"model_lora\.onnx"):
        backend.set_adapter(_adapter())
    np.testing.assert_array_equal(backend.prefill(TEXT, backend.allocate(64)), before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "model.onnx").unlink(),
        lambda path: (path / "model.onnx").write_bytes(b""),
        lambda path: (path / "model.onnx").write_bytes(b"not a graph"),
        lambda path: (path / "model.onnx").write_bytes((path / "model.onnx").read_bytes()[:-400]),
        lambda path: (path / "weights.bin").unlink(),
        lambda path: (path / "weights.bin").write_bytes(b""),
        lambda path: (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-64]),
    ],
)
def test_damaged_files_are_refused_in_one_line(copy: Path, damage: Callable[[Path], object]) -> None:
    damage(copy)
    with pytest.raises(BackendError, match=r"model\.onnx") as refused:
        OnnxBackend.open(copy, SPEC)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("location", ["../weights.bin", "{absolute}"])
def test_weights_outside_of_the_directory_are_refused(copy: Path, tmp_path: Path, location: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(absolute=copy / "weights.bin")
    (inner / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BackendError):
        OnnxBackend.open(inner, SPEC)


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"vocab_size": 299}, {"num_kv_heads": 1}])
def test_files_of_another_decoder_are_refused(directory: Path, change: dict[str, int]) -> None:
    with pytest.raises(BackendError, match="manifest says"):
        OnnxBackend.open(directory, replace(SPEC, **change))


@pytest.mark.parametrize(("fill", "message"), [(0.0, "all zero"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_unusable_logits_never_reach_the_caller(tmp_path: Path, fill: float, message: str) -> None:
    weights = _weights() | {"model.norm.weight": np.full(SPEC.hidden_size, fill, np.float32)}
    backend = OnnxBackend.open(_write(tmp_path, weights), SPEC)
    cache = backend.allocate(8)
    for call in (lambda: backend.prefill([1, 2], cache), lambda: backend.decode(1, cache)):
        with pytest.raises(BackendError, match=message):
            call()


def test_a_missing_runtime_names_the_command_to_type(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        OnnxBackend.open(directory, SPEC)


def test_a_closed_backend_says_so(backend: OnnxBackend) -> None:
    cache = backend.allocate(8)
    backend.prefill([1], cache)
    backend.close()
    for call in (lambda: backend.decode(1, cache), lambda: backend.set_adapter(_adapter())):
        with pytest.raises(BackendError, match="closed"):
            call()


def _decode_under(backend: OnnxBackend, adapters: list[Adapter | None]) -> list[NDArray[np.float32]]:
    """Logits of one step a adapter, over one cache that was filled under the first."""
    cache: OnnxCache = backend.allocate(64)
    backend.set_adapter(adapters[0])
    backend.prefill(TEXT[:20], cache)
    logits = []
    for token, adapter in zip(TEXT[20:], adapters, strict=False):
        backend.set_adapter(adapter)
        logits.append(backend.decode(token, cache))
    backend.set_adapter(None)
    return logits


def _adapter(
    *, projection: str = "q_proj", rank: int = 2, scale: float = 2.0, in_features: int = 64, fill: float | None = None
) -> Adapter:
    random = np.random.default_rng(11)
    out_features = SPEC.projection_shape(projection)[0]
    pairs = {}
    for layer in range(SPEC.num_layers):
        a = random.normal(0, 0.3, (rank, in_features)).astype(np.float32)
        b = random.normal(0, 0.3, (out_features, rank)).astype(np.float32)
        pairs[f"model.layers.{layer}.self_attn.{projection}"] = (a if fill is None else np.full_like(a, fill), b)
    return Adapter(rank, scale, pairs, None)


def _weights() -> Weights:
    random = np.random.default_rng(1)
    weights: Weights = {"model.norm.weight": np.ones(SPEC.hidden_size, np.float32)}
    weights["model.embed_tokens.weight"] = _quantized(random, SPEC.vocab_size, SPEC.hidden_size)
    for module, projection in SPEC.module_names():
        weights[f"{module}.weight"] = _quantized(random, *SPEC.projection_shape(projection))
    for layer in range(SPEC.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = np.ones(SPEC.hidden_size, np.float32)
    return weights


def _quantized(random: np.random.Generator, rows: int, columns: int) -> QuantizedTensor:
    codes = random.integers(-8, 8, (rows, columns), dtype=np.int8)
    scales = (random.uniform(0.5, 1.5, (rows, columns // 32)) / (4.6 * columns**0.5)).astype(np.float16)
    return QuantizedTensor.of_codes(codes, scales, 4, columns)


def _write(path: Path, weights: Weights, lora: LoraSlots | None = LoraSlots(("q_proj", "v_proj"), 4)) -> Path:  # noqa: B008
    write_onnx(path, SPEC, weights, lora=lora, accuracy_level=0)
    return path
