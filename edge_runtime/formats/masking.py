"""Arithmetic of masked sums: integers modulo 2**bits, streams that hide them, and how they are packed.

A device sends ``codes * weight + masks`` modulo 2**bits. Masks are key streams of AES-128 in counter mode that
cancel in the sum over all devices, or that the survivors help to remove; what is left is the exact integer sum.
Codes are multiples of a scale that all devices share, one for each rank segment, because only values on a common
grid can be added without being seen (Bonawitz et al. 2017, "Practical Secure Aggregation").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.messages import MaskPlan

KEY_BYTES = 16
MIN_BITS, MAX_BITS = 8, 32
MAX_NOISE_CODES = 1e5  # standard deviation of integer noise; bounds its table

_NOISE_MARGIN = 8.0  # standard deviations of the summed noise that fit in the field: beyond them 1e-15 a value
_CHUNK = 1 << 17  # values whose stream is made at once
_ZEROS = bytes(4 * _CHUNK)

RandomBytes = Callable[[int], bytes]
Field = NDArray[np.unsignedinteger[Any]]


def quantize_for_mask(
    vector: NDArray[np.float32], sizes: Sequence[int], plan: MaskPlan
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Codes on the common grid, and what they stand for; the difference belongs to the residual.

    Segments beyond ``plan.scales`` are not sent this round: their codes and what they stand for are zero.

    Args:
        vector: (n,), finite; clipped in norm already where the plan asks for it.
        sizes: Values of each rank segment the device trains; their sum is n.
        plan: Names the scales and the largest code.

    Returns:
        codes (n,) in [-largest_code, largest_code] and their values (n,).

    Raises:
        ValueError: Not finite, or not of the segments' length.
    """
    if vector.shape != (sum(sizes),) or not np.isfinite(vector).all():
        raise ValueError(f"{vector.shape} values for segments of {list(sizes)}, which must be finite")
    codes = np.zeros(vector.shape, np.int32)
    values = np.zeros(vector.shape, np.float32)
    start = 0
    for size, scale in zip(sizes, plan.scales, strict=False):
        part = slice(start, start + size)
        exact = np.rint(vector[part].astype(np.float64) / scale)
        codes[part] = np.clip(exact, -plan.largest_code, plan.largest_code).astype(np.int32)
        values[part] = (codes[part] * scale).astype(np.float32)
        start += size
    return codes, values


def field_bits(devices: int, weight_cap: int, largest_code: int, noise_codes: float = 0.0) -> int:
    """Smallest width in which the sum of so many devices cannot wrap.

    Args:
        devices: That may add to the sum.
        weight_cap: Largest weight of one.
        largest_code: Of one device, before its weight.
        noise_codes: As in ``largest_sum``.

    Raises:
        ValueError: More than 32 bits.
    """
    largest = largest_sum(devices * weight_cap, devices, largest_code, noise_codes)
    bits = max(MIN_BITS, (2 * largest).bit_length())
    if bits > MAX_BITS:
        raise ValueError(
            f"{devices} devices of weight {weight_cap} and codes of {largest_code} need {bits} bits, not 32"
        )
    return bits


def largest_sum(weight: int, devices: int, largest_code: int, noise_codes: float = 0.0) -> int:
    """Magnitude that no sum of honest devices exceeds.

    Args:
        weight: Sum of their weights.
        devices: Their number.
        largest_code: Of one device, before its weight.
        noise_codes: Standard deviation of the noise of one device, in codes; of its sum 8 deviations are allowed.
    """
    return weight * largest_code + math.ceil(_NOISE_MARGIN * math.sqrt(devices) * noise_codes)


def field_dtype(bits: int) -> type[np.uint16] | type[np.uint32]:
    """The integers whose own wrapping, then their low bits, are arithmetic modulo 2**bits."""
    return np.uint16 if bits <= 16 else np.uint32


def add_stream(values: Field, key: bytes, *, subtract: bool) -> None:
    """Add a mask (n,) to ``values`` in place, or take it away; only the low bits are meant.

    Args:
        values: uint16 or uint32, as ``field_dtype`` says: the stream depends on the width.
        key: 16 bytes, for this one mask.
        subtract: Whether to take it away.
    """
    encryptor = Cipher(AES(key), CTR(bytes(16))).encryptor()  # a key makes one stream, so its counter starts at 0
    dtype = values.dtype.newbyteorder("<")
    combine = np.subtract if subtract else np.add
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK]
        stream = np.frombuffer(encryptor.update(memoryview(_ZEROS)[: part.nbytes]), dtype)
        combine(part, stream, out=part)


def signed_sum(values: Field, bits: int) -> NDArray[np.int64]:
    """The integers (n,) in [-2**(bits-1), 2**(bits-1)) that these stand for modulo 2**bits."""
    half, low = 1 << (bits - 1), (1 << bits) - 1
    return ((values.astype(np.int64) + half) & low) - half


def packed_bytes(count: int, bits: int) -> int:
    """Length of so many packed values."""
    return -(-count * bits // 8)


def pack_bits(values: Field, bits: int) -> bytes:
    """The low ``bits`` of each value, one after the other, least significant bit first."""
    groups = np.zeros((-(-values.size // 8), 8), np.uint64)
    groups.reshape(-1)[: values.size] = values & values.dtype.type((1 << bits) - 1)
    packed = np.zeros((len(groups), bits), np.uint8)  # eight values fill exactly `bits` bytes
    for lane in range(8):
        first, shift = divmod(lane * bits, 8)
        shifted = groups[:, lane] << np.uint64(shift)
        for column in range(first, -(-(lane + 1) * bits // 8)):
            packed[:, column] |= (shifted >> np.uint64(8 * (column - first))).astype(np.uint8)
    return packed.tobytes()[: packed_bytes(values.size, bits)]


def unpack_bits(raw: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint32]:
    """Inverse of ``pack_bits``: (count,).

    Raises:
        MessageError: Another length, or bits after the last value.
    """
    if len(raw) != packed_bytes(count, bits):
        raise MessageError(f"payload: {len(raw)} bytes, {packed_bytes(count, bits)} are needed for {count} values")
    if (spare := -count * bits % 8) and raw[-1] >> (8 - spare):
        raise MessageError("payload: bits after the last value")
    packed = np.zeros((-(-count // 8), bits), np.uint8)
    packed.reshape(-1)[: len(raw)] = np.frombuffer(raw, np.uint8)
    values = np.empty((len(packed), 8), np.uint32)
    for lane in range(8):
        first, shift = divmod(lane * bits, 8)
        wide = np.zeros(len(packed), np.uint64)
        for column in range(first, -(-(lane + 1) * bits // 8)):
            wide |= packed[:, column].astype(np.uint64) << np.uint64(8 * (column - first))
        values[:, lane] = ((wide >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.uint32)
    return values.reshape(-1)[:count]


def integer_noise(std: float, count: int, random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Draws (count,) of the discrete Gaussian: P(k) proportional to exp(-k**2 / (2 std**2)).

    By inversion with 53 random bits, so that the tail beyond about 8 deviations is cut: with many values that
    adds 1e-15 each to delta. A sum of such draws is close to the discrete Gaussian of the summed variance where
    std is not far below 1 (Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism").

    Args:
        std: In codes, at most MAX_NOISE_CODES; 0 gives zeros.
        count: How many.
        random_bytes: Gives so many unpredictable bytes.

    Raises:
        ValueError: std is larger.
    """
    if not 0 <= std <= MAX_NOISE_CODES:
        raise ValueError(f"noise of {std:g} codes; at most {MAX_NOISE_CODES:g}")
    if std == 0:
        return np.zeros(count, np.int64)
    reach = math.ceil(9 * std) + 1
    cumulative = np.cumsum(np.exp(-0.5 * (np.arange(-reach, reach + 1) / std) ** 2))
    encryptor = Cipher(AES(random_bytes(KEY_BYTES)), CTR(bytes(16))).encryptor()
    raw = np.frombuffer(encryptor.update(bytes(8 * count)), "<u8")
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 * cumulative[-1]
    drawn: NDArray[np.int64] = np.searchsorted(cumulative, uniform, side="right").astype(np.int64)
    return drawn - reach
