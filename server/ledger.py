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
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

LEDGER_FILE = "ledger.jsonl"
MAX_RECORD_BYTES = 1 << 20
MAX_READ_BYTES = 64 << 20
MAX_CHECKPOINT_BYTES = 8 << 30

_CHECKPOINT = re.compile(r"(\d{10})-([0-9a-f]{64})\.safetensors")
_METADATA_KEY = "sevenfold"  # one key only: safetensors writes several in random order

_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "|i1": "I8", "|u1": "U8", "|b1": "BOOL",
}  # fmt: skip

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
        arrays: By name; of float64, float32, float16, int64, int32, int8, uint8 or bool.
        meta: Plain JSON values.

    Returns:
        Its file.

    Raises:
        ValueError: ``round``, ``meta`` or an array's type cannot be written.
    """
    if not 0 <= round < 10**10:
        raise ValueError(f"round {round}")
    about = json.dumps({"round": round, "meta": dict(meta)}, sort_keys=True, allow_nan=False)
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".half-", dir=directory)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _write_tensors(file, arrays, {_METADATA_KEY: about})
            file.flush()
            os.fsync(file.fileno())
        path = directory / f"{round:010}-{digest}.safetensors"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(directory)
    _remove_overtaken(directory, path)
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


def _write_tensors(file: BinaryIO, arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> str:
    """Write safetensors without a second copy of the arrays in memory; the sha256 of what was written."""
    # Wide types first keeps every value aligned; the order of names makes equal states equal files.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, value in ordered:
        start, stop = stop, stop + value.nbytes
        if value.dtype.str not in _DTYPES:
            raise ValueError(f"{name}: {value.dtype} arrays are not kept")
        header[name] = {"dtype": _DTYPES[value.dtype.str], "shape": value.shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    pieces: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    for piece in (*pieces, *(np.asarray(value, order="C").data for _, value in ordered)):
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _remove_overtaken(directory: Path, newest: Path) -> None:
    """Everything but the newest checkpoint and the one before it, half-written files included."""
    older = [path for path in _checkpoints(directory) if _round(path) < _round(newest)]
    for path in directory.iterdir():
        if path not in (newest, *older[:1]):
            path.unlink()


def _read_checkpoint(path: Path) -> Checkpoint | None:
    """None when it is not what its name says."""
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size > MAX_CHECKPOINT_BYTES:
        return None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != path.name[11:75]:
            return None
    try:
        with safe_open(path, "np") as tensors:
            entry = json.loads((tensors.metadata() or {})[_METADATA_KEY])
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            return Checkpoint(entry["round"], arrays, entry["meta"])
    except (SafetensorError, ValueError, KeyError):
        return None
