"""Packages on disk: seal a directory, open one only after everything in it was verified.

    manifest.json  manifest.sig  tokenizer.json  chat_template.jinja  README.md  golden.json
    onnx/{model.onnx,model_lora.onnx,weights.bin}  tflite/model.tflite  tflite_legacy/model.tflite

Order of trust: the signature over the manifest's bytes, then the manifest's values, then each file's size and
digest. Nothing is parsed before the step that vouches for it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import PackageError, SignatureError
from edge_runtime.formats.files import write_atomically
from edge_runtime.formats.manifest import (
    MANIFEST_FILE,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    AdapterSlots,
    Container,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from edge_runtime.formats.signing import MAX_SIGNATURE_BYTES, TrustStore, sign, verify

CHAT_TEMPLATE_FILE = "chat_template.jinja"
GOLDEN_FILE = "golden.json"
MODEL_CARD_FILE = "README.md"

_CHUNK_BYTES = 1 << 20
# Windows has no O_NOFOLLOW; there the lstat of the listing is the only check against links.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Package:
    """A verified package.

    Attributes:
        digest: sha256 (hex) of the signed manifest; names these exact bytes.
        signer: Fingerprint of the key that signed it.
        available: Containers whose files are all here, in the manifest's order of names.
    """

    directory: Path
    manifest: Manifest
    digest: str
    signer: str
    available: tuple[str, ...]

    def path(self, relative: str) -> Path:
        """Where a verified file lies.

        Raises:
            PackageError: The manifest lists no such file, or its container is not on this device.
        """
        container = relative.split("/")[0] if "/" in relative else None
        if relative not in self.manifest.files or (container is not None and container not in self.available):
            raise PackageError(f"{self.directory / relative}: not a verified file of this package")
        return self.directory / relative

    def container_directory(self, name: str) -> Path:
        """The directory of one container.

        Raises:
            PackageError: The container is not on this device.
        """
        if name not in self.available:
            here = " ".join(self.available) or "none"
            raise PackageError(
                f"{self.directory}: container {name} is not here (here: {here}); get it from the package's maker"
            )
        return self.directory / name


def seal_package(
    directory: Path,
    *,
    name: str,
    version: str,
    counter: int,
    base_digest: str,
    decoder: DecoderSpec,
    bos: int | None,
    eos: Collection[int],
    containers: Mapping[str, AdapterSlots],
    licence: str,
    key: Ed25519PrivateKey,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Hash every file in ``directory``, then write the manifest and its signature.

    The same files and fields give the same bytes. The signature is written last: cut in between, the package
    does not open, and sealing again mends it. An earlier manifest and signature are replaced. The fields are
    those of ``Manifest``; ``containers`` maps each container's name to the adapters it takes, and its files are
    those below the directory of that name.

    Raises:
        PackageError: A link, a file that a package may not hold, or a field out of bounds.
    """
    directory = directory.resolve()
    files: dict[str, FileEntry] = {}
    for relative in sorted(set(_list_files(directory)) - {MANIFEST_FILE, SIGNATURE_FILE}):
        size_bytes, digest = _hash_file(directory / relative)
        files[relative] = FileEntry(size_bytes, digest)
    manifest = Manifest(
        name=name,
        version=version,
        counter=counter,
        base_digest=base_digest,
        decoder=decoder,
        bos=bos,
        eos=tuple(eos),
        containers={
            container: Container(tuple(path for path in files if path.startswith(f"{container}/")), slots)
            for container, slots in containers.items()
        },
        files=files,
        licence=licence,
        metrics=dict(metrics or {}),
    )
    raw = encode_manifest(manifest)
    write_atomically(directory / MANIFEST_FILE, raw)
    write_atomically(directory / SIGNATURE_FILE, sign(raw, key))
    return manifest


def open_package(directory: Path, trusted: TrustStore, containers: Collection[str] | None = None) -> Package:
    """Verify a package and return it.

    A container whose files are all absent is not available, which is no fault: a device takes only the
    containers it needs. What is verified here is read again later, by path, by the runtimes; the guarantee holds
    as long as nobody else can write into the directory. A writer with that access could also replace this
    program, so no defence is attempted: keep packages in a directory that only their owner may write.

    Args:
        directory: The package, or a link to it.
        trusted: Keys whose packages may be opened.
        containers: Verify and offer only these; others are neither hashed nor available. None: all that are here.

    Raises:
        SignatureError: No signature, a signer who is not trusted here, or a manifest changed after signing.
        PackageError: The manifest is not valid, a file is missing, changed, extra or a link, or a container is
            present in part.
    """
    # Resolved once: `directory` itself may be a link that an updater swaps while we read.
    directory = directory.resolve()
    raw, signature = _read_signed(directory)
    signer = verify(raw, signature, trusted, str(directory / MANIFEST_FILE))
    try:
        manifest = decode_manifest(raw)
    except PackageError as error:
        raise PackageError(f"{directory}: {error}") from error
    present = set(_list_files(directory)) - {MANIFEST_FILE, SIGNATURE_FILE}
    if extra := sorted(present - set(manifest.files)):
        raise PackageError(f"{directory / extra[0]}: not listed in the manifest; remove it or get the package again")
    available = _available_containers(directory, manifest, present)
    if containers is not None:
        available = tuple(name for name in available if name in containers)
    for relative, entry in manifest.files.items():
        if "/" not in relative or relative.split("/")[0] in available:
            _check_file(directory / relative, entry)
    return Package(directory, manifest, hashlib.sha256(raw).hexdigest(), signer, available)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a regular file that is not a link.

    Raises:
        PackageError: It is missing, a link, not a regular file, or longer than ``max_bytes``.
    """
    content = b"".join(_stream(path, max_bytes))
    if len(content) > max_bytes:
        raise PackageError(f"{path}: longer than {max_bytes} bytes; get the package again")
    return content


def _read_signed(directory: Path) -> tuple[bytes, bytes]:
    if not (directory / MANIFEST_FILE).exists():
        raise PackageError(f"{directory}: no package here ({MANIFEST_FILE} is missing); name a package's directory")
    if not (directory / SIGNATURE_FILE).exists():
        raise SignatureError(f"{directory / SIGNATURE_FILE}: missing, the package is unsigned; get a signed one")
    raw = read_bounded(directory / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    return raw, read_bounded(directory / SIGNATURE_FILE, MAX_SIGNATURE_BYTES)


def _list_files(directory: Path) -> Iterator[str]:
    """POSIX paths of the regular files below ``directory``; anything else is refused, unread.

    The walk stops early, so that a directory with a million entries costs nothing.
    """
    pending, seen = [directory], 0
    while pending:
        try:
            entries = sorted(os.scandir(pending.pop()), key=lambda entry: entry.name)
        except OSError as error:
            raise PackageError(f"{error.filename}: {error.strerror}; name a package's directory") from error
        for entry in entries:
            seen += 1
            if seen > 2 * MAX_FILES:
                raise PackageError(f"{directory}: more than {2 * MAX_FILES} entries; name a package's directory")
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise PackageError(f"{entry.path}: a link or device; a package holds plain files only")
            if entry.is_dir():
                pending.append(Path(entry.path))
            else:
                yield Path(entry.path).relative_to(directory).as_posix()


def _available_containers(directory: Path, manifest: Manifest, present: Collection[str]) -> tuple[str, ...]:
    available = []
    for name, container in manifest.containers.items():
        missing = [path for path in container.files if path not in present]
        if not missing:
            available.append(name)
        elif len(missing) < len(container.files):
            raise PackageError(
                f"{directory / missing[0]}: missing, container {name} is here in part; complete it or remove {name}/"
            )
    return tuple(available)


def _check_file(path: Path, entry: FileEntry) -> None:
    size_bytes, digest = _hash_file(path, entry.size_bytes)
    if size_bytes != entry.size_bytes:
        shown = f"more than {entry.size_bytes}" if size_bytes > entry.size_bytes else str(size_bytes)
        raise PackageError(f"{path}: has {shown} bytes, the manifest says {entry.size_bytes}; get the package again")
    if digest != entry.sha256:
        raise PackageError(f"{path}: damaged, its sha256 is not the manifest's; get the package again")


def _hash_file(path: Path, max_bytes: int | None = None) -> tuple[int, str]:
    """(size in bytes, sha256); reads at most one chunk beyond ``max_bytes``."""
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in _stream(path, max_bytes):
        digest.update(chunk)
        size_bytes += len(chunk)
    return size_bytes, digest.hexdigest()


def _stream(path: Path, max_bytes: int | None) -> Iterator[bytes]:
    try:
        handle = os.open(path, _READ_FLAGS)
        with os.fdopen(handle, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise PackageError(f"{path}: not a plain file; get the package again")
            read_bytes = 0
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
                read_bytes += len(chunk)
                if max_bytes is not None and read_bytes > max_bytes:
                    return
    except OSError as error:
        reason = "a link" if path.is_symlink() else error.strerror
        raise PackageError(f"{path}: {reason}; get the package again") from error
