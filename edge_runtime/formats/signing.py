"""Who signed it: Ed25519 keys of this machine and the keys it trusts.

``$SEVENFOLD_CONFIG_DIR`` (else ``$XDG_CONFIG_HOME/sevenfold``, else ``~/.config/sevenfold``) holds
``signing_key.pem``, made at first use and readable by its owner alone, and ``trusted/*.pem``, the public keys
whose packages this machine opens. A key inside a package proves nothing and is never looked for.

A signature file is one line of text, ``sevenfold-ed25519 <fingerprint> <signature>``, both in hex. The
fingerprint is the sha256 of the 32 bytes of the public key; it only selects which trusted key to try.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.formats.errors import SignatureError, UserError
from edge_runtime.formats.files import temporary_beside, write_atomically

KEY_FILE = "signing_key.pem"
TRUSTED_DIRECTORY = "trusted"
MAX_SIGNATURE_BYTES = 1024
MAX_KEY_BYTES = 16 << 10

# Signed in front of the payload, so that a signature made here means nothing to another protocol.
_DOMAIN = b"sevenfold package manifest v1\x00"
_ROSTER_DOMAIN = b"sevenfold device roster v1\x00"
_SIGNATURE = re.compile(rb"sevenfold-ed25519 ([0-9a-f]{64}) ([0-9a-f]{128})\n")


@dataclass(frozen=True, slots=True)
class TrustStore:
    """Public keys by fingerprint (sha256 of the raw key, hex)."""

    keys: Mapping[str, Ed25519PublicKey]


def config_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this machine keeps its key and the keys it trusts."""
    if named := environment.get("SEVENFOLD_CONFIG_DIR"):
        return Path(named)
    if xdg := environment.get("XDG_CONFIG_HOME"):
        return Path(xdg) / "sevenfold"
    return Path.home() / ".config" / "sevenfold"


def signing_key(directory: Path | None = None) -> Ed25519PrivateKey:
    """Load this machine's key; make it, and trust it, at first use.

    A key that already exists is not added to ``trusted/`` again: removing it there stays removed.

    Raises:
        UserError: The key file is not an Ed25519 key, or others may read it.
    """
    directory = directory or config_directory()
    path = directory / KEY_FILE
    if not path.exists():
        _make_key(path)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise UserError(str(path), "a key that others may read", "mode 600", f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(_read_key(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(
            str(path), f"no readable key ({error})", "Ed25519, PEM", "move it away; a new one is made"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(str(path), type(key).__name__, "an Ed25519 key", "move it away; a new one is made")
    return key


def load_trust(directory: Path | None = None) -> TrustStore:
    """Every key in ``trusted/``; empty when the directory does not exist.

    Raises:
        UserError: A ``.pem`` file there is not an Ed25519 public key.
    """
    trusted = (directory or config_directory()) / TRUSTED_DIRECTORY
    keys = [load_public_key(path) for path in sorted(trusted.glob("*.pem"))]
    return TrustStore({fingerprint(key): key for key in keys})


def trust_key(path: Path, directory: Path | None = None) -> str:
    """Copy the public key in ``path`` into ``trusted/`` and return its fingerprint.

    Raises:
        UserError: The file is missing, too large, or not an Ed25519 public key.
    """
    key = load_public_key(path)
    trusted = (directory or config_directory()) / TRUSTED_DIRECTORY
    write_atomically(trusted / f"{fingerprint(key)}.pem", public_pem(key), mode=0o644)
    return fingerprint(key)


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a PEM public key.

    Raises:
        UserError: The file is missing, too large, or not an Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(_read_key(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        next_step = f"ask the package's maker for the .pem file in {TRUSTED_DIRECTORY}/ beside their {KEY_FILE}"
        raise UserError(str(path), "no public key", "Ed25519 public key, PEM", next_step) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(str(path), type(key).__name__, "an Ed25519 public key", "ask the package's maker for theirs")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """sha256 of the 32 raw bytes, hex."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def public_pem(key: Ed25519PublicKey) -> bytes:
    """The form in which a public key is handed to others."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The content of the signature file for ``payload``."""
    return _sign(_DOMAIN, payload, key)


def sign_roster(payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signature line of a list of enrolled devices; no package's signature can stand for it."""
    return _sign(_ROSTER_DOMAIN, payload, key)


def verify(payload: bytes, signature_file: bytes, trusted: TrustStore, source: str) -> str:
    """Check a signature file and return the signer's fingerprint.

    Args:
        payload: The signed bytes.
        signature_file: Content of the signature file.
        trusted: Keys that may have signed.
        source: What is being verified, for the message.

    Raises:
        SignatureError: The signature file is malformed, its signer is not trusted here, or the signature does
            not belong to ``payload``.
    """
    return _verify(_DOMAIN, payload, signature_file, trusted, source, "the package")


def verify_roster(payload: bytes, signature_line: bytes, trusted: TrustStore, source: str) -> str:
    """``verify`` for what ``sign_roster`` signed.

    Raises:
        SignatureError: As ``verify``.
    """
    return _verify(_ROSTER_DOMAIN, payload, signature_line, trusted, source, "the list")


def _sign(domain: bytes, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    signature = key.sign(domain + payload).hex()
    return f"sevenfold-ed25519 {fingerprint(key.public_key())} {signature}\n".encode("ascii")


def _verify(domain: bytes, payload: bytes, signature_file: bytes, trusted: TrustStore, source: str, what: str) -> str:
    match = _SIGNATURE.fullmatch(signature_file)
    if match is None:
        raise SignatureError(f"{source}: the signature file is damaged; get {what} again")
    signer, signature = match[1].decode("ascii"), bytes.fromhex(match[2].decode("ascii"))
    key = trusted.keys.get(signer)
    if key is None:
        raise SignatureError(
            f"{source}: signed by {signer}, which is not trusted on this machine ({len(trusted.keys)} keys are); "
            f"if you know its owner, get the public key from them and add --trust FILE"
        )
    try:
        key.verify(signature, domain + payload)
    except InvalidSignature as error:
        raise SignatureError(f"{source}: changed after it was signed by {signer}; get {what} again") from error
    return signer


def _make_key(path: Path) -> None:
    """Make and trust a key; when two processes do so at once, the first one's key stays.

    The public half is written first: whoever finds a key can rely on its being trusted.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = path.parent / TRUSTED_DIRECTORY / f"{fingerprint(key.public_key())}.pem"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(public, public_pem(key.public_key()))
    with temporary_beside(path, pem, 0o600) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            public.unlink()


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise UserError(str(path), error.strerror, "a readable PEM file", "check the path") from error
    if len(content) > MAX_KEY_BYTES:
        raise UserError(str(path), f"more than {MAX_KEY_BYTES} bytes", "one PEM key", "check the path")
    return content
