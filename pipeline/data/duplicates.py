"""Exact and near duplicates: signatures computed anywhere, decided in corpus order against an index on disk.

The first document in corpus order stays, whatever the number of workers: signatures depend on a text alone, and the
one process that owns the index asks it for one document after the other.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shingles import Units, gram_hashes

SHINGLE_UNITS = 5  # words of English, characters of Chinese
PERMUTATIONS = 128  # the estimate's standard deviation is sqrt(J (1 - J) / 128), 0.035 at J = 0.8
_GRAMS_AT_ONCE = 256  # their permutations stay in a core's cache
_CANDIDATES = 256  # compared for one document; more share a band only in a corpus of one template
_EXACT_KEY_BYTES = 16
_TABLES = """
CREATE TABLE exact (key BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE bands (key INTEGER, document INTEGER, PRIMARY KEY (key, document)) WITHOUT ROWID;
CREATE TABLE signatures (document INTEGER PRIMARY KEY, source TEXT, signature BLOB, copies INTEGER DEFAULT 0);
"""


@dataclass(frozen=True, slots=True)
class Bands:
    """How a signature is cut for look-up: documents that agree in all rows of one band are compared."""

    count: int
    rows: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """A kept document and how many near copies of it were dropped."""

    source: str
    copies: int


@lru_cache(maxsize=8)
def choose_bands(threshold: float) -> Bands:
    """The cut that makes false candidates and missed pairs together fewest at a Jaccard threshold (datasketch's)."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    return Bands(index.b, index.r)


def sign(units: Units) -> bytes:
    """The MinHash signature of a text's 5-grams, little-endian uint32; empty for a text of fewer than five units.

    A. Broder, "On the resemblance and containment of documents", 1997; the signatures are those of datasketch's
    ``affine32`` scheme, without its loops over Python numbers.
    """
    grams = _mix((gram_hashes(units.hashes, SHINGLE_UNITS) >> np.uint64(32)).astype(np.uint32))
    if not len(grams):
        return b""
    factors, offsets = _permutations()
    least = np.full(PERMUTATIONS, 0xFFFFFFFF, np.uint32)
    for start in range(0, len(grams), _GRAMS_AT_ONCE):
        permuted = grams[start : start + _GRAMS_AT_ONCE, None] * factors + offsets
        np.minimum(least, permuted.min(axis=0), out=least)
    return least.astype("<u4").tobytes()


def estimate_jaccard(one: bytes, other: bytes) -> float:
    """Share of equal entries of two signatures: an unbiased estimate of the texts' Jaccard similarity."""
    return float(np.mean(np.frombuffer(one, "<u4") == np.frombuffer(other, "<u4")))


class DuplicateIndex:
    """Digests, bands and signatures of the documents kept so far, in tables of a database the caller commits."""

    def __init__(self, database: sqlite3.Connection, threshold: float | None, bands: Bands | None) -> None:
        self._database, self._threshold, self._bands = database, threshold, bands

    @staticmethod
    def create(database: sqlite3.Connection) -> None:
        """Add the empty tables to a new database."""
        for statement in filter(str.strip, _TABLES.split(";")):
            database.execute(statement)

    def holds(self, digest: bytes) -> bool:
        """Whether a document with this sha256 was kept before."""
        found = self._database.execute("SELECT 1 FROM exact WHERE key = ?", (digest[:_EXACT_KEY_BYTES],))
        return found.fetchone() is not None

    def nearest(self, signature: bytes) -> int | None:
        """The first kept document whose estimated similarity reaches the threshold, or None."""
        if self._threshold is None or self._bands is None or not signature:
            return None
        keys = _band_keys(signature, self._bands)
        marks = ",".join("?" * len(keys))
        candidates = self._database.execute(
            f"SELECT document, signature FROM signatures WHERE document IN (SELECT document FROM bands WHERE key IN "
            f"({marks})) ORDER BY document LIMIT {_CANDIDATES}",
            keys,
        )
        for document, other in candidates:
            if estimate_jaccard(signature, other) >= self._threshold:
                return int(document)
        return None

    def add(self, document: int, source: str, digest: bytes, signature: bytes) -> None:
        """Note a kept document; later ones are compared with it.

        Args:
            document: Its place in the corpus.
            source: Shown in the report when it has near copies.
            digest: sha256 of its text.
            signature: Of ``sign``; empty when near duplicates are not looked for.
        """
        self._database.execute("INSERT INTO exact VALUES (?)", (digest[:_EXACT_KEY_BYTES],))
        if self._bands is not None and signature:
            self._database.execute(
                "INSERT INTO signatures (document, source, signature) VALUES (?, ?, ?)", (document, source, signature)
            )
            pairs = {(key, document) for key in _band_keys(signature, self._bands)}
            self._database.executemany("INSERT INTO bands VALUES (?, ?)", sorted(pairs))

    def count_copy(self, document: int) -> str:
        """Note that a near copy of a kept document was dropped, and return the kept document's source."""
        self._database.execute("UPDATE signatures SET copies = copies + 1 WHERE document = ?", (document,))
        (source,) = self._database.execute("SELECT source FROM signatures WHERE document = ?", (document,)).fetchone()
        return str(source)

    def clusters(self) -> int:
        """How many kept documents have near copies."""
        return int(self._database.execute("SELECT count(*) FROM signatures WHERE copies > 0").fetchone()[0])

    def largest_clusters(self, limit: int) -> Iterator[Cluster]:
        """The kept documents with most copies, most first, the earlier first among equals."""
        rows = self._database.execute(
            "SELECT source, copies FROM signatures WHERE copies > 0 ORDER BY copies DESC, document LIMIT ?", (limit,)
        )
        for source, copies in rows:
            yield Cluster(source, copies)


def _mix(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The finaliser of MurmurHash3 for 32 bits."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


@lru_cache(maxsize=1)
def _permutations() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(PERMUTATIONS,) factors and offsets modulo 2^32, drawn once a process."""
    from datasketch import MinHash

    factors, offsets = MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32").permutations
    return factors, offsets


def _band_keys(signature: bytes, bands: Bands) -> Sequence[int]:
    """One 64-bit key a band, its number included: equal rows in different bands are no match."""
    width = bands.rows * 4
    return [
        int.from_bytes(
            hashlib.blake2b(signature[band * width : (band + 1) * width], digest_size=8, key=bytes([band])).digest(),
            "little",
            signed=True,
        )
        for band in range(bands.count)
    ]
