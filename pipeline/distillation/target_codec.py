"""The bytes of stored targets: draws of one position as bits, sequences of positions as a shard.

The draws of a position are sorted. A mask of one bit a draw says where a new id begins; the distinct
ids follow, each in as many bits as the vocabulary needs. Masks of a sequence come first, byte by byte,
then its ids as one stream of bits, so a position costs ``ceil(D / 8) + distinct * bits / 8`` bytes:
at most 76 for 32 draws of 152,064 tokens, whatever the distribution.

A shard is a header of fixed size, the offset of each sequence, and the sequences. All is little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import SevenfoldError

MAGIC, VERSION = b"7TARGETS", 1
MAX_VOCABULARY = 1 << 25  # an id and its shift within a byte fit four bytes
_HEADER = struct.Struct("<8sHHIIIIQQQ32s32s")
_DIGEST_BYTES = 32
_MOST_DRAWS, _MOST_TOKENS, _MOST_SEQUENCES = 1 << 12, 1 << 20, 1 << 40

Bytes = bytes | memoryview


class TargetKind(IntEnum):
    """What a shard holds of a distribution."""

    DRAWS = 1
    TOP_K = 2  # biased; kept for comparison


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        draws: Samples a position, or the K of a top-k.
        first: Number of its first sequence among all.
        num_sequences: Sequences in this shard.
        total_sequences: Sequences in all shards.
        file_bytes: Length of the whole shard, header included.
        origin: Digest of everything the draws depend on.
        digest: sha256 of the shard with this field zero.
    """

    kind: TargetKind
    vocabulary: int
    draws: int
    sequence_tokens: int
    num_sequences: int
    first: int
    total_sequences: int
    file_bytes: int
    origin: bytes
    digest: bytes = bytes(_DIGEST_BYTES)


class DamagedShardError(SevenfoldError):
    """Bytes that are not a whole shard of this format."""


def encode_draws(ids: NDArray[np.integer], vocabulary: int) -> bytes:
    """Encode the draws (T, D) of one sequence; their order within a position is not kept."""
    ordered = np.sort(ids, axis=-1)
    starts = np.ones(ordered.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    masks = np.packbits(starts, axis=-1, bitorder="little")
    return masks.tobytes() + pack_ids(ordered[starts], id_bits(vocabulary))


def decode_draws(record: Bytes, vocabulary: int, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
    """Decode one sequence into ids (T, D) and weights (T, D), both zero before the call.

    Distinct ids stand first, in ascending order; weights of a position sum to 1, unused places keep 0.

    Raises:
        DamagedShardError: The record is no such sequence.
    """
    tokens, draws = ids.shape
    mask_bytes = -(-draws // 8)
    if len(record) < tokens * mask_bytes:
        raise DamagedShardError("a sequence is shorter than its masks")
    masks = np.frombuffer(record, np.uint8, tokens * mask_bytes).reshape(tokens, mask_bytes)
    bits = np.unpackbits(masks, axis=1, count=draws, bitorder="little").view(bool)
    if not bits[:, 0].all():
        raise DamagedShardError("a position has no first draw")
    starts = np.flatnonzero(bits)
    values = unpack_ids(record[tokens * mask_bytes :], len(starts), id_bits(vocabulary))
    if int(values.max(initial=0)) >= vocabulary:
        raise DamagedShardError("an id is outside the vocabulary")
    positions = starts // draws
    firsts = np.flatnonzero(starts % draws == 0)  # where each position's ids begin
    places = np.arange(len(starts)) + (positions * draws - firsts[positions])
    ids.reshape(-1)[places] = values
    weights.reshape(-1)[places] = np.diff(starts, append=tokens * draws) * np.float32(1 / draws)


def encode_top_k(ids: NDArray[np.integer], probabilities: NDArray[np.floating], vocabulary: int) -> bytes:
    """Encode the K most likely ids (T, K) of one sequence and their probabilities (T, K) as fp16."""
    return probabilities.astype("<f2").tobytes() + pack_ids(ids.reshape(-1), id_bits(vocabulary))


def decode_top_k(record: Bytes, vocabulary: int, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
    """Decode one sequence into ids (T, K) and weights (T, K), which sum to 1 as if nothing had been cut off.

    Raises:
        DamagedShardError: The record is no such sequence.
    """
    if len(record) < 2 * ids.size:
        raise DamagedShardError("a sequence is shorter than its probabilities")
    values = unpack_ids(record[2 * ids.size :], ids.size, id_bits(vocabulary))
    kept = np.frombuffer(record, "<f2", ids.size).reshape(ids.shape).astype(np.float32)
    sums = kept.sum(axis=-1, keepdims=True)
    if int(values.max(initial=0)) >= vocabulary or not (np.isfinite(sums).all() and (sums > 0).all()):
        raise DamagedShardError("ids or probabilities are out of range")
    ids[...] = values.reshape(ids.shape)
    np.divide(kept, sums, out=weights)


def id_bits(vocabulary: int) -> int:
    """Bits an id takes.

    Raises:
        ValueError: The vocabulary is empty or too large for this format.
    """
    if not 0 < vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"vocabulary {vocabulary} is not within 1..{MAX_VOCABULARY}")
    return max(1, (vocabulary - 1).bit_length())


def pack_ids(ids: NDArray[np.integer], bits: int) -> bytes:
    """Pack ids (N,), each below 2**bits, without gaps, lowest bit first."""
    octets = ids.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little"), bitorder="little").tobytes()


def unpack_ids(packed: Bytes, count: int, bits: int) -> NDArray[np.uint32]:
    """Unpack ``count`` ids of ``bits`` bits.

    Eight ids take ``bits`` whole bytes: the i-th of every eight begins at the same offset and shift, so
    each i is one strided read of all groups.

    Raises:
        DamagedShardError: The length is not that of so many ids.
    """
    if len(packed) != -(-count * bits // 8):
        raise DamagedShardError(f"{count} ids of {bits} bits do not take {len(packed)} bytes")
    groups = -(-count // 8)
    padded = bytes(packed) + bytes(max(groups, 1) * bits - len(packed) + 4)
    ids = np.empty((groups, 8), np.uint32)
    for index in range(8):
        offset, shift = divmod(index * bits, 8)
        words: NDArray[np.uint32] = np.ndarray((groups,), "<u4", padded, offset, (bits,))
        ids[:, index] = words >> shift
    ids &= np.uint32((1 << bits) - 1)
    return ids.reshape(-1)[:count]


def seal_shard(header: ShardHeader, records: Sequence[bytes]) -> bytes:
    """The bytes of a shard; ``file_bytes`` and ``digest`` of the header given do not matter."""
    start = _HEADER.size + 8 * (len(records) + 1)
    offsets = np.cumsum([start, *map(len, records)], dtype="<u8")
    header = replace(header, file_bytes=int(offsets[-1]), digest=bytes(_DIGEST_BYTES))
    body = b"".join([offsets.tobytes(), *records])
    digest = hashlib.sha256(_pack(header) + body).digest()
    return _pack(replace(header, digest=digest)) + body


def unseal_shard(content: Bytes) -> tuple[ShardHeader, NDArray[np.uint64]]:
    """Verify a whole shard.

    Returns:
        Its header, and the offsets (sequences + 1,) of its sequences in the file.

    Raises:
        DamagedShardError: It was cut, changed, or is something else.
    """
    header = parse_header(content[: _HEADER.size])
    if len(content) != header.file_bytes:
        raise DamagedShardError(f"has {len(content)} of {header.file_bytes} bytes")
    digest = hashlib.sha256(_pack(replace(header, digest=bytes(_DIGEST_BYTES))))
    digest.update(content[_HEADER.size :])
    if digest.digest() != header.digest:
        raise DamagedShardError("does not have the digest it names")
    if header.file_bytes < _HEADER.size + 8 * (header.num_sequences + 1):
        raise DamagedShardError("is shorter than its index")
    offsets: NDArray[np.uint64] = np.frombuffer(content, "<u8", header.num_sequences + 1, _HEADER.size)
    ends = [_HEADER.size + offsets.nbytes, header.file_bytes]
    if (np.diff(offsets.astype(np.int64)) < 0).any() or [int(offsets[0]), int(offsets[-1])] != ends:
        raise DamagedShardError("has an index that does not cover it")
    return header, offsets.copy()


def parse_header(content: Bytes) -> ShardHeader:
    """Read a header.

    Raises:
        DamagedShardError: It is cut, of another format or version, or its numbers are out of range.
    """
    if len(content) < _HEADER.size:
        raise DamagedShardError(f"has {len(content)} bytes, less than a header")
    magic, version, kind, *numbers = _HEADER.unpack(content[: _HEADER.size])
    if magic != MAGIC or version != VERSION:
        raise DamagedShardError(f"is not stored targets of version {VERSION}")
    if kind not in list(TargetKind):
        raise DamagedShardError(f"holds an unknown kind {kind}")
    header = ShardHeader(TargetKind(kind), *numbers)
    numbers_most = [
        (header.vocabulary, MAX_VOCABULARY), (header.draws, _MOST_DRAWS), (header.sequence_tokens, _MOST_TOKENS),
        (header.num_sequences, header.total_sequences), (header.total_sequences, _MOST_SEQUENCES),
    ]  # fmt: skip
    if not all(0 < number <= most for number, most in numbers_most):
        raise DamagedShardError("has a header out of range")
    return header


def _pack(header: ShardHeader) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, *astuple(header))
