"""Masked arithmetic: nothing wraps, packing is lossless, streams cancel, integer noise is discrete Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.masking import (
    MAX_NOISE_CODES,
    add_stream,
    field_bits,
    field_dtype,
    integer_noise,
    pack_bits,
    packed_bytes,
    quantize_for_mask,
    signed_sum,
    unpack_bits,
)
from edge_runtime.formats.messages import MaskPlan

RNG = np.random.default_rng(5)


def plan(*scales: float, largest_code: int = 127) -> MaskPlan:
    return MaskPlan("0" * 64, 16, scales, largest_code)


def test_codes_are_the_nearest_multiples_of_each_segments_scale() -> None:
    vector = RNG.normal(0, 0.02, 30).astype(np.float32)
    codes, values = quantize_for_mask(vector, (10, 20), plan(0.001, 0.0025))
    scale = np.repeat([0.001, 0.0025], [10, 20])
    assert codes.dtype == np.int32 and values.dtype == np.float32
    assert np.abs(codes - vector / scale).max() <= 0.5 + 1e-5
    assert np.allclose(values, codes * scale, rtol=1e-7, atol=0)


def test_what_is_clipped_is_left_to_the_residual() -> None:
    codes, values = quantize_for_mask(np.array([9.0, -9.0, 0.5], np.float32), (3,), plan(0.01, largest_code=7))
    assert codes.tolist() == [7, -7, 7]
    assert np.allclose(values, [0.07, -0.07, 0.07])


def test_segments_without_a_scale_are_not_sent() -> None:
    codes, values = quantize_for_mask(np.ones(5, np.float32), (2, 3), plan(0.1))
    assert codes.tolist() == [10, 10, 0, 0, 0]
    assert values[2:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("vector", [np.ones(4, np.float32), np.array([1, np.nan, 0], np.float32)])
def test_a_vector_of_another_length_or_not_finite_is_misuse(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match="segments"):
        quantize_for_mask(vector, (3,), plan(0.1))


@pytest.mark.parametrize("devices", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("weight", [1, 7])
@pytest.mark.parametrize("largest", [1, 7, 127, 100_000])
def test_the_field_is_the_smallest_that_holds_the_sum(devices: int, weight: int, largest: int) -> None:
    bits = field_bits(devices, weight, largest)
    limit = devices * weight * largest
    assert limit <= 2 ** (bits - 1) - 1
    assert bits == 8 or limit > 2 ** (bits - 2) - 1
    ends = np.array([-limit, limit], np.int64).astype(field_dtype(bits))
    assert signed_sum(ends, bits).tolist() == [-limit, limit]


def test_the_field_has_room_for_noise_and_an_end() -> None:
    assert field_bits(4, 1, 127) == 10
    assert field_bits(4, 1, 127, noise_codes=1.0) == 11  # 508 + 8 * 2 = 524
    with pytest.raises(ValueError, match="not 32"):
        field_bits(1024, 1024, 2**23)


@pytest.mark.parametrize("bits", range(8, 33))
def test_packing_is_lossless_and_as_small_as_it_can_be(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 100):
        values = RNG.integers(0, 2**bits, count, dtype=np.uint64).astype(np.uint32)
        raw = pack_bits(values, bits)
        assert len(raw) == packed_bytes(count, bits) == -(-count * bits // 8)
        assert np.array_equal(unpack_bits(raw, count, bits), values)
        as_one_integer = sum(int(value) << (bits * place) for place, value in enumerate(values))
        assert int.from_bytes(raw, "little") == as_one_integer


def test_only_the_low_bits_are_packed() -> None:
    high = np.array([0xFFFF_FF01, 0x1234_0002], np.uint32)
    assert unpack_bits(pack_bits(high, 9), 2, 9).tolist() == [0x101, 2]


def test_a_packed_payload_has_one_form() -> None:
    raw = pack_bits(np.array([1, 2, 3], np.uint16), 10)
    for wrong in (raw[:-1], raw + b"\x00", raw[:-1] + bytes([raw[-1] | 0x40])):
        with pytest.raises(MessageError):
            unpack_bits(wrong, 3, 10)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_stream_is_aes_in_counter_mode_from_zero(dtype: type) -> None:
    key = bytes(range(16))
    values = np.zeros(1000, dtype)
    add_stream(values, key, subtract=False)
    blocks = b"".join(number.to_bytes(16, "big") for number in range(-(-values.nbytes // 16)))
    expected = Cipher(AES(key), ECB()).encryptor().update(blocks)[: values.nbytes]  # counter mode by hand
    assert values.tobytes() == expected
    add_stream(values, key, subtract=True)
    assert not values.any()


def test_a_long_stream_goes_on_where_its_last_piece_ended() -> None:
    whole, part = np.zeros(300_001, np.uint16), np.zeros(140_000, np.uint16)
    add_stream(whole, b"k" * 16, subtract=False)
    add_stream(part, b"k" * 16, subtract=False)
    assert np.array_equal(whole[: part.size], part)
    assert not np.array_equal(whole[: 1 << 17], whole[1 << 17 : 1 << 18])


@pytest.mark.parametrize("std", [0.3, 1.0, 7.5, 300.0])
def test_integer_noise_has_the_discrete_gaussians_probabilities(std: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    count = 200_000
    drawn = integer_noise(std, count, np.random.default_rng(1).bytes)
    reach = math.ceil(12 * std)
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support**2) / (2 * std**2))
    edges = np.unique(np.quantile(drawn, np.linspace(0, 1, 12)).astype(int))
    bins = [-reach - 1, *edges[1:-1].tolist(), reach]
    expected = [weights[(support > low) & (support <= high)].sum() / weights.sum() for low, high in pairwise(bins)]
    observed = [int(((drawn > low) & (drawn <= high)).sum()) for low, high in pairwise(bins)]
    assert stats.chisquare(observed, np.array(expected) * count).pvalue > 1e-3
    assert abs(drawn.mean()) < 4 * max(std, 0.1) / math.sqrt(count)


def test_noise_is_bounded_and_zero_is_none() -> None:
    assert integer_noise(0.0, 3, bytes).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at most"):
        integer_noise(MAX_NOISE_CODES * 1.01, 3, bytes)
