"""Stored targets as bytes: exact, small, and every damage seen."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.distillation.target_codec import (
    MAX_VOCABULARY,
    DamagedShardError,
    ShardHeader,
    TargetKind,
    decode_draws,
    decode_top_k,
    encode_draws,
    encode_top_k,
    id_bits,
    pack_ids,
    parse_header,
    seal_shard,
    unpack_ids,
    unseal_shard,
)

QWEN = 152_064
HEADER = ShardHeader(TargetKind.DRAWS, 320, 5, 4, 3, 6, 20, 0, bytes(range(32)))
RECORDS = [b"one", b"", b"the third"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 9), st.sampled_from([1, 2, 3, 255, 256, 2048, 65_537, QWEN, MAX_VOCABULARY]),
    st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_distinct_ids_and_their_counts_come_back(
    draws: int, tokens: int, vocabulary: int, seed: int, peaked: bool
) -> None:
    """Against a Counter: for one to nine positions of any number of draws and any vocabulary."""
    most = min(vocabulary, 4) if peaked else vocabulary
    drawn = vocabulary - 1 - np.random.default_rng(seed).integers(0, most, (tokens, draws))
    ids, weights = _decoded(encode_draws(drawn, vocabulary), tokens, draws, vocabulary)
    for position in range(tokens):
        expected = sorted(Counter(drawn[position].tolist()).items())
        used = len(expected)
        assert ids[position, :used].tolist() == [id for id, _ in expected]
        np.testing.assert_allclose(weights[position, :used], [count / draws for _, count in expected], rtol=1e-6)
        assert not ids[position, used:].any() and not weights[position, used:].any()


def test_the_order_of_draws_changes_no_byte() -> None:
    draws = np.random.default_rng(0).integers(0, 50, (7, 32))
    assert encode_draws(draws, 320) == encode_draws(draws[:, ::-1], 320)


@pytest.mark.parametrize(("exponent", "least", "most"), [(0.0, 75.9, 76), (1.0, 68.2, 69), (2.0, 20.3, 20.8)])
def test_positions_of_a_large_vocabulary_are_small(exponent: float, least: float, most: float) -> None:
    """32 draws of 152,064 tokens, from uniform to the shape of text (Zipf) and sharper: 76 bytes at most."""
    p = 1 / np.arange(1, QWEN + 1) ** exponent
    cumulative = np.cumsum(p) / p.sum()
    drawn = np.searchsorted(cumulative, np.random.default_rng(1).random((2000, 32)), side="right")
    assert least <= len(encode_draws(drawn, QWEN)) / 2000 <= most


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packed_ids_are_a_stream_of_bits_lowest_first(bits: int, count: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 2**bits, count)
    packed = pack_ids(ids, bits)
    as_one_number = sum(int(id) << (bits * index) for index, id in enumerate(ids))
    assert packed == as_one_number.to_bytes(-(-bits * count // 8), "little")
    assert unpack_ids(packed, count, bits).tolist() == ids.tolist()


def test_bits_hold_the_largest_id() -> None:
    assert [id_bits(size) for size in (1, 2, 3, 256, 257, QWEN, MAX_VOCABULARY)] == [1, 1, 2, 8, 9, 18, 25]
    for size in (0, -1, MAX_VOCABULARY + 1):
        with pytest.raises(ValueError, match="vocabulary"):
            id_bits(size)


def test_a_top_k_comes_back_as_a_distribution() -> None:
    """Probabilities are fp16: five parts in ten thousand."""
    p = np.array([[0.5, 0.25, 0.05], [0.9, 1e-3, 1e-4]])
    chosen = np.array([[7, 0, 152_063], [1, 2, 3]])
    record = encode_top_k(chosen, p, QWEN)
    ids, weights = np.zeros((2, 3), np.int64), np.zeros((2, 3), np.float32)
    decode_top_k(record, QWEN, ids, weights)
    assert ids.tolist() == chosen.tolist() and len(record) == 2 * 6 + 14
    np.testing.assert_allclose(weights, p / p.sum(-1, keepdims=True), rtol=6e-4)


@pytest.mark.parametrize("cut", [0, 1, 3, 4, -1])
def test_a_record_of_the_wrong_length_is_refused(cut: int) -> None:
    record = encode_draws(np.arange(20).reshape(4, 5), 320)
    with pytest.raises(DamagedShardError):
        _decoded(record[:cut], 4, 5, 320)
    with pytest.raises(DamagedShardError):
        _decoded(record + b"\0", 4, 5, 320)


def test_ids_outside_the_vocabulary_and_positions_without_draws_are_refused() -> None:
    with pytest.raises(DamagedShardError, match="vocabulary"):
        _decoded(encode_draws(np.full((1, 5), 300), 320), 1, 5, 300)
    with pytest.raises(DamagedShardError, match="first draw"):
        _decoded(b"\x1e" + bytes(5), 1, 5, 320)
    for value in (np.nan, np.inf, 0.0):
        with pytest.raises(DamagedShardError, match="out of range"):
            decode_top_k(
                encode_top_k(np.ones((1, 2)), np.full((1, 2), value), 9), 9, np.zeros((1, 2), np.int64),
                np.zeros((1, 2), np.float32),
            )  # fmt: skip


def test_a_shard_gives_back_its_header_and_its_sequences() -> None:
    content = seal_shard(HEADER, RECORDS)
    header, offsets = unseal_shard(content)
    assert replace(header, digest=HEADER.digest, file_bytes=0) == HEADER and header.file_bytes == len(content)
    assert parse_header(content) == header
    found = [content[start:end] for start, end in pairwise(offsets)]
    assert found == RECORDS


def test_a_shard_cut_anywhere_is_damaged() -> None:
    content = seal_shard(HEADER, RECORDS)
    for length in range(len(content)):
        with pytest.raises(DamagedShardError, match=f"has {length} "):
            unseal_shard(content[:length])
    with pytest.raises(DamagedShardError):
        unseal_shard(content + b"\0")


def test_a_shard_with_any_bit_flipped_is_damaged() -> None:
    content = seal_shard(HEADER, RECORDS)
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedShardError):
            unseal_shard(bytes(changed))


@pytest.mark.parametrize(
    "change",
    [{"vocabulary": 0}, {"vocabulary": MAX_VOCABULARY + 1}, {"draws": 0}, {"draws": 2**31}, {"sequence_tokens": 2**31},
     {"num_sequences": 21}, {"num_sequences": 0}, {"total_sequences": 2**50}],
)  # fmt: skip
def test_numbers_that_would_exhaust_memory_are_refused_even_with_a_right_digest(change: dict[str, int]) -> None:
    with pytest.raises(DamagedShardError, match="out of range"):
        unseal_shard(seal_shard(replace(HEADER, **change), RECORDS))


def test_an_index_of_another_number_of_sequences_is_refused() -> None:
    with pytest.raises(DamagedShardError, match="index"):
        unseal_shard(seal_shard(replace(HEADER, num_sequences=2), RECORDS))
    with pytest.raises(DamagedShardError, match="index"):
        unseal_shard(seal_shard(HEADER, RECORDS[:2]))
    with pytest.raises(DamagedShardError, match="index"):
        unseal_shard(seal_shard(replace(HEADER, num_sequences=20), RECORDS))


def _decoded(record: bytes, tokens: int, draws: int, vocabulary: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ids, weights = np.zeros((tokens, draws), np.int64), np.zeros((tokens, draws), np.float32)
    decode_draws(record, vocabulary, ids, weights)
    return ids, weights
