"""Where stages read and write: paths, atomic outputs, fingerprints, locks, checkpoints."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from edge_runtime.formats.errors import UserError

if TYPE_CHECKING:
    from pipeline.settings import Config

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one run: the project itself for DVC, ``runs/<digest>/`` for overrides."""

    root: Path

    @property
    def corpus(self) -> Path:
        """Cleaned text: train.jsonl, held_out.jsonl."""
        return self.root / "artifacts" / "corpus"

    @property
    def teacher(self) -> Path:
        """Tokenizer, and the checkpoint or where it is (teacher.json)."""
        return self.root / "artifacts" / "teacher"

    @property
    def targets(self) -> Path:
        """Token sequences and the stored teacher signal."""
        return self.root / "artifacts" / "targets"

    def student(self, submodel: str) -> Path:
        """Hugging Face checkpoint of one student."""
        return self.root / "artifacts" / "students" / submodel

    def tokenizer(self, submodel: str) -> Path:
        """Folder of tokenizer.json and chat_template.jinja of a distilled submodel: its own or the teacher's.

        A submodel with a vocabulary of its own holds its tokenizer beside its weights, as checkpoints do.
        """
        student = self.student(submodel)
        return student if (student / "tokenizer.json").is_file() else self.teacher

    def sequences(self, submodel: str) -> Path:
        """Folder of train.npy and held_out*.npy in the ids of a distilled submodel: its own or the teacher's."""
        own = self.student(submodel) / "targets"
        return own if own.is_dir() else self.targets

    def weights(self, submodel: str) -> Path:
        """Codes and scales."""
        return self.root / "artifacts" / "weights" / submodel

    def exports(self, submodel: str) -> Path:
        """The package's files, not yet signed."""
        return self.root / "artifacts" / "exports" / submodel

    def evaluation(self, submodel: str) -> Path:
        """What was measured on the exported files."""
        return self.root / "artifacts" / "evaluations" / submodel

    def package(self, submodel: str) -> Path:
        """The signed package."""
        return self.root / "artifacts" / "packages" / submodel

    def adapters(self, submodel: str) -> Path:
        """Adapters that were champion of one submodel; ``champion`` links to the present one."""
        return self.root / "artifacts" / "adapters" / submodel

    @property
    def reports(self) -> Path:
        """family.json, index.html, cards/, metrics/."""
        return self.root / "reports"

    def metrics(self, stage: str, submodel: str | None = None) -> Path:
        """The metrics file of one stage."""
        name = f"{stage}-{submodel}" if submodel else stage
        return self.reports / "metrics" / f"{name}.json"

    def record(self, output: Path) -> Path:
        """What is known of a finished output."""
        return self.root / ".cache" / "records" / f"{output.relative_to(self.root).as_posix().replace('/', '-')}.json"

    def checkpoint(self, stage: str, fingerprint: str) -> Path:
        """Where unfinished work of a stage is kept: outside its outputs, which DVC deletes."""
        return self.root / ".cache" / "checkpoints" / f"{stage}-{fingerprint[:16]}"


Observer = Callable[[int, Mapping[str, float]], None]


def unwatched(_label: str) -> Observer | None:
    """Nobody looks on."""
    return None


@dataclass(frozen=True, slots=True)
class StageRun:
    """What one execution of a stage gets.

    Attributes:
        output: An empty folder; it takes the stage's place when the stage ends well.
        checkpoint: Where unfinished work may be kept; named after everything the result depends on.
        watch: Gives the observer of a training by its label, where somebody looks on while it goes on.
    """

    config: Config
    layout: Layout
    output: Path
    checkpoint: Path
    watch: Callable[[str], Observer | None] = unwatched

    @property
    def submodel(self) -> str:
        """Name of the submodel that this run is for."""
        return self.config.submodel.name


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block ends well."""
    partial = partial_directory(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def partial_directory(path: Path) -> Path:
    """Where ``atomic_directory`` makes a folder."""
    return path.with_name(path.name + ".partial")


def located(path: Path) -> Path:
    """Where a path of the configuration is: relative ones are looked for here first, then in the project."""
    path = path.expanduser()
    return (path if path.exists() else PROJECT / path).resolve()


def external_lines(path: Path | None) -> list[str]:
    """A user's file or folder as name, size and time of change of each file; none where there is nothing."""
    if path is None or not located(path).exists():
        return []
    root = located(path)
    if root.is_relative_to(PROJECT) and root.is_dir():
        return [tree_digest(root)]  # the same in every clone
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    return [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a temporary file beside ``path``, flush it to disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys sorted, so that equal values are equal bytes."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that an earlier stage wrote.

    Raises:
        UserError: The file is missing; the message names the stage to run.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("input", str(path), "a file that an earlier stage writes", "run python -m pipeline") from None


def fingerprint(*parts: Any, code: Iterable[Path] = (), inputs: Iterable[str] = ()) -> str:
    """Digest of settings, source files and the digests of input folders."""
    digest = hashlib.sha256(json.dumps([*parts, list(inputs)], sort_keys=True, default=str).encode())
    for path in code:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def write_record(layout: Layout, output: Path, digest: str, wall_s: float) -> None:
    """Note that ``output`` is finished, what it was made from, what it holds and how long it took.

    Records lie outside the outputs: a package holds nothing that its manifest does not list.
    """
    record = {"fingerprint": digest, "files": tree_digest(output), "state": _state(output), "wall_s": wall_s}
    write_json(layout.record(output), record)


def recorded_fingerprint(layout: Layout, output: Path) -> str | None:
    """Fingerprint of a finished output; None when it is missing or was changed by something else."""
    record = _current_record(layout, output)
    return None if record is None else str(record["fingerprint"])


def content_digest(layout: Layout, output: Path) -> str:
    """Digest of a folder's files, from its record when that is current."""
    record = _current_record(layout, output)
    return tree_digest(output) if record is None else str(record["files"])


def tree_digest(directory: Path) -> str:
    """Digest of every file below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(directory).as_posix()} {file_digest(path)}\n".encode())
    return digest.hexdigest()


def _current_record(layout: Layout, output: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(layout.record(output).read_text(encoding="utf-8"))
        return record if record["state"] == _state(output) else None
    except (OSError, ValueError, KeyError):
        return None


def _state(directory: Path) -> list[str]:
    """Name, size and time of change of every file: a cheap way to see that nobody touched them."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return [f"{p.relative_to(directory).as_posix()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """The same bytes under another name, of a link what it points to; copied where the disk has no such names."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


@contextmanager
def sole_writer(layout: Layout, stage: str, submodel: str | None) -> Iterator[None]:
    """Hold the lock of one output; the kernel frees it when the process dies.

    Raises:
        UserError: Another process writes this output now.
    """
    path = layout.root / ".cache" / "locks" / (f"{stage}-{submodel}.lock" if submodel else f"{stage}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("stage", stage, "one writer at a time", "wait for the other run, or end it") from None
        yield


def require_disk(path: Path, needed_bytes: int) -> None:
    """Refuse work that would fill the disk.

    Raises:
        UserError: Less is free than ``needed_bytes``.
    """
    existing = next(p for p in [path, *path.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        need, have = (f"{value / 1e9:.2f} GB" for value in (needed_bytes, free))
        raise UserError("free disk", have, f"at least {need} at {existing}", "free some space or run elsewhere")


@contextmanager
def room_on_disk(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Say in one line that a disk has become full, whichever write finds it out.

    Args:
        path: What is written.
        needed_bytes: All of it, where that is known.

    Raises:
        UserError: No room is left.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        allowed = "room for what is written there" if needed_bytes is None else f"at least {needed_bytes / 1e9:.2f} GB"
        raise UserError(
            "free disk", f"none left at {path}", allowed, "free some space and run it again: it goes on from here"
        ) from None


def _is_full(error: OSError | SafetensorError) -> bool:
    """Safetensors has the system's error as text only."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)
