"""A device's own text: a directory of .txt and .jsonl files that never leave it.

Text is cut into passages of about a thousand characters. A passage whose sha256 is divisible by ten is held out: it
measures and is never trained on, wherever else it may turn up. The rest is laid end to end and cut into sequences.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

SUFFIXES = (".txt", ".jsonl")
HELD_OUT_OF = 10
PASSAGE_CHARACTERS = 1024
LONGEST_LINE_CHARACTERS = 8192
_DAY_S = 86400.0

Batch = tuple[NDArray[np.int32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Retention:
    """How long text is kept on the device; None: for ever. What goes beyond is DELETED, oldest first.

    Attributes:
        days: By the time of a file's last change.
        keep_bytes: Of all .txt and .jsonl files together.
    """

    days: float | None = None
    keep_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size_bytes: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class _Stream:
    """Token ids end to end; ``counts`` is 1 where the next id continues the same passage."""

    ids: NDArray[np.int32]
    counts: NDArray[np.uint8]

    def rows(self, tokens: int) -> int:
        """Sequences of that length, the last one perhaps padded; a last one of a single token predicts nothing."""
        whole, rest = divmod(self.ids.size, tokens)
        return whole + (1 if rest >= 2 else 0)

    def take(self, rows: Sequence[int], tokens: int) -> Batch:
        """The given sequences, (B, T) ids and mask."""
        ids, mask = np.zeros((len(rows), tokens), np.int32), np.zeros((len(rows), tokens), np.float32)
        for place, row in enumerate(rows):
            part = slice(row * tokens, min((row + 1) * tokens, self.ids.size))
            ids[place, : part.stop - part.start] = self.ids[part]
            mask[place, : part.stop - part.start] = self.counts[part]
            mask[place, part.stop - part.start - 1] = 0  # what follows is in another sequence
        return ids, mask


@dataclass(slots=True)
class LocalData:
    """The sequences of one directory.

    Attributes:
        directory: Looked at without its subdirectories; links are ignored.
        encode: Text to ids, without special tokens.
        bos: Id that begins a document, or None.
        eos: Id that ends one, or None.
        most_bytes: Most text that is held as tokens; the newest files are taken.
        now: Seconds since 1970, as files have them.
        log: Takes one line an event.
    """

    directory: Path
    encode: Callable[[str], Sequence[int]]
    bos: int | None
    eos: int | None
    most_bytes: int
    retention: Retention
    now: Callable[[], float]
    log: Callable[[str], None]
    _seen: tuple[_File, ...] | None = field(default=None, init=False)
    _training: _Stream = field(default_factory=lambda: _join([]), init=False)
    _held_out: _Stream = field(default_factory=lambda: _join([]), init=False)

    def refresh(self) -> None:
        """Delete what is past its time, and read again if anything changed.

        Raises:
            UserError: The directory cannot be read.
        """
        try:
            files = self._retain(_list_files(self.directory))
        except OSError as error:
            raise UserError(
                "--data", str(self.directory), f"a directory of .txt and .jsonl ({error.strerror})"
            ) from error
        if self._seen != files:
            self._read(files)
            self._seen = files

    def count(self, tokens: int) -> int:
        """Training sequences of that length."""
        return self._training.rows(tokens)

    def batches(self, tokens: int, sequences: int, seed: int) -> Iterator[Batch]:
        """Training batches without end, (B, T) ids and mask; every sequence once before any comes again.

        Args:
            tokens: Length of a sequence.
            sequences: Of a batch; fewer when there are fewer in all.
            seed: Of the order.
        """
        count = self.count(tokens)
        size, pending, epoch = min(sequences, count), np.empty(0, np.int64), 0
        while count:
            while pending.size < size:
                # Raw words of PCG64 are the same in every version of NumPy, its permutations are not.
                order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")
                pending, epoch = np.concatenate([pending, order]), epoch + 1
            yield self._training.take(pending[:size].tolist(), tokens)
            pending = pending[size:]

    def held_out(self, tokens: int, most_sequences: int, sequences: int) -> Iterator[Batch]:
        """Batches of the first ``most_sequences`` held-out sequences; none when nothing is held out."""
        rows = range(min(self._held_out.rows(tokens), most_sequences))
        for start in range(0, len(rows), sequences):
            yield self._held_out.take(rows[start : start + sequences], tokens)

    def _retain(self, files: list[_File]) -> tuple[_File, ...]:
        """The files that stay, by name; the others are deleted, oldest first."""
        oldest_first = sorted(files, key=lambda file: (file.modified_s, file.path.name))
        total_bytes = sum(file.size_bytes for file in files)
        kept = []
        for file in oldest_first:
            age_days = (self.now() - file.modified_s) / _DAY_S
            too_old = self.retention.days is not None and age_days > self.retention.days
            too_much = self.retention.keep_bytes is not None and total_bytes > self.retention.keep_bytes
            if too_old or too_much:
                file.path.unlink(missing_ok=True)
                total_bytes -= file.size_bytes
                limit = (
                    f"older than {self.retention.days:g} days" if too_old else f"over {self.retention.keep_bytes} bytes"
                )
                self.log(f"{file.path}: deleted ({limit}, last changed {age_days:.1f} days ago)")
            else:
                kept.append(file)
        return tuple(sorted(kept, key=lambda file: file.path.name))

    def _read(self, files: Sequence[_File]) -> None:
        taken = self._newest(files)
        training: list[NDArray[np.int32]] = []
        held_out: list[NDArray[np.int32]] = []
        for file in files:
            for document in _documents(file.path, taken.get(file.path, 0), self.log):
                passages = list(_passages(document))
                for index, passage in enumerate(passages):
                    ids = self._ids(passage, first=index == 0, last=index == len(passages) - 1)
                    digest = hashlib.sha256(passage.encode("utf-8", "surrogatepass")).digest()
                    chosen = held_out if int.from_bytes(digest, "big") % HELD_OUT_OF == 0 else training
                    chosen.append(ids)
        self._training, self._held_out = _join(training), _join(held_out)
        sizes = f"{self._training.ids.size} tokens to train on, {self._held_out.ids.size} held out"
        self.log(f"{self.directory}: {len(files)} files, {sizes}")

    def _newest(self, files: Sequence[_File]) -> dict[Path, int]:
        """Bytes to read of each file, the newest first, ``most_bytes`` in all."""
        left_bytes, taken = self.most_bytes, {}
        for file in sorted(files, key=lambda file: (-file.modified_s, file.path.name)):
            taken[file.path] = min(file.size_bytes, left_bytes)
            left_bytes -= taken[file.path]
        if left_bytes == 0 and (cut := sum(file.size_bytes for file in files) - self.most_bytes):
            self.log(f"{self.directory}: {cut} bytes of the oldest text are left out, {self.most_bytes} are read")
        return taken

    def _ids(self, passage: str, *, first: bool, last: bool) -> NDArray[np.int32]:
        begin = [self.bos] if first and self.bos is not None else []
        end = [self.eos] if last and self.eos is not None else []
        return np.asarray([*begin, *self.encode(passage), *end], np.int32)


def _join(passages: Sequence[NDArray[np.int32]]) -> _Stream:
    passages = [ids for ids in passages if ids.size]
    if not passages:
        return _Stream(np.empty(0, np.int32), np.empty(0, np.uint8))
    ids = np.concatenate(passages)
    counts = np.ones(ids.size, np.uint8)
    counts[np.cumsum([passage.size for passage in passages]) - 1] = 0
    return _Stream(ids, counts)


def _list_files(directory: Path) -> list[_File]:
    files = []
    for path in directory.iterdir():
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            found = path.lstat()
        except FileNotFoundError:  # deleted meanwhile
            continue
        if stat.S_ISREG(found.st_mode):
            files.append(_File(path, found.st_size, found.st_mtime))
    return files


def _documents(path: Path, most_bytes: int, log: Callable[[str], None]) -> Iterator[str]:
    """The documents of a file's first ``most_bytes``: a .txt is one, a line of a .jsonl is one (``{"text": ...}``)."""
    try:
        with path.open("rb") as file:
            raw = file.read(most_bytes)
    except OSError as error:
        log(f"{path}: {error.strerror}; left out")
        return
    if path.suffix == ".txt":
        yield raw.decode("utf-8", "replace")
        return
    skipped = 0
    for line in raw.splitlines():
        try:
            text = json.loads(line)["text"] if line.strip() else ""
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if isinstance(text, str):
            yield text
        else:
            skipped += 1
    if skipped:
        log(f'{path}: {skipped} lines are not {{"text": "..."}}; left out')


def _passages(document: str) -> Iterator[str]:
    """Whole lines of about ``PASSAGE_CHARACTERS`` together; a line that is far longer is cut."""
    pieces: list[str] = []
    length = 0
    for line in document.splitlines(keepends=True):
        for start in range(0, len(line), LONGEST_LINE_CHARACTERS):
            pieces.append(line[start : start + LONGEST_LINE_CHARACTERS])
            length += len(pieces[-1])
            if length >= PASSAGE_CHARACTERS:
                yield "".join(pieces)
                pieces, length = [], 0
    if length:
        yield "".join(pieces)
