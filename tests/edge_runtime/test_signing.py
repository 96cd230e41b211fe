"""Keys of this machine, keys it trusts, and signatures that hold for one payload only."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.formats import signing
from edge_runtime.formats.errors import SignatureError, UserError
from edge_runtime.formats.signing import (
    KEY_FILE,
    TrustStore,
    config_directory,
    fingerprint,
    load_trust,
    public_pem,
    sign,
    signing_key,
    trust_key,
    verify,
)

PAYLOAD = b'{"format": 1}\n'


def store(*keys: Ed25519PrivateKey) -> TrustStore:
    return TrustStore({fingerprint(key.public_key()): key.public_key() for key in keys})


def test_config_directory_is_named_first_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert config_directory({"SEVENFOLD_CONFIG_DIR": "/s", "XDG_CONFIG_HOME": "/x"}) == Path("/s")
    assert config_directory({"SEVENFOLD_CONFIG_DIR": "", "XDG_CONFIG_HOME": "/x"}) == Path("/x/sevenfold")
    assert config_directory({}) == Path("/home/ann/.config/sevenfold")


def test_first_use_makes_a_private_key_and_trusts_it(config_dir: Path) -> None:
    key = signing_key(config_dir)
    assert stat.S_IMODE((config_dir / KEY_FILE).stat().st_mode) == 0o600
    assert list(load_trust(config_dir).keys) == [hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()]
    assert signing_key(config_dir).private_bytes_raw() == key.private_bytes_raw()
    assert sorted(path.name for path in config_dir.iterdir()) == [KEY_FILE, "trusted"]


def test_a_key_taken_out_of_trust_stays_out(config_dir: Path) -> None:
    signing_key(config_dir)
    for path in (config_dir / "trusted").iterdir():
        path.unlink()
    signing_key(config_dir)
    assert load_trust(config_dir).keys == {}


def test_two_processes_at_first_use_agree_on_one_key(config_dir: Path) -> None:
    code = (
        "import sys; from edge_runtime.formats.signing import signing_key, fingerprint\n"
        "sys.stdin.readline(); print(fingerprint(signing_key().public_key()))"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for child in children:
        child.stdin.write("go\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
    printed = {child.communicate()[0].strip() for child in children}
    assert len(printed) == 1
    assert set(load_trust(config_dir).keys) == printed


def test_the_key_of_the_process_that_came_second_is_thrown_away(
    config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Ed25519PrivateKey.generate
    first: list[Ed25519PrivateKey] = []

    class Late:
        """Another process finishes its key while this one makes its own."""

        @staticmethod
        def generate() -> Ed25519PrivateKey:
            monkeypatch.setattr(signing, "Ed25519PrivateKey", Ed25519PrivateKey)
            first.append(signing_key(config_dir))
            return generate()

    monkeypatch.setattr(signing, "Ed25519PrivateKey", Late)
    assert signing_key(config_dir).private_bytes_raw() == first[0].private_bytes_raw()
    assert list(load_trust(config_dir).keys) == [fingerprint(first[0].public_key())]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_key_that_others_may_read_is_refused(config_dir: Path) -> None:
    signing_key(config_dir)
    (config_dir / KEY_FILE).chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        signing_key(config_dir)


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", b"x" * 20_000]
)
def test_a_damaged_key_is_a_user_error(config_dir: Path, content: bytes) -> None:
    signing_key(config_dir)
    (config_dir / KEY_FILE).write_bytes(content)
    with pytest.raises(UserError, match=KEY_FILE):
        signing_key(config_dir)


def test_trusting_a_file_copies_its_key_under_its_fingerprint(config_dir: Path, tmp_path: Path) -> None:
    other = Ed25519PrivateKey.generate()
    (tmp_path / "friend.pem").write_bytes(public_pem(other.public_key()))
    name = trust_key(tmp_path / "friend.pem", config_dir)
    (tmp_path / "friend.pem").unlink()
    assert name == fingerprint(other.public_key())
    assert list(load_trust(config_dir).keys) == [name]
    assert (config_dir / "trusted" / f"{name}.pem").exists()


def test_what_is_not_a_public_ed25519_key_is_not_trusted(config_dir: Path, tmp_path: Path) -> None:
    private = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    other_kind = curve.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for content in (private, other_kind, b"", b"x" * 20_000):
        (tmp_path / "key.pem").write_bytes(content)
        with pytest.raises(UserError, match=r"key\.pem"):
            trust_key(tmp_path / "key.pem", config_dir)
    with pytest.raises(UserError, match="No such file"):
        trust_key(tmp_path / "absent.pem", config_dir)
    assert load_trust(config_dir).keys == {}


def test_a_signature_names_its_signer_and_holds_for_its_payload_alone() -> None:
    key = Ed25519PrivateKey.generate()
    signature = sign(PAYLOAD, key)
    assert verify(PAYLOAD, signature, store(key), "p") == fingerprint(key.public_key())
    for position in range(len(PAYLOAD)):
        tampered = PAYLOAD[:position] + bytes([PAYLOAD[position] ^ 1]) + PAYLOAD[position + 1 :]
        with pytest.raises(SignatureError, match="changed after it was signed"):
            verify(tampered, signature, store(key), "p")


def test_every_flipped_character_of_a_signature_file_is_refused() -> None:
    key = Ed25519PrivateKey.generate()
    signature = sign(PAYLOAD, key)
    for position in range(len(signature)):
        tampered = signature[:position] + bytes([signature[position] ^ 1]) + signature[position + 1 :]
        with pytest.raises(SignatureError):
            verify(PAYLOAD, tampered, store(key), "p")
    for tampered in (b"", signature[:-1], signature + b"\n", signature.upper(), b" " + signature):
        with pytest.raises(SignatureError, match="damaged"):
            verify(PAYLOAD, tampered, store(key), "p")


def test_an_unknown_signer_is_refused_with_the_next_step() -> None:
    stranger, friend = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    with pytest.raises(SignatureError, match="--trust FILE") as caught:
        verify(PAYLOAD, sign(PAYLOAD, stranger), store(friend), "p")
    assert fingerprint(stranger.public_key()) in str(caught.value)


def test_a_signature_made_for_another_protocol_does_not_count() -> None:
    key = Ed25519PrivateKey.generate()
    plain = f"sevenfold-ed25519 {fingerprint(key.public_key())} {key.sign(PAYLOAD).hex()}\n".encode()
    with pytest.raises(SignatureError, match="changed"):
        verify(PAYLOAD, plain, store(key), "p")
