"""Values on the wire: blocks of 64 share a scale, codes have 8 or 4 bits.

A segment of n values is stored as its scales, 16 bits each, then its codes; four-bit codes are offset by 8 and
packed two a byte, low nibble first. A scale is the upper half of a float32, rounded up, so that no code is
clipped: max |error| <= scale / 2. Encoding is a pure function: equal values give equal bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import MessageError

BLOCK = 64
CHUNK = 1 << 16  # values worked on at a time, whole blocks: temporaries stay in the cache
MAX_VALUE = 2.0**20  # far above any update; keeps scales and sums finite
_MAX_DECODED = MAX_VALUE * (1 + 2.0**-7)  # a scale was rounded up


class Codec(StrEnum):
    """How values are stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


_FLOATS: dict[Codec, np.dtype[np.floating[Any]]] = {Codec.FP32: np.dtype("<f4"), Codec.FP16: np.dtype("<f2")}
_LARGEST_CODE = {Codec.INT8: 127, Codec.INT4: 7}


def encode(vector: NDArray[np.float32], sizes: Sequence[int], codec: Codec) -> bytes:
    """The bytes of a vector (n,), segment by segment; a prefix of segments is a prefix of the bytes.

    Args:
        vector: Finite values of at most MAX_VALUE (65,504 for fp16).
        sizes: Values of each segment; their sum is n.
        codec: How.

    Raises:
        ValueError: Not finite, too large, or not of the segments' length.
    """
    if vector.shape != (sum(sizes),):
        raise ValueError(f"{vector.shape} values for segments of {list(sizes)}")
    limit = 65504.0 if codec is Codec.FP16 else MAX_VALUE
    if not largest_magnitude(vector) <= limit:
        raise ValueError(f"values must be finite and at most {limit:g}")
    return b"".join(_encode_segment(part, codec) for part in _split(vector, sizes))


def decode(raw: bytes, sizes: Sequence[int], codec: Codec) -> NDArray[np.float32]:
    """The vector (n,) of an encoding.

    Raises:
        MessageError: The length is not exactly that of such an encoding, a scale is not a finite positive
            number, or a value is not finite or above MAX_VALUE.
    """
    vector = decode_unchecked(raw, sizes, codec)
    largest = largest_magnitude(vector)
    if not np.isfinite(largest):
        raise MessageError("payload: a value is not finite")
    if largest > _MAX_DECODED:
        raise MessageError(f"payload: a value is larger than {MAX_VALUE:g}")
    return vector


def decode_unchecked(raw: bytes, sizes: Sequence[int], codec: Codec) -> NDArray[np.float32]:
    """As ``decode``, for a caller that checks the values itself: they may be NaN, infinite or large.

    Raises:
        MessageError: The length is wrong, or a scale is not a finite positive number.
    """
    expected = encoded_bytes(sizes, codec)
    if len(raw) != expected:
        raise MessageError(f"payload: {len(raw)} bytes, {expected} are needed for {sum(sizes)} values in {codec}")
    vector = np.empty(sum(sizes), np.float32)
    offset = start = 0
    for size in sizes:
        length = encoded_bytes([size], codec)
        _decode_segment(memoryview(raw)[offset : offset + length], codec, vector[start : start + size])
        offset, start = offset + length, start + size
    return vector


def encoded_bytes(sizes: Sequence[int], codec: Codec) -> int:
    """Length of an encoding of such segments."""
    if codec in _FLOATS:
        return sum(sizes) * _FLOATS[codec].itemsize
    return sum(2 * _blocks(size) + (size if codec is Codec.INT8 else (size + 1) // 2) for size in sizes)


def largest_magnitude(vector: NDArray[np.float32]) -> float:
    """max |value| without a copy of the vector, 0 of an empty one; NaN when any value is."""
    return float(np.maximum(vector.max(), -vector.min())) if vector.size else 0.0


def chunks(start: int, stop: int) -> Iterator[slice]:
    """[start, stop) in stretches of CHUNK values, the last one shorter."""
    for first in range(start, stop, CHUNK):
        yield slice(first, min(first + CHUNK, stop))


def _encode_segment(values: NDArray[np.float32], codec: Codec) -> bytes:
    if codec in _FLOATS:
        return values.astype(_FLOATS[codec]).tobytes()
    largest = _LARGEST_CODE[codec]
    halves, codes = np.empty(_blocks(values.size), "<u2"), np.empty(values.size, np.int8)
    for chunk in chunks(0, values.size):
        blocks = _in_blocks(values[chunk])
        first = chunk.start // BLOCK
        exact = np.abs(np.maximum(blocks.max(axis=1), -blocks.min(axis=1))) / np.float32(largest)  # abs: of -0
        halves[first : first + len(blocks)], scales = _scales(exact)
        scales[scales == 0] = 1
        quotients = blocks / scales[:, None]
        np.rint(quotients, out=quotients)
        codes[chunk] = quotients.ravel()[: values[chunk].size]  # a scale was rounded up: at most the largest code
    return halves.tobytes() + (codes.tobytes() if codec is Codec.INT8 else _pack(codes))


def _decode_segment(raw: memoryview, codec: Codec, out: NDArray[np.float32]) -> None:
    if codec in _FLOATS:
        out[:] = np.frombuffer(raw, _FLOATS[codec])
        return
    count = _blocks(out.size)
    scales = (np.frombuffer(raw, "<u2", count).astype(np.uint32) << 16).view(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise MessageError("payload: a scale is not a finite positive number")
    stored = np.frombuffer(raw, np.uint8, offset=2 * count)
    codes = stored.view(np.int8) if codec is Codec.INT8 else _unpack(stored, out.size)
    # A huge scale times a code can leave float32; the caller refuses the infinity.
    with np.errstate(over="ignore"):
        for chunk in chunks(0, out.size):
            factors = np.repeat(scales[chunk.start // BLOCK : -(-chunk.stop // BLOCK)], BLOCK)
            np.multiply(codes[chunk], factors[: out[chunk].size], out=out[chunk])


def _in_blocks(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(k, BLOCK), the last block padded with zeros."""
    if values.size % BLOCK:
        values = np.concatenate([values, np.zeros(-values.size % BLOCK, np.float32)])
    return values.reshape(-1, BLOCK)


def _scales(exact: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """The upper 16 bits of positive float32 values, rounded up, and what they stand for."""
    halves = ((exact.astype(np.float32).view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    return halves, (halves.astype(np.uint32) << 16).view(np.float32)


def _pack(codes: NDArray[np.int8]) -> bytes:
    offset = np.full(codes.size + codes.size % 2, 8, np.uint8)
    offset[: codes.size] = (codes + 8).astype(np.uint8)
    return (offset[0::2] | (offset[1::2] << 4)).tobytes()


def _unpack(packed: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    codes = np.empty(packed.size * 2, np.int8)
    codes[0::2] = (packed & 0xF).astype(np.int8) - 8
    codes[1::2] = (packed >> 4).astype(np.int8) - 8
    return codes[:size]


def _split(vector: NDArray[np.float32], sizes: Sequence[int]) -> list[NDArray[np.float32]]:
    return np.split(vector, np.cumsum(sizes)[:-1])


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
