from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_runtime.formats.codec import (
    BLOCK,
    CHUNK,
    MAX_VALUE,
    Codec,
    decode,
    decode_unchecked,
    encode,
    encoded_bytes,
    largest_magnitude,
)
from edge_runtime.formats.errors import MessageError

LARGEST = {Codec.INT8: 127, Codec.INT4: 7}
INTEGERS = [Codec.INT8, Codec.INT4]
values = st.floats(-1e6, 1e6, width=32)


def vectors(longest=300):
    return st.integers(0, longest).flatmap(lambda n: arrays(np.float32, n, elements=values))


def stored_scales(raw, size):
    count = -(-size // BLOCK)
    return np.array([struct.unpack("<f", b"\0\0" + raw[2 * i : 2 * i + 2])[0] for i in range(count)], np.float64)


def test_int8_bytes_by_hand() -> None:
    # max 127 gives scale 1 = 0x3f80; halves go to even codes
    vector = np.array([127, -127, 0.5, 1.5, -2.5, 3, 0], np.float32)
    raw = encode(vector, [7], Codec.INT8)
    assert raw == bytes([0x80, 0x3F, 127, 129, 0, 2, 254, 3, 0])
    assert decode(raw, [7], Codec.INT8).tolist() == [127, -127, 0, 2, -2, 3, 0]


def test_int4_bytes_by_hand() -> None:
    # scale 2 = 0x4000; codes 7 -7 1 0 offset by 8, low nibble first; the odd one is filled up with 8
    raw = encode(np.array([14, -14, 2, 1, -6], np.float32), [5], Codec.INT4)
    assert raw == bytes([0x00, 0x40, 0x1F, 0x89, 0x85])
    assert decode(raw, [5], Codec.INT4).tolist() == [14, -14, 2, 0, -6]


def test_a_scale_is_rounded_up_to_sixteen_bits() -> None:
    # 130 / 127 = 0x3f8307.. in float32: the upper half rounded up is 0x3f84
    assert encode(np.array([130], np.float32), [1], Codec.INT8)[:2] == bytes([0x84, 0x3F])


@pytest.mark.parametrize("codec", INTEGERS)
@settings(max_examples=80, deadline=None)
@given(vector=vectors())
def test_integer_codes_are_within_half_a_scale_and_the_scale_is_the_smallest(codec, vector) -> None:
    raw = encode(vector, [vector.size], codec)
    scales = stored_scales(raw, vector.size)
    decoded = decode(raw, [vector.size], codec).astype(np.float64)
    for start in range(0, vector.size, BLOCK):
        block, scale = vector[start : start + BLOCK].astype(np.float64), scales[start // BLOCK]
        exact = np.abs(block).max() / LARGEST[codec]
        # A few float32 roundings: of max / largest (to zero, below half the smallest float), of value / scale (up
        # to 128 scales), of code * scale.
        slack = 128 * scale * 2.0**-23 + (LARGEST[codec] / 2 if scale == 0 else 1) * 2.0**-149
        assert np.abs(decoded[start : start + BLOCK] - block).max() <= scale / 2 + slack
        assert exact * (1 - 2.0**-23) - 2.0**-149 <= scale <= exact * (1 + 2.0**-7) * (1 + 2.0**-22) + 2.0**-133


@pytest.mark.parametrize("codec", INTEGERS)
@settings(max_examples=40, deadline=None)
@given(vector=vectors(150))
def test_codes_are_the_nearest_multiples(codec, vector) -> None:
    """Oracle: plain Python arithmetic, block by block."""
    raw = encode(vector, [vector.size], codec)
    decoded = decode(raw, [vector.size], codec)
    scales = stored_scales(raw, vector.size)
    for index, value in enumerate(vector.tolist()):
        scale = float(scales[index // BLOCK])
        ratio = float(np.float32(value) / np.float32(scale)) if scale else 0.0
        code = max(-LARGEST[codec], min(LARGEST[codec], round(ratio)))
        assert decoded[index] == np.float32(code) * np.float32(scale)


@pytest.mark.parametrize("codec", list(Codec))
@settings(max_examples=40, deadline=None)
@given(vector=vectors(200), cuts=st.lists(st.integers(0, 200), max_size=3))
def test_a_prefix_of_segments_is_a_prefix_of_bytes_and_decodes_alone(codec, vector, cuts) -> None:
    vector = np.clip(vector, -65504, 65504)
    stops = sorted({min(cut, vector.size) for cut in cuts} | {vector.size})
    sizes = np.diff([0, *stops]).tolist()
    raw = encode(vector, sizes, codec)
    assert len(raw) == encoded_bytes(sizes, codec)
    whole = decode(raw, sizes, codec)
    for count in range(len(sizes)):
        length, end = encoded_bytes(sizes[:count], codec), sum(sizes[:count])
        assert np.array_equal(decode(raw[:length], sizes[:count], codec), whole[:end])
        assert raw[:length] == encode(vector[:end], sizes[:count], codec)


@given(vectors())
def test_fp32_keeps_every_bit_and_fp16_is_numpys(vector) -> None:
    assert decode(encode(vector, [vector.size], Codec.FP32), [vector.size], Codec.FP32).tobytes() == vector.tobytes()
    vector = np.clip(vector, -65504, 65504)
    decoded = decode(encode(vector, [vector.size], Codec.FP16), [vector.size], Codec.FP16)
    assert np.array_equal(decoded, vector.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("seed", range(5))
def test_encoding_what_was_decoded_changes_no_value(codec, seed) -> None:
    """A server that adopts decoded bytes and sends them again sends the same values, up to one scale rounding."""
    vector = np.random.default_rng(seed).normal(size=640).astype(np.float32)
    once = decode(encode(vector, [640], codec), [640], codec)
    twice = decode(encode(once, [640], codec), [640], codec)
    assert np.abs(twice - once).max() <= np.abs(once).max() * 2.0**-7


@pytest.mark.parametrize("codec", list(Codec))
def test_the_largest_values_and_zeros_survive_their_own_encoding(codec) -> None:
    largest = 65504.0 if codec is Codec.FP16 else MAX_VALUE
    for value in (largest, -largest, 0.0, 1e-45, 1e-39):
        vector = np.full(65, value, np.float32)
        decoded = decode(encode(vector, [65], codec), [65], codec)
        np.testing.assert_allclose(decoded, vector, rtol=2.0**-7, atol=6e-8 if codec is Codec.FP16 else 1e-40)
    assert not decode(
        bytes(encoded_bytes([3], codec)) if codec is not Codec.INT4 else b"\0\0\x88\x88", [3], codec
    ).any()


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, MAX_VALUE * 1.01, -MAX_VALUE * 1.01])
def test_values_that_no_update_has_are_not_encoded(codec, bad) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode(np.array([0, bad, 0], np.float32), [3], codec)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="65504"):
        encode(np.array([65505], np.float32), [1], Codec.FP16)


@pytest.mark.parametrize("sizes", [[2], [4], [1, 1], [3, 1], []])
def test_segments_must_add_up(sizes) -> None:
    with pytest.raises(ValueError, match="segments"):
        encode(np.zeros(3, np.float32), sizes, Codec.INT8)
    with pytest.raises(ValueError, match="segments"):
        encode(np.zeros((3, 1), np.float32), [3], Codec.INT8)


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("cut", [-1, 1, 64])
def test_another_length_is_refused(codec, cut) -> None:
    raw = encode(np.ones(130, np.float32), [65, 65], codec)
    longer = raw[:cut] if cut < 0 else raw + bytes(cut)
    for decoder in (decode, decode_unchecked):
        with pytest.raises(MessageError, match="are needed"):
            decoder(longer, [65, 65], codec)


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("half", [0x7F80, 0x7FC0, 0x7F81, 0xFF80, 0xFFFF, 0xBF80, 0x8001])
def test_scales_that_are_not_finite_and_positive_are_refused(codec, half) -> None:
    raw = bytearray(encode(np.ones(65, np.float32), [65], codec))
    raw[2:4] = struct.pack("<H", half)  # of the second block
    for decoder in (decode, decode_unchecked):
        with pytest.raises(MessageError, match="scale"):
            decoder(bytes(raw), [65], codec)


@pytest.mark.parametrize("codec", INTEGERS)
def test_a_scale_that_overflows_is_refused_by_decode_and_seen_by_its_unchecked_twin(codec) -> None:
    raw = bytearray(encode(np.ones(2, np.float32), [2], codec))
    raw[:2] = struct.pack("<H", 0x7F7F)
    assert np.isinf(decode_unchecked(bytes(raw), [2], codec)).all()
    with pytest.raises(MessageError, match="not finite"):
        decode(bytes(raw), [2], codec)
    raw[:2] = struct.pack("<H", 0x4980)  # 2**20
    with pytest.raises(MessageError, match="larger"):
        decode(bytes(raw), [2], codec)


@pytest.mark.parametrize(("codec", "kind"), [(Codec.FP32, "<f4"), (Codec.FP16, "<f2")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(codec, kind, bad) -> None:
    raw = np.array([1, bad], kind).tobytes()
    with pytest.raises(MessageError, match="not finite"):
        decode(raw, [2], codec)


def test_every_half_decodes_without_a_warning() -> None:
    raw = np.arange(1 << 16, dtype="<u2").tobytes()
    decoded = decode_unchecked(raw, [1 << 16], Codec.FP16)
    assert np.array_equal(decoded, np.frombuffer(raw, "<f2"), equal_nan=True)
    signalling = struct.pack("<2I", 0x7F800001, 0xFF812345)
    with pytest.raises(MessageError, match="not finite"):
        decode(signalling, [2], Codec.FP32)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(Codec)), st.integers(1, 70), st.data())
def test_any_bytes_are_a_bounded_vector_or_refused(codec, size, data) -> None:
    length = encoded_bytes([size], codec)
    raw = data.draw(st.binary(min_size=length, max_size=length))
    try:
        vector = decode(raw, [size], codec)
    except MessageError:
        return
    assert vector.shape == (size,) and vector.dtype == np.float32
    assert np.isfinite(vector).all() and np.abs(vector).max() <= MAX_VALUE * (1 + 2.0**-7)


def test_lengths_by_hand() -> None:
    sizes = [64, 65, 1]
    assert [encoded_bytes(sizes, codec) for codec in Codec] == [520, 260, 130 + 8, 32 + 33 + 1 + 8]


def test_the_largest_magnitude() -> None:
    assert [largest_magnitude(np.array(values, np.float32)) for values in ([-3, 2], [-1, 2], [])] == [3, 2, 0]
    assert np.isnan(largest_magnitude(np.array([1, np.nan], np.float32)))


@pytest.mark.parametrize("codec", [Codec.INT8, Codec.INT4])
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, 2 * CHUNK + 65])
def test_working_in_chunks_leaves_no_seams(codec: Codec, size: int) -> None:
    """Blocks are independent of each other: a long segment is its chunks' scales, then its chunks' codes."""
    vector = np.random.default_rng(3).standard_normal(size).astype(np.float32)
    pieces = [vector[start : start + CHUNK] for start in range(0, size, CHUNK)]
    encoded = [(2 * -(-piece.size // 64), encode(piece, [piece.size], codec)) for piece in pieces]
    parts = [raw[:cut] for cut, raw in encoded] + [raw[cut:] for cut, raw in encoded]
    whole = encode(vector, [size], codec)
    assert whole == b"".join(parts)
    decoded = np.concatenate([decode(raw, [p.size], codec) for p, (_, raw) in zip(pieces, encoded, strict=True)])
    np.testing.assert_array_equal(decode(whole, [size], codec), decoded)
