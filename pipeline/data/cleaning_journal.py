"""Progress of a cleaning run on disk: parts of the output, and a database that says which of them count.

A part's files are flushed and renamed first; then one transaction notes the part together with everything that later
documents are compared with. A process that is killed anywhere leaves parts that are noted, whose documents are never
read again, and at most one that is not, which is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edge_runtime.formats.errors import UserError
from pipeline.data.duplicates import DuplicateIndex

SIDES = ("train", "held_out")
_SETTINGS = ("journal_mode = TRUNCATE", "synchronous = FULL", f"cache_size = -{16 << 10}")  # 16 MiB of pages
_COPY_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Progress:
    """What the finished parts hold.

    Attributes:
        documents: Of the corpus, from its start.
        input_digest: Of these documents.
        report: Their counts, as JSON.
    """

    documents: int
    input_digest: str
    report: str


class Journal:
    """One cleaning run's folder: ``journal.sqlite`` and ``parts/``.

    Attributes:
        database: Inside a transaction that ``finish_part`` commits.
        done: What is finished; None: nothing is.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Open the folder's journal, or start a new one when it is of another run.

        Args:
            folder: Made when it is missing.
            identity: Everything that the result depends on beside the documents.
        """
        self._parts = folder / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        self.database = _open_database(folder / "journal.sqlite", identity)
        self.done = self._read_progress()
        self._files: dict[str, BinaryIO] = {}
        self.database.execute("BEGIN IMMEDIATE")

    def write(self, side: str, lines: bytes) -> None:
        """Append rows to the part in work."""
        if side not in self._files:
            self._files[side] = self._partial(side).open("wb")
        self._files[side].write(lines)

    def finish_part(self, progress: Progress) -> None:
        """Make the part in work count, with all that was written to the database since the last one."""
        number = self.database.execute("SELECT count(*) FROM parts").fetchone()[0]
        digests = {side: self._publish(side, number) for side in SIDES if side in self._files}
        _flush_folder(self._parts)
        self._files = {}
        values = (number, progress.documents, progress.input_digest, progress.report, json.dumps(digests))
        self.database.execute("INSERT INTO parts VALUES (?, ?, ?, ?, ?)", values)
        self.database.execute("COMMIT")
        self.done = progress
        self.database.execute("BEGIN IMMEDIATE")

    def assemble(self, output: Path) -> None:
        """Write ``train.jsonl`` and ``held_out.jsonl`` from the parts.

        Raises:
            UserError: A part is not what was written.
        """
        parts = self.database.execute("SELECT number, digests FROM parts ORDER BY number").fetchall()
        for side in SIDES:
            with (output / f"{side}.jsonl").open("wb") as whole:
                for number, digests in parts:
                    expected = json.loads(digests).get(side)
                    if expected is not None and _append(self._part(side, number), whole) != expected:
                        raise UserError(
                            "checkpoint", str(self._part(side, number)), "the part that was written (it was changed)",
                            f"remove {self._parts.parent} and run the same command",
                        )  # fmt: skip

    def close(self) -> None:
        """Leave what is finished; what is not is undone."""
        for file in self._files.values():
            file.close()
        self.database.close()

    def _read_progress(self) -> Progress | None:
        row = self.database.execute(
            "SELECT documents, input_digest, report FROM parts ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return None if row is None else Progress(*row)

    def _publish(self, side: str, number: int) -> str:
        """Flush and rename a part's file, and return its sha256."""
        file = self._files[side]
        file.flush()
        os.fsync(file.fileno())
        file.close()
        with self._partial(side).open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        self._partial(side).replace(self._part(side, number))
        return digest

    def _partial(self, side: str) -> Path:
        return self._parts / f"{side}.partial"

    def _part(self, side: str, number: int) -> Path:
        return self._parts / f"{side}-{number:06d}.jsonl"


@contextmanager
def full_disk_refused(folder: Path) -> Iterator[None]:
    """Turn a full disk, at any write, into one line.

    Raises:
        UserError: The disk or the quota is full, or the journal's database cannot be written or read.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            "free disk", f"none left ({os.strerror(error.errno)})", f"room for the cleaned corpus twice at {folder}",
            "free some space; the same command goes on from here",
        ) from None  # fmt: skip
    except sqlite3.DatabaseError as error:
        full = isinstance(error, sqlite3.OperationalError)
        next_step = "free some space; the same command goes on from here" if full else f"remove {folder}"
        raise UserError(
            "checkpoint", f"{folder} ({error})", "a disk with room, and a whole database", next_step
        ) from None


def _open_database(path: Path, identity: str) -> sqlite3.Connection:
    database = _connect(path)
    if _identity(database) not in (None, identity):
        database.close()
        path.unlink()  # with its journal file: sqlite leaves none after a read
        shutil.rmtree(path.parent / "parts")
        (path.parent / "parts").mkdir()
        database = _connect(path)
    if _identity(database) is None:
        database.execute("BEGIN EXCLUSIVE")
        DuplicateIndex.create(database)
        database.execute("CREATE TABLE identity (value TEXT)")
        database.execute("INSERT INTO identity VALUES (?)", (identity,))
        database.execute(
            "CREATE TABLE parts (number INTEGER PRIMARY KEY, documents INTEGER, input_digest TEXT, report TEXT, "
            "digests TEXT)"
        )
        database.execute("COMMIT")
    return database


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    for setting in _SETTINGS:
        database.execute(f"PRAGMA {setting}")
    return database


def _identity(database: sqlite3.Connection) -> str | None:
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'identity'").fetchone():
        return None
    (value,) = database.execute("SELECT value FROM identity").fetchone()
    return str(value)


def _append(part: Path, whole: BinaryIO) -> str | None:
    """Copy a part, and return its sha256; None when it is missing."""
    digest = hashlib.sha256()
    try:
        with part.open("rb") as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
                whole.write(block)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make renames in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def progress_report(progress: Progress | None) -> dict[str, Any]:
    """The counts of finished parts; empty when there are none."""
    return {} if progress is None else dict(json.loads(progress.report))
