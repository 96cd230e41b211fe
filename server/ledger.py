"""What survives a crash: a ledger of rounds, and checkpoints.

The ledger is append-only JSON lines, each on the disk before ``append`` returns; a line that a crash cut is
dropped. A checkpoint is one safetensors file that carries its own sha256 in its name, renamed into place when it
is durable; the one before it is removed only afterwards, so that there is always one to resume from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.files import write_atomically

LEDGER_FILE = "ledger.jsonl"
MAX_RECORD_BYTES = 1 << 20
MAX_READ_BYTES = 64 << 20
MAX_CHECKPOINT_BYTES = 8 << 30

_CHECKPOINT = re.compile(r"(\d{10})-([0-9a-f]{64})\.safetensors")
_METADATA_KEY = "sevenfold"  # one key only: safetensors writes several in random order

_log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """Where a federation stands after a round."""

    round: int
    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any]


class Ledger:
    """The lines of ``ledger.jsonl`` in a directory, which is made if needed; one process writes it.

    Opening it drops a last line that a crash cut.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEDGER_FILE
        directory.mkdir(parents=True, exist_ok=True)
        with self._open():
            pass
        _sync_directory(directory)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; it is on the disk when this returns.

        Raises:
            ValueError: Not plain JSON values (NaN is none), or longer than MAX_RECORD_BYTES.
        """
        line = json.dumps(dict(record), separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
        if len(line) > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {len(line)} bytes, at most {MAX_RECORD_BYTES} are allowed")
        with self._open() as handle:
            _write_all(handle, line)
            os.fsync(handle)

    def records(self, max_bytes: int = MAX_READ_BYTES) -> list[dict[str, Any]]:
        """The records in the last ``max_bytes`` of the ledger, oldest first."""
        return read_records(self.path, max_bytes)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """The file, its end repaired: also after an append of this process that the disk had no room for."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _drop_torn_line(handle)
            yield handle
        finally:
            os.close(handle)


def read_records(path: Path, max_bytes: int = MAX_READ_BYTES) -> list[dict[str, Any]]:
    """The whole lines in the last ``max_bytes`` of a ledger that another process may be writing.

    Lines that are no JSON object are left out and counted in the log. No file: no records.
    """
    try:
        with path.open("rb") as file:
            start = max(file.seek(0, os.SEEK_END) - max_bytes, 0)
            file.seek(max(start - 1, 0))
            tail = file.read(max_bytes + min(start, 1))
    except FileNotFoundError:
        return []
    lines = tail.split(b"\n")[1 if start else 0 : -1]
    parsed = [_parse(line) for line in lines]
    if damaged := parsed.count(None):
        _log.warning("%s: %d of %d lines are damaged and left out", path, damaged, len(lines))
    return [record for record in parsed if record is not None]


def save_checkpoint(directory: Path, round: int, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint; when this returns it is durable, and at most one older one is kept beside it.

    Checkpoints of this round and later ones, which a resumed federation overtakes, are removed.

    Args:
        directory: Made if needed; holds checkpoints only.
        round: The last committed one, from 0.
        arrays: By name.
        meta: Plain JSON values.

    Returns:
        Its file.

    Raises:
        ValueError: ``round`` or ``meta`` cannot be written.
    """
    from safetensors.numpy import save

    if not 0 <= round < 10**10:
        raise ValueError(f"round {round}")
    text = json.dumps({"round": round, "meta": dict(meta)}, sort_keys=True, allow_nan=False)
    content = save({name: np.asarray(value, order="C") for name, value in arrays.items()}, {_METADATA_KEY: text})
    path = directory / f"{round:010}-{hashlib.sha256(content).hexdigest()}.safetensors"
    write_atomically(path, content)
    _sync_directory(directory)
    older = [other for other in _checkpoints(directory) if _round(other) < round]
    for other in directory.iterdir():
        if other not in (path, *older[:1]):
            other.unlink()
    return path


def load_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when there is none at all.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    paths = _checkpoints(directory)
    for path in paths:
        checkpoint = _read_checkpoint(path)
        if checkpoint is not None:
            return checkpoint
        _log.warning("checkpoint %s is damaged; the one before it is used", path)
    if paths:
        raise UserError(
            "checkpoints", str(directory), "at least one whole checkpoint", "restore one, or start another federation"
        )
    return None


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


def _drop_torn_line(handle: int) -> None:
    """Cut everything after the last whole line; a lost block may also have left zeros in it."""
    size = os.fstat(handle).st_size
    tail = os.pread(handle, 2 * MAX_RECORD_BYTES, max(size - 2 * MAX_RECORD_BYTES, 0))
    kept = tail[: tail.rfind(b"\n") + 1]
    last = kept[kept.rfind(b"\n", 0, -1) + 1 :]
    if kept and _parse(last) is None:
        kept = kept[: len(kept) - len(last)]
    if len(kept) < len(tail):
        _log.warning("ledger: dropped %d bytes of a line that was not finished", len(tail) - len(kept))
        os.ftruncate(handle, size - len(tail) + len(kept))
        os.fsync(handle)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _sync_directory(directory: Path) -> None:
    """Make names in a directory durable, not only the files' bytes."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(directory: Path) -> list[Path]:
    """Newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_round(path), path.stat().st_mtime_ns), reverse=True)


def _round(path: Path) -> int:
    return int(path.name[:10])


def _read_checkpoint(path: Path) -> Checkpoint | None:
    """None when it is not what its name says."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if path.stat().st_size > MAX_CHECKPOINT_BYTES:
        return None
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.name[11:75]:
        return None
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        entry = json.loads(header["__metadata__"][_METADATA_KEY])
        arrays = load(content)
    except (SafetensorError, ValueError, KeyError):
        return None
    return Checkpoint(entry["round"], arrays, entry["meta"])
