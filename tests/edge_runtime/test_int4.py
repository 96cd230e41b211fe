"""Codes on disk: every bit comes back, and a file that is not ours is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.numpy import save_file

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import PackageError
from edge_runtime.formats.int4 import (
    CODE_RANGE,
    QuantizedTensor,
    dequantize,
    load_weights,
    pack_nibbles,
    save_weights,
    unpack_nibbles,
)

SPEC = DecoderSpec(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
    context_tokens=128, rms_norm_eps=1e-6, inv_freq=(1.0, 0.5, 0.25, 0.1, 0.05, 0.01, 0.005, 0.001),
    tied_embeddings=True,
)  # fmt: skip
RANDOM = np.random.default_rng(0)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 20).map(lambda half: 2 * half))


def _tensor(rows: int, columns: int, group: int, bits: int) -> QuantizedTensor:
    padded, (low, high) = -(-columns // group) * group, CODE_RANGE[bits]
    codes = RANDOM.integers(low, high + 1, (rows, padded)).astype(np.int8)
    codes[:, columns:] = 0
    scales = RANDOM.normal(0, 0.1, (rows, padded // group)).astype(np.float16)
    return QuantizedTensor.of_codes(codes, scales, bits, columns)


WEIGHTS: dict[str, Any] = {
    "four": _tensor(6, 172, 32, 4),
    "eight": _tensor(5, 64, 64, 8),
    "whole": _tensor(3, 40, 40, 8),
    "norm": RANDOM.normal(size=64).astype(np.float32),
}


@given(arrays.arrays(np.int8, SHAPES, elements=st.integers(-8, 7)))
def test_nibbles_come_back(codes: np.ndarray[Any, np.dtype[np.int8]]) -> None:
    packed = pack_nibbles(codes)
    assert packed.shape == (codes.shape[0], codes.shape[1] // 2) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


@given(arrays.arrays(np.uint8, SHAPES))
def test_every_byte_is_two_codes(packed: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    codes = unpack_nibbles(packed)
    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
    np.testing.assert_array_equal(pack_nibbles(codes), packed)


def test_the_first_code_is_the_low_nibble_offset_by_eight() -> None:
    packed = pack_nibbles(np.array([[-8, 7, 0, -1]], np.int8))
    assert packed.tolist() == [[0xF0, 0x78]]


def test_a_weight_is_code_times_its_groups_scale() -> None:
    tensor = WEIGHTS["four"]
    expected = [
        [float(np.float32(tensor.codes[n, k]) * np.float32(tensor.scales[n, k // 32])) for k in range(172)]
        for n in range(6)
    ]
    assert dequantize(tensor).dtype == np.float32
    np.testing.assert_array_equal(dequantize(tensor), np.array(expected, np.float32))


@pytest.mark.parametrize(("name", "count"), [("four", 6 * 192 // 2 + 6 * 6 * 2), ("eight", 5 * 64 + 5 * 2)])
def test_bytes_are_those_of_the_arrays(name: str, count: int) -> None:
    assert WEIGHTS[name].weight_bytes == count


def test_a_saved_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, SPEC, WEIGHTS)
    spec, weights = load_weights(path)
    assert spec == SPEC and set(weights) == set(WEIGHTS)
    for name, expected in WEIGHTS.items():
        found: Any = weights[name]
        if not isinstance(expected, QuantizedTensor):
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
            continue
        assert (found.bits, found.columns, found.group) == (expected.bits, expected.columns, expected.group)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales.view(np.uint16), expected.scales.view(np.uint16))


def test_four_bits_take_half_a_byte_on_disk(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights.safetensors", SPEC, WEIGHTS)
    with safe_open(tmp_path / "weights.safetensors", framework="numpy") as file:
        assert file.get_tensor("four.codes").shape == (6, 96) and file.get_tensor("eight.codes").shape == (5, 64)
        assert file.get_tensor("four.scales").dtype == np.float16


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    """Eight times, because an order that is left to chance is often right."""
    for number in range(8):
        save_weights(tmp_path / str(number), SPEC, dict(reversed(WEIGHTS.items())) if number % 2 else WEIGHTS)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "whole", SPEC, WEIGHTS)
    content, path = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for length in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(PackageError, match=r"cut: "):
            load_weights(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(PackageError):
        load_weights(path)


GOOD: dict[str, Any] = {"decoder": SPEC.to_dict(), "layout": {"w": {"bits": 4, "columns": 32}}}


def _metadata(header: object) -> dict[str, str]:
    return {"sevenfold": json.dumps(header)}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"sevenfold": "not json"},
        _metadata([]),
        _metadata({"layout": GOOD["layout"]}),
        _metadata({"decoder": GOOD["decoder"]}),
        _metadata(GOOD | {"decoder": {}}),
        _metadata(GOOD | {"decoder": []}),
        _metadata(GOOD | {"decoder": 5}),
        _metadata(GOOD | {"layout": []}),
        _metadata(GOOD | {"layout": {"absent": {"bits": 4, "columns": 32}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 4}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 4, "columns": 32, "more": 1}}}),
        _metadata(GOOD | {"layout": {"w": 5}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 3, "columns": 32}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": [4], "columns": 32}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 4, "columns": 33}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 4, "columns": 0}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 4, "columns": "32"}}}),
        _metadata(GOOD | {"layout": {"w": {"bits": 8, "columns": 16}}}),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "foreign.safetensors"
    tensors = {"w.codes": np.zeros((4, 16), np.uint8), "w.scales": np.ones((4, 1), np.float16)}
    save_file(tensors, path, metadata=_metadata(GOOD))
    load_weights(path)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(PackageError, match=r"foreign\.safetensors: "):
        load_weights(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"w.codes": np.zeros((4, 16), np.uint8), "w.scales": np.ones((4, 3), np.float16)},
        {"w.codes": np.zeros((4, 16), np.uint8), "w.scales": np.ones((3, 1), np.float16)},
        {"w.codes": np.zeros((4, 16), np.uint8), "w.scales": np.ones((4, 0), np.float16)},
        {"w.codes": np.zeros((4, 16), np.uint8), "w.scales": np.ones((4, 1), np.float32)},
        {"w.codes": np.zeros((4, 16), np.int16), "w.scales": np.ones((4, 1), np.float16)},
        {"w.codes": np.zeros(64, np.uint8), "w.scales": np.ones((4, 1), np.float16)},
        {"w.codes": np.zeros((4, 16), np.uint8)},
    ],
)
def test_codes_and_scales_that_do_not_fit_each_other_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata=_metadata(GOOD))
    with pytest.raises(PackageError, match=r"odd\.safetensors: "):
        load_weights(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="nothing"):
        load_weights(tmp_path / "nothing")
