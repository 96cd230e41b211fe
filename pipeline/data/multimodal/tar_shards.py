"""Samples in tar shards as webdataset reads them: ``KEY.jpg``, ``KEY.json``, ``KEY.txt`` one after another.

The bytes are a function of the samples alone: no clock, no owner. A shard grows under a temporary name and
is renamed when it is full, so that whatever bears its final name is whole.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from edge_runtime.formats.errors import UserError

_BLOCK_BYTES = tarfile.BLOCKSIZE
_END_BYTES = 2 * _BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class ShardPlace:
    """How far a writer has come: enough to go on after a crash."""

    shard: int = 0
    samples: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class ShardWriter:
    """Appends samples to ``PREFIX-000000.tar``, ``PREFIX-000001.tar`` and so on in one folder.

    Attributes:
        max_bytes: A shard never grows beyond this, unless a single sample does.
        place: Shard being written, samples and bytes in it.
    """

    folder: Path
    prefix: str
    max_bytes: int
    place: ShardPlace = field(default_factory=ShardPlace)
    _file: BinaryIO | None = None

    def resume(self, place: ShardPlace) -> None:
        """Go on at ``place``: what was written behind it is cut off, later shards are removed.

        Raises:
            UserError: The folder lacks what it held then.
        """
        self.close()
        self.place = place
        current, partial = self._path(place.shard), self._partial(place.shard)
        if current.exists():  # it was finished after the place was noted
            current.replace(partial)
        for path in self.folder.glob(f"{self.prefix}-*.tar*"):
            if path.name[len(self.prefix) + 1 :].split(".")[0] > f"{place.shard:06d}":
                path.unlink()
        whole = [self._path(shard).is_file() for shard in range(place.shard)]
        size_bytes = partial.stat().st_size if partial.exists() else 0
        if not all(whole) or size_bytes < place.size_bytes:
            raise UserError("checkpoint", str(self.folder), "the shards that it had", "remove it and start again")
        if partial.exists():
            os.truncate(partial, place.size_bytes)

    def append(self, key: str, members: Mapping[str, bytes]) -> None:
        """Write one sample: suffix without a dot to content, in the order given."""
        blocks = b"".join(_member(f"{key}.{suffix}", content) for suffix, content in members.items())
        if self.place.samples and self.place.size_bytes + len(blocks) + _END_BYTES > self.max_bytes:
            self.finish()
        if self._file is None:
            self._file = self._partial(self.place.shard).open("ab")
        self._file.write(blocks)
        place = self.place
        self.place = ShardPlace(place.shard, place.samples + 1, place.size_bytes + len(blocks))

    def flush(self) -> ShardPlace:
        """Bring everything to the disk and return where a later run can go on."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self.place

    def finish(self) -> None:
        """End the present shard and give it its name; nothing if it is empty."""
        if not self.place.samples:
            return
        path = self._partial(self.place.shard)
        file = self._file if self._file is not None else path.open("ab")
        file.write(bytes(_END_BYTES))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        path.replace(self._path(self.place.shard))
        self.place = ShardPlace(self.place.shard + 1)

    def close(self) -> None:
        """Let go of the open file; what it holds stays under its temporary name."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.prefix}-{shard:06d}.tar"

    def _partial(self, shard: int) -> Path:
        return self.folder / f"{self.prefix}-{shard:06d}.tar.partial"


def _member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)  # mtime 0, uid 0, no names, mode 644
    header.size = len(content)
    padding = -len(content) % _BLOCK_BYTES
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(padding)
