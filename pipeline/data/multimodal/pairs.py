"""Rows that name a picture or a sound and its text; files opened so that no path leaves the folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from edge_runtime.formats.errors import UserError

MEDIA = ("image", "audio")
_ROW_MAX_BYTES = 1 << 20  # of one JSON line
_PARQUET_ROWS = 256
_PATH_MAX_CHARS = 1024


class PairDrop(StrEnum):
    """Why a pair is dropped; what the text rules say is ``caption_`` and their own reason."""

    BAD_ROW = "bad_row"
    DUPLICATE_KEY = "duplicate_key"
    PATH_OUTSIDE = "path_outside"
    SYMLINK = "symlink"
    MISSING_FILE = "missing_file"
    NOT_A_FILE = "not_a_file"
    UNREADABLE_FILE = "unreadable_file"
    FILE_TOO_LARGE = "file_too_large"
    UNSUPPORTED_FORMAT = "unsupported_format"
    UNDECODABLE = "undecodable"
    DECODER_CRASHED = "decoder_crashed"
    METADATA_TOO_LARGE = "metadata_too_large"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_SCANS = "too_many_scans"
    ANIMATED = "animated"
    COLOUR_PROFILE = "colour_profile"
    TOO_SMALL = "too_small"
    EXTREME_ASPECT = "extreme_aspect"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    TOO_MANY_SAMPLES = "too_many_samples"
    SAMPLE_RATE = "sample_rate"
    HEADER_LIES = "header_lies"
    NOT_FINITE = "not_finite"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    SILENT = "silent"
    CLIPPED = "clipped"
    PERSONAL_DATA = "caption_personal_data"


@dataclass(frozen=True, slots=True)
class Refused:
    """A pair that is dropped; ``reason`` is a PairDrop, or ``caption_`` and a reason of the text rules."""

    reason: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One row.

    Attributes:
        number: Its place among all rows of the source, from 0; the order decides which of two duplicates is kept.
        origin: File and row, for reports.
        medium: ``image`` or ``audio``.
        path: Of the medium, as the row says it, not checked yet.
        text: Caption or transcript, not cleaned yet.
        key: The row's own name for itself, or None.
    """

    number: int
    origin: str
    medium: Literal["image", "audio"]
    path: str
    text: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no pair."""

    number: int
    origin: str


def pair_files(source: Path) -> list[Path]:
    """The .jsonl and .parquet files directly in ``source``, in the order that they are read.

    Raises:
        UserError: It is no folder or has none.
    """
    if not source.is_dir():
        raise UserError("data.path", str(source), "a folder with .jsonl or .parquet files and media", "check the path")
    files = sorted(path for path in source.iterdir() if path.suffix in (".jsonl", ".parquet") and path.is_file())
    if not files:
        raise UserError(
            "data.path", str(source), ".jsonl or .parquet files with image or audio, and text", "write one such file"
        )
    return files


def read_pairs(source: Path) -> Iterator[Pair | BadRow]:
    """Yield every row of a folder's lists: ``{"image" or "audio": relative path, "text": str, "key": optional}``.

    Raises:
        UserError: There is no list, a parquet file cannot be read, or it lacks the columns.
    """
    number = 0
    for file in pair_files(source):
        rows = _read_jsonl(file) if file.suffix == ".jsonl" else _read_parquet(file)
        for row_number, row in enumerate(rows, 1):
            yield _pair(number, f"{file.name}:{row_number}", row)
            number += 1


def read_inside(root: Path, path: str, max_bytes: int) -> bytes | Refused:
    """A regular file's bytes, if its path stays inside ``root``.

    Each component is opened from its parent's descriptor without following links, so that nothing
    can be swapped between the check and the read. Links are refused wherever they point.

    Args:
        root: The folder of the source.
        path: Relative, ``/`` between components.
        max_bytes: Larger files are refused before a byte is read.
    """
    components = path.split("/")
    outside = path.startswith("/") or ".." in components or "\0" in path or len(path) > _PATH_MAX_CHARS
    if outside or not all(components):
        return Refused(PairDrop.PATH_OUTSIDE)
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for component in components[:-1]:
                child = os.open(component, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = child
            return _read_entry(folder, components[-1], max_bytes)
        finally:
            os.close(folder)
    except OSError as error:
        return Refused(_open_reason(error, root, components))
    except ValueError:  # half a surrogate in a name
        return Refused(PairDrop.MISSING_FILE)


def _read_entry(folder: int, name: str, max_bytes: int) -> bytes | Refused:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(found.st_mode):
        return Refused(PairDrop.SYMLINK)
    if not stat.S_ISREG(found.st_mode):  # before opening: opening a device or a pipe can do something
        return Refused(PairDrop.NOT_A_FILE)
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(handle, "rb") as file:
        opened = os.fstat(handle)
        if not stat.S_ISREG(opened.st_mode):
            return Refused(PairDrop.NOT_A_FILE)
        if opened.st_size > max_bytes:
            return Refused(PairDrop.FILE_TOO_LARGE)
        content = file.read(max_bytes + 1)
        return content if len(content) <= max_bytes else Refused(PairDrop.FILE_TOO_LARGE)


def _open_reason(error: OSError, root: Path, components: list[str]) -> PairDrop:
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
        return PairDrop.MISSING_FILE
    if error.errno == errno.ELOOP:
        return PairDrop.SYMLINK
    if error.errno == errno.ENOTDIR:  # Linux answers so for a link where a folder must be
        folders = (root.joinpath(*components[:depth]) for depth in range(1, len(components)))
        return PairDrop.SYMLINK if any(folder.is_symlink() for folder in folders) else PairDrop.MISSING_FILE
    return PairDrop.UNREADABLE_FILE


def _pair(number: int, origin: str, row: Any) -> Pair | BadRow:
    if not isinstance(row, dict):
        return BadRow(number, origin)
    named = [medium for medium in MEDIA if row.get(medium) is not None]
    text, key = row.get("text"), row.get("key")
    if len(named) != 1 or not isinstance(row[named[0]], str) or not isinstance(text, str):
        return BadRow(number, origin)
    if key is not None and not isinstance(key, str | int):
        return BadRow(number, origin)
    medium: Literal["image", "audio"] = "image" if named[0] == "image" else "audio"
    return Pair(number, origin, medium, row[medium], text, None if key is None else str(key))


def _read_jsonl(file: Path) -> Iterator[Any]:
    """One value a line; None for a line that is no JSON or too long."""
    with file.open("rb") as lines:
        while line := lines.readline(_ROW_MAX_BYTES):
            if len(line) == _ROW_MAX_BYTES and not line.endswith(b"\n"):
                while (rest := lines.readline(_ROW_MAX_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield None
            elif line.strip():
                try:
                    yield json.loads(line.decode())
                except (ValueError, RecursionError):
                    yield None


def _read_parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(file)
        found = [name for name in (*MEDIA, "text", "key") if name in table.schema_arrow.names]
        if "text" not in found or not set(found) & set(MEDIA):
            names = ", ".join(table.schema_arrow.names)[:200]
            raise UserError(f"data.path {file.name}", names, "columns image or audio, and text", "rename its columns")
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=found):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError("data.path", str(file), f"a whole parquet file ({message})", "write it again") from None
