"""What a device remembers of its federations, on its own disk, so that it may die at any moment.

    node_key  device_key.pem        who it is, to Flower and to the other devices
    speed.json  node.json  inbox    how fast it trains; its node at the SuperLink; the message it was answering
    federations/NAME/
      hello.json                    what the federation trains
      replies/PLAN_ID               the last few answers, to give again when asked again
      held.GROUP                    factors as the server last sent them
      residual.GROUP pending.GROUP  what encoding kept back; pending until the server says that it folded the reply
    set_aside/                      what was damaged

Every file is replaced in one step. A damaged one is moved to ``set_aside`` with one line in the log, and the device
goes on without it; the keys alone are never replaced silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.envelope import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Envelope,
    envelope_from_text,
    header_text,
    read_envelope,
)
from edge_runtime.formats.errors import MessageError, UserError
from edge_runtime.formats.files import write_atomically

KEPT_REPLIES = 4
KEPT_ASIDE = 8
MAX_VECTOR_BYTES = MAX_PAYLOAD_BYTES * 8  # four bits a value on the wire are 32 here
_MAX_JSON_BYTES = 64 << 10
_DIGEST = "sha256"

Vector = NDArray[np.float32]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Stored:
    """A vector (n,) and the words under which it was stored."""

    vector: Vector
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The state directory of one device. ``open_state`` makes it.

    Attributes:
        log: Told in one line what was set aside.
    """

    directory: Path
    log: Callable[[str], None]

    # Greetings -------------------------------------------------------------------------------------------------

    def save_greeting(self, federation: str, greeting: Envelope) -> None:
        """Remember what a federation trains."""
        self._write(self._of(federation) / "hello.json", header_text(greeting).encode("ascii"))

    def load_greeting(self, federation: str) -> Envelope | None:
        """The last greeting of a federation."""
        return self._read(
            self._of(federation) / "hello.json",
            MAX_HEADER_BYTES,
            lambda raw: envelope_from_text(raw.decode("ascii"), b""),
        )

    # Replies ---------------------------------------------------------------------------------------------------

    def save_reply(self, federation: str, plan_id: str, work: str, reply: Envelope) -> None:
        """Keep an answer; all but the last few are deleted.

        Args:
            federation: Whose plan it was.
            plan_id: Of the plan.
            work: Digest of everything that decided the answer: a plan of another work with this id is not answered
                with it.
            reply: The answer.
        """
        directory = self._of(federation) / "replies"
        raw = reply.to_bytes()
        self._write(directory / plan_id, hashlib.sha256(raw).digest() + bytes.fromhex(work) + raw)
        known = sorted(directory.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in known[:-KEPT_REPLIES]:
            path.unlink()

    def load_reply(self, federation: str, plan_id: str, work: str) -> Envelope | None:
        """The answer that was given for this work."""
        stored = self._read(
            self._of(federation) / "replies" / plan_id, 64 + MAX_HEADER_BYTES + MAX_PAYLOAD_BYTES + 64, _parse_reply
        )
        return stored[1] if stored is not None and stored[0] == work else None

    # Vectors: held factors, residuals --------------------------------------------------------------------------

    def save_vector(self, federation: str, name: str, vector: Vector, labels: Mapping[str, str]) -> None:
        """Store a vector as ``name`` (``held.a``, ``pending.b``)."""
        self._write(self._of(federation) / name, _pack_vector(vector, labels))

    def load_vector(self, federation: str, name: str, labels: Mapping[str, str]) -> Stored | None:
        """The vector of that name, if its labels agree with the given ones."""
        stored = self._read(self._of(federation) / name, MAX_VECTOR_BYTES, _parse_vector)
        agree = stored is not None and all(stored.labels.get(key) == value for key, value in labels.items())
        return stored if agree else None

    def promote_vector(self, federation: str, source: str, target: str) -> None:
        """Rename a stored vector over another."""
        os.replace(self._of(federation) / source, self._of(federation) / target)

    # Small things ----------------------------------------------------------------------------------------------

    def save_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Store a few numbers or names as ``name``."""
        self._write(self.directory / name, json.dumps(dict(values), sort_keys=True).encode("ascii"))

    def load_json(self, name: str) -> dict[str, Any]:
        """What was stored as ``name``; empty when nothing was."""
        return self._read(self.directory / name, _MAX_JSON_BYTES, _parse_object) or {}

    def save_bytes(self, name: str, content: bytes) -> None:
        """Store bytes, with their digest."""
        self._write(self.directory / name, hashlib.sha256(content).digest() + content)

    def load_bytes(self, name: str) -> bytes | None:
        """Bytes stored as ``name``."""
        return self._read(self.directory / name, 2 * MAX_PAYLOAD_BYTES, _parse_bytes)

    def forget(self, name: str) -> None:
        """Delete what was stored as ``name``."""
        (self.directory / name).unlink(missing_ok=True)

    # -----------------------------------------------------------------------------------------------------------

    def _of(self, federation: str) -> Path:
        return self.directory / "federations" / federation

    def _write(self, path: Path, content: bytes) -> None:
        write_atomically(path, content, mode=0o600)

    def _read(self, path: Path, most_bytes: int, parse: Callable[[bytes], Parsed]) -> Parsed | None:
        """What ``parse`` makes of a file; None when it is missing or was damaged and is now set aside."""
        try:
            with path.open("rb") as file:
                raw = file.read(most_bytes + 1)
            if len(raw) > most_bytes:
                raise ValueError(f"more than {most_bytes} bytes")
            return parse(raw)
        except FileNotFoundError:
            return None
        except (ValueError, MessageError) as error:
            self._set_aside(path, str(error))
            return None

    def _set_aside(self, path: Path, why: str) -> None:
        aside = self.directory / "set_aside"
        aside.mkdir(mode=0o700, exist_ok=True)
        kept = sorted(aside.iterdir(), key=lambda old: old.stat().st_mtime_ns)
        for old in kept[: max(len(kept) - KEPT_ASIDE + 1, 0)]:
            old.unlink()
        name = "-".join(path.relative_to(self.directory).parts)
        os.replace(path, aside / name)
        self.log(f"{path}: damaged ({why}); set aside as set_aside/{name}, going on without it")


@contextlib.contextmanager
def open_state(directory: Path, log: Callable[[str], None]) -> Iterator[DeviceState]:
    """Open, and if needed make, a state directory for one process alone.

    Raises:
        UserError: Another client runs with it, or it cannot be written.
    """
    import fcntl

    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock: IO[bytes] = (directory / "lock").open("ab")
    except OSError as error:
        raise UserError("--state", str(directory), f"a directory that can be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            next_step = "stop it, or name another directory"
            raise UserError("--state", str(directory), "a directory that no other client uses now", next_step) from None
        yield DeviceState(directory, log)


def _parse_reply(raw: bytes) -> tuple[str, Envelope]:
    digest, work, content = raw[:32], raw[32:64], memoryview(raw)[64:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its sha256 does not agree")
    position = 0

    def receive(size: int) -> bytes:
        nonlocal position
        position += size
        return bytes(content[position - size : position])

    return work.hex(), read_envelope(receive)


def _pack_vector(vector: Vector, labels: Mapping[str, str]) -> bytes:
    from safetensors.numpy import save

    values = np.ascontiguousarray(vector, np.float32)
    return save({"vector": values}, metadata=dict(labels) | {_DIGEST: _vector_digest(values, labels)})


def _parse_vector(raw: bytes) -> Stored:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        vector = load(raw)["vector"]
        labels = dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"no stored vector: {str(error)[:80]}") from error
    digest = labels.pop(_DIGEST, "")
    if vector.dtype != np.float32 or vector.ndim != 1 or digest != _vector_digest(vector, labels):
        raise ValueError("its sha256 does not agree")
    return Stored(vector, labels)


def _vector_digest(vector: Vector, labels: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(labels), sort_keys=True).encode())
    digest.update(vector.tobytes())
    return digest.hexdigest()


def _parse_object(raw: bytes) -> dict[str, Any]:
    values = json.loads(raw)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _parse_bytes(raw: bytes) -> bytes:
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        raise ValueError("its sha256 does not agree")
    return raw[32:]
