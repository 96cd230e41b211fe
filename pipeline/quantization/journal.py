"""What of a weight file is finished, so that a run that was killed goes on where it ended.

One JSON line a tensor, written after its bytes; the first line says what the file is made from. A line counts when
the bytes on disk still have its checksum, so neither a torn line nor a lost page of the disk's cache can deceive.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.quantization.weight_file import Place, write_at

_CHUNK_BYTES = 1 << 22


@dataclass(slots=True)
class Journal:
    """An open journal.

    Attributes:
        finished: What was noted of each tensor.
    """

    descriptor: int
    end_bytes: int
    finished: dict[str, dict[str, Any]]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, name: str, values: dict[str, Any]) -> None:
        """A tensor is on disk."""
        line = (json.dumps({"name": name, **values}, sort_keys=True) + "\n").encode()
        with self.lock:
            write_at(self.descriptor, line, self.end_bytes)
            self.end_bytes += len(line)
            self.finished[name] = values


@contextmanager
def open_journal(path: Path, identity: str) -> Iterator[Journal]:
    """The journal at ``path``, empty when there is none or when it tells of something else than ``identity``."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        first = (json.dumps({"made_from": identity}) + "\n").encode()
        content = _read_all(descriptor)
        if content.startswith(first):
            finished, end_bytes = _parse(content, len(first))
        else:
            finished, end_bytes = {}, len(first)
            os.ftruncate(descriptor, 0)
            write_at(descriptor, first, 0)
        os.ftruncate(descriptor, end_bytes)  # a line that was torn is written anew
        yield Journal(descriptor, end_bytes, finished)
    finally:
        os.close(descriptor)


def checksum(descriptor: int, places: list[Place]) -> list[int]:
    """CRC-32 of each array as it lies in the file."""
    sums = []
    for place in places:
        total, offset, end = 0, place.offset_bytes, place.offset_bytes + place.length_bytes
        while offset < end:
            content = os.pread(descriptor, min(_CHUNK_BYTES, end - offset), offset)
            if not content:
                break
            total, offset = zlib.crc32(content, total), offset + len(content)
        sums.append(total)
    return sums


def _read_all(descriptor: int) -> bytes:
    content = b""
    while piece := os.pread(descriptor, _CHUNK_BYTES, len(content)):
        content += piece
    return content


def _parse(content: bytes, start: int) -> tuple[dict[str, dict[str, Any]], int]:
    """The whole lines behind ``start``, and where they end."""
    finished: dict[str, dict[str, Any]] = {}
    while (end := content.find(b"\n", start) + 1) > 0:
        try:
            values = json.loads(content[start:end])
            finished[values.pop("name")] = values
        except (ValueError, KeyError, AttributeError):
            break
        start = end
    return finished, start
