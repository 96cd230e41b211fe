"""A device's two keys, made at first use and readable by their owner alone.

``node_key`` (EC P-384, OpenSSH) signs requests to the SuperLink; ``device_key.pem`` (Ed25519) signs what the device
says to other devices when sums are masked, so that the SuperLink cannot speak for it. The operator enrols both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.files import write_atomically

NODE_KEY_FILE, DEVICE_KEY_FILE, ENROLMENT_FILE = "node_key", "device_key.pem", "device.json"
_MAX_KEY_BYTES = 16 << 10


def device_key(directory: Path) -> Ed25519PrivateKey:
    """The key that other devices know.

    Raises:
        UserError: The file is not such a key, or others may read it.
    """
    path = directory / DEVICE_KEY_FILE
    if not path.exists():
        _write_key(path, Ed25519PrivateKey.generate(), serialization.PrivateFormat.PKCS8)
    key = _read_key(path, lambda raw: serialization.load_pem_private_key(raw, password=None))
    if not isinstance(key, Ed25519PrivateKey):
        raise _wrong(path, type(key).__name__, "an Ed25519 key")
    return key


def node_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    """The key that the SuperLink knows.

    Raises:
        UserError: The file is not such a key, or others may read it.
    """
    path = directory / NODE_KEY_FILE
    if not path.exists():
        _write_key(path, ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH)
    key = _read_key(path, lambda raw: serialization.load_ssh_private_key(raw, password=None))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise _wrong(path, type(key).__name__, "an EC P-384 key")
    return key


def enrolment(directory: Path, name: str) -> dict[str, str]:
    """What the operator of a federation needs to enrol this device: its name and its two public keys."""
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return {
        "name": name,
        "node_key": node_key(directory).public_key().public_bytes(*openssh).decode("ascii"),
        "public_key": device_key(directory).public_key().public_bytes_raw().hex(),
    }


def write_enrolment(directory: Path, name: str) -> Path:
    """Write ``device.json`` and return its path."""
    path = directory / ENROLMENT_FILE
    write_atomically(path, (json.dumps(enrolment(directory, name), indent=2) + "\n").encode("ascii"))
    return path


def _write_key(
    path: Path, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    raw = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write_atomically(path, raw, mode=0o600)


def _read_key(path: Path, load: Callable[[bytes], object]) -> object:
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise UserError(str(path), "a key that others may read", "mode 600", f"chmod 600 {path}")
        with path.open("rb") as file:
            return load(file.read(_MAX_KEY_BYTES))
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        # A new key would be a new device, which nobody enrolled: that is for a person to decide.
        raise _wrong(path, f"no readable key ({str(error)[:80]})", "an unencrypted private key") from error


def _wrong(path: Path, value: str, allowed: str) -> UserError:
    return UserError(str(path), value, allowed, "move it away, then run `client keys` and enrol the device again")
