"""The form of every federated message, and how fields from another machine are checked before use.

An envelope is a kind, a small header of plain JSON values and an opaque payload. Message classes are frozen
dataclasses whose fields each name their check; reading refuses unknown and missing keys, wrong types, and values
out of range. There is no path, no code and no pickle in any message.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from edge_runtime.formats.errors import MessageError

MAX_HEADER_BYTES = 256 << 10
MAX_PAYLOAD_BYTES = 512 << 20
MAX_DEPTH = 16  # lists and objects within each other

_MAGIC = b"S7M1"
_HEAD = struct.Struct("<4sIQ")  # magic, header bytes, payload bytes

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxlist, _REPR.maxdict = 2, 40, 40, 4, 4


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message.

    Attributes:
        kind: Which dataclass reads the header (``plan``).
        header: Plain JSON values.
        payload: Opaque.
    """

    kind: str
    header: Mapping[str, Any]
    payload: bytes = b""

    def to_bytes(self) -> bytes:
        """As it goes over a local socket; Flower carries the three fields itself."""
        header = header_text(self).encode("ascii")
        return _HEAD.pack(_MAGIC, len(header), len(self.payload)) + header + self.payload


def header_text(envelope: Envelope) -> str:
    """Kind and header as one line of canonical ASCII JSON."""
    return json.dumps([envelope.kind, dict(envelope.header)], sort_keys=True, separators=(",", ":"), allow_nan=False)


def envelope_from_text(text: str, payload: bytes) -> Envelope:
    """Inverse of ``header_text``, which takes whatever this returns.

    Raises:
        MessageError: Too long, or not of this form.
    """
    if len(text) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"message: {len(text)} + {len(payload)} bytes are more than allowed")
    try:
        top = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"message: the header is not JSON ({str(error)[:80]})") from error
    if not (isinstance(top, list) and len(top) == 2 and isinstance(top[0], str) and isinstance(top[1], dict)):
        raise MessageError("message: the header is not a kind and its fields")
    if not _can_be_written(top, MAX_DEPTH):
        raise MessageError("message: the header is nested too deeply, or holds a number that is not finite")
    return Envelope(top[0], top[1], payload)


def read_envelope(receive: Callable[[int], bytes]) -> Envelope:
    """Read one envelope from a stream.

    Args:
        receive: Returns exactly so many bytes, or raises.

    Raises:
        MessageError: Not an envelope, or larger than allowed; nothing beyond the first 16 bytes was read then.
    """
    head = receive(_HEAD.size)
    if len(head) != _HEAD.size:
        raise MessageError("message: it is cut")
    magic, header_bytes, payload_bytes = _HEAD.unpack(head)
    if magic != _MAGIC or header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise MessageError("message: not of this protocol, or too long")
    try:
        text = receive(header_bytes).decode("ascii")
    except UnicodeDecodeError as error:
        raise MessageError("message: the header is not ASCII") from error
    return envelope_from_text(text, receive(payload_bytes))


Check = Callable[[Any], Any]
Record = TypeVar("Record")


def checked(check: Check) -> Any:
    """A dataclass field whose value from the other side must pass ``check``."""
    return field(metadata={"check": check})


def integer(low: int, high: int) -> Check:
    """A whole number in [low, high]."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float) -> Check:
    """A finite number in [low, high]."""

    def check(value: Any) -> float:
        # The range first: isfinite raises for an integer beyond float64.
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def text(pattern: str) -> Check:
    """A string that the pattern matches whole; give the length in the pattern."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: Any) -> str:
        if not isinstance(value, str) or compiled.fullmatch(value) is None:
            raise ValueError(f"text like {pattern}")
        return value

    return check


def choice(options: type[Enum]) -> Check:
    """The value of an enumeration's member, a string."""

    def check(value: Any) -> Enum:
        try:
            # Anything else would be shown in the enumeration's own error, however deeply it is nested.
            return options(value if isinstance(value, str) else "")
        except ValueError:
            raise ValueError(f"one of {' '.join(str(member.value) for member in options)}") from None

    return check


def optional(inner: Check) -> Check:
    """Null, or what ``inner`` allows."""
    return lambda value: None if value is None else inner(value)


def listing(inner: Check, longest: int) -> Check:
    """A list of at most ``longest`` values, as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > longest:
            raise ValueError(f"a list of at most {longest}")
        return tuple(inner(item) for item in value)

    return check


def boolean(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def record(cls: type[Record]) -> Check:
    """An object with exactly the fields of a dataclass."""
    return lambda value: read_fields(cls, value)


def read_fields(cls: type[Record], values: object) -> Record:
    """Build a message dataclass from plain JSON values.

    Raises:
        ValueError: A key is missing or unknown, or a value is not allowed; the text names it.
    """
    expected = {entry.name: entry for entry in fields(cls) if "check" in entry.metadata}  # type: ignore[arg-type]
    if not isinstance(values, Mapping) or set(values) != set(expected):
        odd = set(values) ^ set(expected) if isinstance(values, Mapping) else ()
        raise ValueError(f"exactly the fields {' '.join(expected)} (odd: {_shown(sorted(map(str, odd)))})")
    loaded = {}
    for name, entry in expected.items():
        try:
            loaded[name] = entry.metadata["check"](values[name])
        except ValueError as error:
            raise ValueError(f"{name}: got {_shown(values[name])}, allowed: {error}") from error
    return cls(**loaded)


def write_fields(message: object) -> dict[str, Any]:
    """The plain JSON values of a message dataclass."""
    return {e.name: _plain(getattr(message, e.name)) for e in fields(message) if "check" in e.metadata}  # type: ignore[arg-type]


def seal(message: object, payload: bytes = b"") -> Envelope:
    """Put a message dataclass into an envelope; its kind is the class's name in lower case."""
    return Envelope(type(message).__name__.lower(), write_fields(message), payload)


def unseal(envelope: Envelope, cls: type[Record]) -> Record:
    """Take a message dataclass out of an envelope.

    Raises:
        MessageError: Another kind, or a field that is not allowed.
    """
    kind = cls.__name__.lower()
    if envelope.kind != kind:
        raise MessageError(f"message: got {_shown(envelope.kind)}, expected {kind!r}")
    try:
        return read_fields(cls, envelope.header)
    except ValueError as error:
        raise MessageError(f"{kind}: {error}") from error


def sha256(payload: bytes) -> str:
    """Hex digest, as headers state it."""
    return hashlib.sha256(payload).hexdigest()


def check_payload(envelope: Envelope, digest: str) -> bytes:
    """The payload, when it is what the header says.

    Raises:
        MessageError: It is not.
    """
    if sha256(envelope.payload) != digest:
        raise MessageError(f"{envelope.kind}: the payload's sha256 is not the header's")
    return envelope.payload


def _can_be_written(value: object, levels: int) -> bool:
    """Whether ``header_text`` takes a value that ``json`` has read: Python's reader takes NaN, and 1e999."""
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_can_be_written(item, levels - 1) for item in inner)
    return not isinstance(value, float) or math.isfinite(value)


def _shown(value: object) -> str:
    """A value from the other side for one line of a log: short, ASCII, and safe however deeply it is nested."""
    return _REPR.repr(value).encode("ascii", "backslashreplace").decode("ascii")


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return write_fields(value) if hasattr(value, "__dataclass_fields__") else value
