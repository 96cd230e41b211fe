"""Which devices may take part: one file a device, applied to the SuperLink when it is up.

A device's owner hands over its ``device.json``: its name and two public keys. ``node_key`` signs its requests to
the SuperLink; ``public_key`` signs its keys for secure aggregation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.files import write_atomically
from edge_runtime.formats.masking_keys import EnrolledKeys, sign_enrolled
from server.home import Home
from server.superlink import LinkError

MAX_CARD_BYTES = 16 << 10
MAX_DEVICES = 100_000
ENROLLED_FILE = "enrolled.signed"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_CARD = "its owner makes one with python -m edge_runtime client keys"


@dataclass(frozen=True, slots=True)
class Device:
    """An enrolled device.

    Attributes:
        node_key: OpenSSH EC P-384 public key.
        public_key: Raw Ed25519 public key, hex.
        node: Number that the SuperLink gave it; None until it was registered there.
        revoked: It may not connect; its file stays so that its keys are not enrolled again by mistake.
    """

    name: str
    node_key: str
    public_key: str
    node: int | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class NodeCommands:
    """What the registry needs of a SuperLink."""

    register: Callable[[str, str], int]
    unregister: Callable[[int], None]
    nodes: Callable[[], dict[int, str]]


def enrol(home: Home, card: Path) -> Device:
    """Add the device whose card this is.

    Raises:
        UserError: Not a card, a name or key that another device has, or a key of another kind.
    """
    device = read_card(card)
    for other in enrolled(home):
        same = [
            field for field in ("name", "node_key", "public_key") if getattr(other, field) == getattr(device, field)
        ]
        if same and other.revoked:
            raise UserError(
                same[0], _short(getattr(device, same[0])), f"not that of {other.name}, which was revoked",
                "the device makes new keys and takes a new name",
            )  # fmt: skip
        if same:
            raise UserError(
                same[0], _short(getattr(device, same[0])), f"not that of {other.name}, which is enrolled",
                f"python -m server revoke {other.name} first, if it is to be replaced",
            )  # fmt: skip
    _write(home, device)
    return device


def revoke(home: Home, name: str) -> Device:
    """Shut a device out; twice is no fault.

    Raises:
        UserError: No such device.
    """
    devices = {device.name: device for device in enrolled(home)}
    if name not in devices:
        raise UserError("revoke", name, ", ".join(sorted(devices)[:20]) or "no device is enrolled yet")
    device = replace(devices[name], revoked=True)
    _write(home, device)
    return device


def enrolled(home: Home) -> list[Device]:
    """Every device in the order of their names, revoked ones too.

    Raises:
        UserError: A file of the registry is damaged.
    """
    files = sorted(home.registry.glob("*.json"))[:MAX_DEVICES]
    return [_parse(path, _read(path), registry=True) for path in files]


def apply(home: Home, commands: NodeCommands) -> tuple[list[str], list[str]]:
    """Make the SuperLink agree with the registry: (registered, unregistered) by name.

    Cut in between and repeated, it ends in the same state.
    """
    known = commands.nodes()
    registered, unregistered = [], []
    for device in enrolled(home):
        if device.revoked and device.node is not None:
            if device.node in known:
                commands.unregister(device.node)
            _write(home, replace(device, node=None))
            unregistered.append(device.name)
        elif not device.revoked and (device.node is None or device.node not in known):
            _write(home, replace(device, node=_register(home, device, commands)))
            registered.append(device.name)
    return registered, unregistered


def read_card(path: Path) -> Device:
    """The device that a ``device.json`` describes.

    Raises:
        UserError: Too long, not JSON, a field missing, or a key of another kind.
    """
    return _parse(path, _read(path), registry=False)


def write_enrolled(home: Home, federation: str, serial: int, key: Ed25519PrivateKey) -> Path | None:
    """The signed list of the devices that may be in a cohort, for ``client --enrolled``; None without devices.

    A device that has it masks its updates among these only, whatever the server shows it.

    Args:
        home: Whose devices.
        federation: The only one that the list is good for.
        serial: Larger than that of every earlier list.
        key: The operator's; devices trust its public half.
    """
    keys = frozenset(bytes.fromhex(device.public_key) for device in enrolled(home) if not device.revoked)
    if not keys:
        return None
    path = home.run(federation) / ENROLLED_FILE
    write_atomically(path, sign_enrolled(EnrolledKeys(federation, serial, keys), key).to_bytes())
    return path


def _register(home: Home, device: Device, commands: NodeCommands) -> int:
    """The node's number; when it was registered but the number never noted, the only node that nobody has."""
    try:
        return commands.register(device.name, device.node_key)
    except LinkError:
        owned = {other.node for other in enrolled(home)}
        orphans = [node for node in commands.nodes() if node not in owned]
        if len(orphans) != 1:
            raise
        return orphans[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CARD_BYTES + 1)
        values = json.loads(raw) if len(raw) <= MAX_CARD_BYTES else None
    except OSError as error:
        raise UserError("device", str(path), "a readable device.json", str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise UserError("device", str(path), "a device.json", f"it is not JSON; {_CARD}") from error
    if not isinstance(values, dict):
        raise UserError("device", str(path), f"one JSON object of at most {MAX_CARD_BYTES} bytes", _CARD)
    return values


def _parse(path: Path, values: dict[str, Any], *, registry: bool) -> Device:
    for field in ("name", "node_key", "public_key"):
        if not isinstance(values.get(field), str):
            raise UserError(f"{path.name}: {field}", values.get(field), "text", _CARD)
    name, node_key, public_key = values["name"], values["node_key"].strip(), values["public_key"]
    if _NAME.fullmatch(name) is None:
        raise UserError(f"{path.name}: name", _short(name), "1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first")
    node, revoked = (values.get("node"), values.get("revoked", False)) if registry else (None, False)
    if registry and (path.stem != name or type(revoked) is not bool or not (node is None or type(node) is int)):
        raise UserError("registry", str(path), "a file that enrol wrote", "remove it and enrol the device again")
    return Device(name, _node_key(path, node_key), _public_key(path, public_key), node, revoked)


def _node_key(path: Path, text: str) -> str:
    """Type and key alone; a comment behind them is dropped."""
    try:
        key = load_ssh_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path.name}: node_key", _short(text), "an OpenSSH EC P-384 public key", _CARD) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"{path.name}: node_key", text.split()[0], "an OpenSSH EC P-384 public key", _CARD)
    return " ".join(text.split()[:2])


def _public_key(path: Path, text: str) -> str:
    try:
        if re.fullmatch("[0-9a-f]{64}", text, re.ASCII) is None:
            raise ValueError("not 64 hex digits")
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path.name}: public_key", _short(text), "a raw Ed25519 key, 64 hex digits", _CARD) from error
    return text


def _write(home: Home, device: Device) -> None:
    text = json.dumps(asdict(device), indent=1, sort_keys=True) + "\n"
    write_atomically(home.registry / f"{device.name}.json", text.encode("ascii"), mode=0o600)


def _short(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def summary(devices: Sequence[Device]) -> str:
    """How many, in words."""
    revoked = sum(device.revoked for device in devices)
    return f"{len(devices) - revoked} enrolled" + (f", {revoked} revoked" if revoked else "")
