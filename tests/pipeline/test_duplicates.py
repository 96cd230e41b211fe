"""Near duplicates: signatures estimate Jaccard similarity, the index finds what a comparison of all pairs finds."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from pipeline.data.duplicates import PERMUTATIONS, Bands, Cluster, DuplicateIndex, choose_bands, estimate_jaccard, sign
from pipeline.data.shingles import gram_hashes, read_units

WORDS = [f"word{number}" for number in range(4000)]


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    DuplicateIndex.create(connection)
    yield connection
    connection.close()


@pytest.mark.parametrize("changed", [0, 1, 4, 12, 40])
def test_signatures_estimate_the_similarity_of_word_five_grams(changed: int) -> None:
    rng = random.Random(changed)
    errors = []
    for _ in range(20):
        words = rng.choices(WORDS, k=200)
        other = list(words)
        for place in rng.sample(range(200), changed):
            other[place] = rng.choice(WORDS)
        exact = _jaccard(words, other)
        estimate = estimate_jaccard(sign(read_units(" ".join(words))), sign(read_units(" ".join(other))))
        errors.append(estimate - exact)
        assert abs(estimate - exact) < 4.5 * (exact * (1 - exact) / PERMUTATIONS) ** 0.5 + 1e-9
    assert abs(np.mean(errors)) < 0.035, "unbiased: 20 estimates of standard deviation at most 0.044 each, 3.5 sigma"


def test_chinese_is_compared_by_characters() -> None:
    poem = "床前明月光疑是地上霜举头望明月低头思故乡"
    assert estimate_jaccard(_sign(poem), _sign("，".join(poem[start : start + 5] for start in range(0, 20, 5)))) == 1
    assert estimate_jaccard(_sign(poem), _sign(poem[::-1])) == 0
    assert 0.3 < estimate_jaccard(_sign(poem), _sign(poem[:-4])) < 1


def test_a_text_of_fewer_than_five_units_has_no_signature() -> None:
    assert _sign("one two three four") == b"" and len(_sign("one two three four five")) == 4 * PERMUTATIONS


def test_a_long_text_is_signed_in_pieces_as_if_at_once() -> None:
    words = [f"{number}" for number in range(9000)]
    pieces = [np.frombuffer(_sign(" ".join(words[start : start + 3004])), "<u4") for start in (0, 3000, 6000)]
    assert (np.min(pieces, axis=0) == np.frombuffer(_sign(" ".join(words)), "<u4")).all()


@pytest.mark.parametrize("words", [5, 260, 261, 900])
def test_signatures_are_those_of_datasketch(words: int) -> None:
    units = read_units(" ".join(WORDS[:words]))
    minhash = MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)
    minhash.update_batch((gram_hashes(units.hashes, 5) >> np.uint64(32)).tolist())
    assert sign(units) == minhash.hashvalues.astype("<u4").tobytes()


def test_bands_are_those_that_datasketch_chooses() -> None:
    index = MinHashLSH(threshold=0.8, num_perm=PERMUTATIONS)
    assert choose_bands(0.8) == Bands(index.b, index.r) and index.b * index.r <= PERMUTATIONS


def test_the_index_finds_what_comparing_all_pairs_finds(database: sqlite3.Connection) -> None:
    """Documents are dropped against those kept before; only pairs that share no band may be missed."""
    rng, texts = random.Random(5), []
    for _ in range(60):
        words = rng.choices(WORDS, k=120)
        texts.append(words)
        for changes in rng.sample([0, 1, 2, 3, 6, 20], 2):
            copy = list(words)
            for place in rng.sample(range(120), changes):
                copy[place] = rng.choice(WORDS)
            texts.append(copy)
    rng.shuffle(texts)
    signatures = [_sign(" ".join(words)) for words in texts]
    bands = choose_bands(0.8)
    index, lsh = (
        DuplicateIndex(database, 0.8, bands),
        MinHashLSH(num_perm=PERMUTATIONS, params=(bands.count, bands.rows)),
    )
    kept: list[int] = []
    dropped = 0
    for number, signature in enumerate(signatures):
        shared = {int(key) for key in lsh.query(_minhash(signature))}
        similar = [other for other in kept if other in shared and estimate_jaccard(signature, signatures[other]) >= 0.8]
        assert index.nearest(signature) == (similar[0] if similar else None)
        dropped += bool(similar)
        if not similar:
            index.add(number, f"source {number}", number.to_bytes(32, "big")[::-1], signature)
            lsh.insert(str(number), _minhash(signature))
            kept.append(number)
    assert 40 <= dropped <= 80 and len(kept) + dropped == 180


def test_the_first_document_stays_and_clusters_count_its_copies(database: sqlite3.Connection) -> None:
    index = DuplicateIndex(database, 0.8, choose_bands(0.8))
    one, other = _sign(" ".join(WORDS[:100])), _sign(" ".join(WORDS[100:200]))
    assert index.nearest(one) is None and not index.holds(b"1" * 32)
    index.add(3, "first", b"1" * 32, one)
    index.add(7, "second", b"2" * 32, other)
    assert index.holds(b"1" * 32) and not index.holds(b"3" * 32)
    assert (index.nearest(one), index.nearest(other), index.nearest(b"")) == (3, 7, None)
    assert [index.count_copy(document) for document in (7, 3, 7)] == ["second", "first", "second"]
    assert index.clusters() == 2
    assert list(index.largest_clusters(9)) == [Cluster("second", 2), Cluster("first", 1)]
    assert list(index.largest_clusters(1)) == [Cluster("second", 2)]


def test_the_threshold_is_a_bound_that_counts(database: sqlite3.Connection) -> None:
    """Documents below it stay although they share a band."""
    words = WORDS[:100]
    changed = [*words[:88], *WORDS[500:512]]
    one, other = _sign(" ".join(words)), _sign(" ".join(changed))
    estimate = estimate_jaccard(one, other)
    for threshold, found in ((estimate, 0), (estimate + 0.001, None)):
        index = DuplicateIndex(database, threshold, Bands(128, 1))
        if threshold == estimate:
            index.add(0, "first", b"1" * 32, one)
        assert index.nearest(other) == found


def _sign(text: str) -> bytes:
    return sign(read_units(text))


def _jaccard(one: list[str], other: list[str]) -> float:
    first, second = ({tuple(words[start : start + 5]) for start in range(len(words) - 4)} for words in (one, other))
    return len(first & second) / len(first | second)


def _minhash(signature: bytes) -> MinHash:
    values = np.frombuffer(signature, "<u4")
    return MinHash(num_perm=PERMUTATIONS, hashvalues=values, scheme="affine32")
