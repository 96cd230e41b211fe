"""The manifest of a package: which bytes are signed, and what they say.

One manifest has exactly one byte string: JSON with sorted keys, two spaces of indent, ASCII only and a final
newline. Decoding accepts that form alone and checks every value, although it only ever sees bytes whose
signature was verified: a trusted key can still have signed a mistake. No clock, no timing and nothing measured
on one machine belongs here, so the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from edge_runtime.formats.decoder import PROJECTIONS, DecoderSpec
from edge_runtime.formats.errors import PackageError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
TOKENIZER_FILE = "tokenizer.json"

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILES = 1000
MAX_FILE_BYTES = 32 << 30
MAX_PACKAGE_BYTES = 64 << 30
MAX_DEPTH = 4
MAX_RANK = 1024

# Arrays, graphs, JSON and text. `.bin` holds the raw arrays of an ONNX graph; nothing here unpickles.
SUFFIXES = (".bin", ".gguf", ".jinja", ".json", ".md", ".onnx", ".safetensors", ".tflite", ".txt")
FOREIGN_CONTAINERS = ("gguf", "safetensors", "safetensors_linear")  # files for other runtimes: carried, never opened
# Names that Windows and FAT cards read as devices.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_CONTAINER = re.compile(r"[a-z][a-z0-9_]{0,31}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_METRIC = re.compile(r"[a-z][a-z0-9_.]{0,63}")
_MEASURED = re.compile(r"(_s|_ms|_w|rss_bytes)$")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file of the package must be, in bytes and by digest (sha256, hex)."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterSlots:
    """Which projections of a container take an adapter, and up to which rank (None: any)."""

    targets: tuple[str, ...] = ()
    max_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Container:
    """One runtime's files, all below the directory that bears the container's name."""

    files: tuple[str, ...]
    adapters: AdapterSlots = AdapterSlots()


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is signed about a package.

    Attributes:
        version: ``major.minor.patch``.
        counter: Grows with every release of ``name``; an updater refuses to go back.
        base_digest: sha256 (hex) of the weights that adapters are bound to.
        bos: Id put before a prompt, or None.
        eos: Ids that end a generation.
        containers: Container name (``onnx``) to its files.
        files: Every file except the manifest and its signature, by POSIX path relative to the package.
        metrics: Quality numbers that a second run reproduces.
    """

    name: str
    version: str
    counter: int
    base_digest: str
    decoder: DecoderSpec
    bos: int | None
    eos: tuple[int, ...]
    containers: Mapping[str, Container]
    files: Mapping[str, FileEntry]
    licence: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def encode_manifest(manifest: Manifest) -> bytes:
    """The one byte string of a manifest.

    Raises:
        PackageError: A value that ``decode_manifest`` would refuse.
    """
    raw = _to_bytes(manifest)
    decode_manifest(raw)
    return raw


def decode_manifest(raw: bytes) -> Manifest:
    """Read and check a manifest.

    Raises:
        PackageError: Not canonical JSON of this format, an unknown or missing key, or a value out of bounds.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        _refuse(f"has {len(raw)} bytes, at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        top = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as error:
        _refuse(f"is not ASCII JSON ({error})", error)
    if not isinstance(top, dict) or top.get("format") != FORMAT:
        found = top.get("format") if isinstance(top, dict) else top
        _refuse(f"has format {found!r}, this version reads {FORMAT}; update sevenfold or get an older package")
    manifest = _from_dict(top)
    # One comparison refuses every second spelling: repeated keys, other numbers, escapes, white space.
    if _to_bytes(manifest) != raw:
        _refuse("is not in canonical form (sorted keys, two spaces, ASCII, final newline); seal the package again")
    return manifest


def check_paths(paths: Iterable[str]) -> None:
    """Refuse paths that could leave the package or mean two things on some file system.

    Raises:
        PackageError: Absolute, with ``..``, a backslash, a hidden or reserved name, a suffix that is not data,
            too deep, or equal to another path up to letter case.
    """
    # Folded path -> spelling seen first. Directories are entered too: "Onnx/a" and "onnx/b" collide.
    directories: dict[str, str] = {}
    files: dict[str, str] = {}
    for path in paths:
        segments = path.split("/")
        if len(segments) > MAX_DEPTH or not all(_plain(segment) for segment in segments):
            _refuse(f"names the file {path!r}; plain relative paths are allowed, at most {MAX_DEPTH} levels deep")
        if not path.endswith(SUFFIXES) or path in (MANIFEST_FILE, SIGNATURE_FILE):
            _refuse(f"names the file {path!r}; allowed are files ending in {' '.join(SUFFIXES)}")
        parents = ["/".join(segments[:depth]) for depth in range(1, len(segments))]
        clash = files.get(path.lower()) or directories.get(path.lower())
        for parent in parents:
            seen = directories.setdefault(parent.lower(), parent)
            clash = clash or files.get(parent.lower()) or (seen if seen != parent else None)
        if clash is not None:
            _refuse(f"names {path!r} beside {clash!r}; some file systems cannot tell them apart")
        files[path.lower()] = path


def _plain(segment: str) -> bool:
    return bool(_SEGMENT.fullmatch(segment)) and not segment.endswith(".") and not _RESERVED.fullmatch(segment)


def _from_dict(top: dict[str, Any]) -> Manifest:
    keys = {"format", "name", "version", "counter", "base_digest", "decoder", "tokens", "containers", "files"}
    _expect_keys(top, keys | {"licence", "metrics"}, "the manifest")
    try:
        decoder = DecoderSpec.from_dict(_mapping(top["decoder"], "decoder"))
    except (TypeError, ValueError) as error:
        _refuse(f"describes no decoder: {error}", error)
    bos, eos = _tokens(_mapping(top["tokens"], "tokens"), decoder.vocab_size)
    files = _files(_mapping(top["files"], "files"))
    return Manifest(
        name=_text(top["name"], _NAME, "name"),
        version=_text(top["version"], _VERSION, "version"),
        counter=_integer(top["counter"], 0, 2**53, "counter"),
        base_digest=_text(top["base_digest"], _SHA256, "base_digest"),
        decoder=decoder,
        bos=bos,
        eos=eos,
        containers=_containers(_mapping(top["containers"], "containers"), files),
        files=files,
        licence=_text(top["licence"], re.compile(r"[ -~]{1,200}"), "licence"),
        metrics=_metrics(_mapping(top["metrics"], "metrics")),
    )


def _tokens(values: dict[str, Any], vocab_size: int) -> tuple[int | None, tuple[int, ...]]:
    _expect_keys(values, {"bos", "eos"}, "tokens")
    bos, eos = values["bos"], _list(values["eos"], 64, "tokens.eos")
    if bos is not None:
        _integer(bos, 0, vocab_size - 1, "tokens.bos")
    return bos, tuple(_integer(token, 0, vocab_size - 1, "tokens.eos") for token in eos)


def _files(values: dict[str, Any]) -> dict[str, FileEntry]:
    if len(values) > MAX_FILES:
        _refuse(f"lists {len(values)} files, at most {MAX_FILES} are allowed")
    check_paths(values)
    files: dict[str, FileEntry] = {}
    for path, entry in values.items():
        _expect_keys(_mapping(entry, path), {"size", "sha256"}, path)
        size = _integer(entry["size"], 0, MAX_FILE_BYTES, f"size of {path}")
        files[path] = FileEntry(size, _text(entry["sha256"], _SHA256, f"sha256 of {path}"))
    if sum(entry.size_bytes for entry in files.values()) > MAX_PACKAGE_BYTES:
        _refuse(f"adds up to more than {MAX_PACKAGE_BYTES} bytes of files")
    if TOKENIZER_FILE not in files:
        _refuse(f"lists no {TOKENIZER_FILE}")
    return files


def _containers(values: dict[str, Any], files: Mapping[str, FileEntry]) -> dict[str, Container]:
    containers: dict[str, Container] = {}
    for name, entry in values.items():
        _text(name, _CONTAINER, "container name")
        _expect_keys(_mapping(entry, name), {"files", "lora_targets", "lora_max_rank"}, name)
        listed = _list(entry["files"], MAX_FILES, f"{name}.files")
        below = sorted(path for path in files if path.startswith(f"{name}/"))
        if not below or listed != below:
            _refuse(f"gives container {name} the files {listed!r}, its directory holds {below!r}")
        targets = _list(entry["lora_targets"], len(PROJECTIONS), f"{name}.lora_targets")
        if any(target not in PROJECTIONS for target in targets) or len(set(targets)) != len(targets):
            _refuse(f"has {name}.lora_targets {targets!r}; allowed, each once: {' '.join(PROJECTIONS)}")
        max_rank = entry["lora_max_rank"]
        if max_rank is not None:
            _integer(max_rank, 1, MAX_RANK, f"{name}.lora_max_rank")
        containers[name] = Container(tuple(listed), AdapterSlots(tuple(targets), max_rank))
    for path in files:
        if "/" in path and path.split("/")[0] not in containers:
            _refuse(f"lists {path}, which belongs to no container")
    return containers


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    for name, value in values.items():
        _text(name, _METRIC, "name of a metric")
        if _MEASURED.search(name):
            _refuse(f"signs the metric {name}, which differs from run to run; keep it beside the package")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            _refuse(f"has the metric {name} = {value!r}; a finite number is allowed")
    return values


def _to_bytes(manifest: Manifest) -> bytes:
    containers = {
        name: {
            "files": list(entry.files),
            "lora_targets": list(entry.adapters.targets),
            "lora_max_rank": entry.adapters.max_rank,
        }
        for name, entry in manifest.containers.items()
    }
    top = {
        "format": FORMAT,
        "name": manifest.name,
        "version": manifest.version,
        "counter": manifest.counter,
        "base_digest": manifest.base_digest,
        "decoder": manifest.decoder.to_dict(),
        "tokens": {"bos": manifest.bos, "eos": list(manifest.eos)},
        "containers": containers,
        "files": {path: {"size": entry.size_bytes, "sha256": entry.sha256} for path, entry in manifest.files.items()},
        "licence": manifest.licence,
        "metrics": dict(manifest.metrics),
    }
    try:
        return (json.dumps(top, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")
    except (TypeError, ValueError) as error:
        _refuse(f"holds a value that JSON cannot carry ({error})", error)


def _expect_keys(values: Mapping[str, Any], keys: set[str], where: str) -> None:
    if set(values) != keys:
        _refuse(f"has unknown or missing keys in {where}: {' '.join(sorted(set(values) ^ keys))}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"has {where} = {value!r}; an object is allowed")
    return value


def _list(value: Any, most: int, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str | int) for item in value):
        _refuse(f"has {where} = {value!r}; a list of at most {most} entries is allowed")
    return value


def _text(value: Any, pattern: re.Pattern[str], where: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        _refuse(f"has {where} = {value!r}; allowed: {pattern.pattern}")
    return value


def _integer(value: Any, least: int, most: int, where: str) -> int:
    if type(value) is not int or not least <= value <= most:
        _refuse(f"has {where} = {value!r}; an integer from {least} to {most} is allowed")
    return value


def _refuse(fault: str, cause: BaseException | None = None) -> NoReturn:
    raise PackageError(f"{MANIFEST_FILE} {fault}") from cause
