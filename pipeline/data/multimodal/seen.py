"""What a cleaning run remembers, on disk: duplicates, counts, and how far it came - one transaction for all of it.

Memory does not grow with the corpus, and a run killed anywhere finds duplicates and shards at the same place.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HASH_BITS = 64
_SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (kind TEXT, digest BLOB, PRIMARY KEY (kind, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hashes (band INTEGER, part INTEGER, hash INTEGER, PRIMARY KEY (band, part, hash))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (only INTEGER PRIMARY KEY CHECK (only = 0), state TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything kept so far, in one SQLite file."""

    connection: sqlite3.Connection

    def add(self, kind: str, value: bytes) -> bool:
        """Remember a value; False when it was there."""
        digest = hashlib.sha256(value).digest()
        return self.connection.execute("INSERT OR IGNORE INTO digests VALUES (?, ?)", (kind, digest)).rowcount == 1

    def has(self, kind: str, value: bytes) -> bool:
        """Whether ``add`` was called with it."""
        digest = hashlib.sha256(value).digest()
        found = self.connection.execute("SELECT 1 FROM digests WHERE kind = ? AND digest = ?", (kind, digest))
        return found.fetchone() is not None

    def has_similar(self, hash_: int, max_bits: int) -> bool:
        """Whether a hash of 64 bits was remembered from which at most ``max_bits`` differ.

        Two such hashes agree in at least one of ``max_bits + 1`` parts, so only those are compared.
        """
        for band, part in enumerate(_parts(hash_, max_bits)):
            query = "SELECT hash FROM hashes WHERE band = ? AND part = ?"
            for (other,) in self.connection.execute(query, (band, part)):
                if (_unsigned(other) ^ hash_).bit_count() <= max_bits:
                    return True
        return False

    def add_similar(self, hash_: int, max_bits: int) -> None:
        """Remember a hash for ``has_similar`` with the same ``max_bits``."""
        rows = [(band, part, _signed(hash_)) for band, part in enumerate(_parts(hash_, max_bits))]
        self.connection.executemany("INSERT OR IGNORE INTO hashes VALUES (?, ?, ?)", rows)

    def load(self) -> dict[str, Any] | None:
        """The state of the last commit, or None."""
        row = self.connection.execute("SELECT state FROM progress").fetchone()
        state: dict[str, Any] | None = None if row is None else json.loads(row[0])
        return state

    def commit(self, state: dict[str, Any]) -> None:
        """Make everything since the last commit last, together with ``state``."""
        self.connection.execute("INSERT OR REPLACE INTO progress VALUES (0, ?)", (json.dumps(state, sort_keys=True),))
        self.connection.commit()


@contextmanager
def open_seen(path: Path) -> Iterator[Seen]:
    """Open or make the file; what was not committed is gone when the block ends."""
    connection = sqlite3.connect(path)
    try:
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + _SCHEMA)
        yield Seen(connection)
    finally:
        connection.rollback()
        connection.close()


def _parts(hash_: int, max_bits: int) -> Iterator[int]:
    """Cut 64 bits into ``max_bits + 1`` nearly equal parts."""
    bands = max_bits + 1
    for band in range(bands):
        low, high = band * _HASH_BITS // bands, (band + 1) * _HASH_BITS // bands
        yield _signed(hash_ >> low & (1 << high - low) - 1)


def _signed(value: int) -> int:
    """SQLite's integers are signed."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _unsigned(value: int) -> int:
    return value & (1 << 64) - 1
