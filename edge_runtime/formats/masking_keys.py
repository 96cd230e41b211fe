"""Keys of a masking session: who signed them, and what is derived from them.

Every derived key depends on the whole roster, so that devices which were shown different rosters can neither read
each other's shares nor cancel each other's masks. X25519, HKDF-SHA256, AES-GCM and AES-CTR as in ``cryptography``;
no key is used for two messages, which is why nonces are zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.formats.envelope import Envelope, checked, integer, seal, text, unseal
from edge_runtime.formats.errors import MessageError, SignatureError
from edge_runtime.formats.masking import KEY_BYTES
from edge_runtime.formats.masking_messages import MaskInvite, RosterEntry, bundle_bytes, split_payload
from edge_runtime.formats.messages import NAME
from edge_runtime.formats.secret_sharing import SHARE_BYTES, read_share
from edge_runtime.formats.signing import TrustStore, sign_roster, verify_roster

MAX_ENROLLED = 1 << 16

_KEYS_DOMAIN = b"sevenfold mask keys v1\x00"
_KEY_BYTES = 32  # of an Ed25519 public key


@dataclass(frozen=True, slots=True)
class EnrolledKeys:
    """The devices that may be in a cohort, as the operator signed them.

    Attributes:
        serial: Grows with every new list.
        keys: Raw Ed25519 public keys.
    """

    federation: str
    serial: int
    keys: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class EnrolledList:
    """Header of a signed list; the payload is its keys, 32 bytes each, in growing order."""

    federation: str = checked(NAME)
    serial: int = checked(integer(0, 2**63 - 1))
    signature: str = checked(text(r"sevenfold-ed25519 [0-9a-f]{64} [0-9a-f]{128}"))


def sign_enrolled(enrolled: EnrolledKeys, key: Ed25519PrivateKey) -> Envelope:
    """The signed list, as it is handed to devices (``Envelope.to_bytes`` is its file)."""
    payload = b"".join(sorted(enrolled.keys))
    signed = _enrolled_bytes(enrolled.federation, enrolled.serial, payload)
    signature = sign_roster(signed, key).decode("ascii").rstrip("\n")
    return seal(EnrolledList(enrolled.federation, enrolled.serial, signature), payload)


def open_enrolled(envelope: Envelope, trusted: TrustStore) -> EnrolledKeys:
    """Check a signed list against the keys trusted on this machine.

    Raises:
        MessageError: Not of this form.
        SignatureError: Its signer is not trusted here, or it was changed.
    """
    header = unseal(envelope, EnrolledList)
    count, rest = divmod(len(envelope.payload), _KEY_BYTES)
    keys = split_payload(envelope.payload, [_KEY_BYTES] * count) if not rest and count <= MAX_ENROLLED else []
    if not keys or keys != sorted(set(keys)):
        raise MessageError(f"enrolledlist: the payload is not a list of 1 to {MAX_ENROLLED} different keys, in order")
    signed = _enrolled_bytes(header.federation, header.serial, envelope.payload)
    verify_roster(signed, f"{header.signature}\n".encode("ascii"), trusted, "enrolled devices")
    return EnrolledKeys(header.federation, header.serial, frozenset(keys))


def sign_keys(invite: MaskInvite, rank: int, mask_key: bytes, share_key: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signature (64 bytes) by which a device vouches for its keys of one session."""
    return key.sign(_keys_bytes(invite, rank, mask_key, share_key))


def check_keys(invite: MaskInvite, member: RosterEntry) -> None:
    """Raise SignatureError unless a member's keys and rank were signed by its own key for this session."""
    signed = _keys_bytes(invite, member.rank, member.mask_key, member.share_key)
    try:
        Ed25519PublicKey.from_public_bytes(member.public_key).verify(member.signature, signed)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("maskroster: a member's keys are not signed by its own key for this session") from error


def public_bytes(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commitment(seed: bytes) -> str:
    """What a device says about a seed beforehand: sha256, hex."""
    return hashlib.sha256(b"sevenfold mask seed v1\x00" + seed).hexdigest()


def pair_key(private: bytes, public: bytes, digest: bytes) -> bytes:
    """Key of the mask between two members, equal on both sides.

    Args:
        private: One's mask key, 32 bytes.
        public: The other's.
        digest: Of the roster.

    Raises:
        MessageError: The public key is one that makes every secret zero.
    """
    return _derive(_exchange(private, public), b"pair", digest, KEY_BYTES)


def segment_key(seed: bytes, segment: int, digest: bytes) -> bytes:
    """Key of a member's own mask on one segment."""
    return _derive(seed, b"segment" + segment.to_bytes(2, "big"), digest, KEY_BYTES)


def seal_shares(
    shares: Sequence[bytes], private: bytes, public: bytes, digest: bytes, sender: int, receiver: int
) -> bytes:
    """A bundle of shares that only ``receiver`` can read and only ``sender`` can have made."""
    key = _share_key(private, public, digest, sender, receiver)
    return AESGCM(key).encrypt(bytes(12), b"".join(shares), _direction(sender, receiver))


def open_shares(
    bundle: bytes, segments: int, private: bytes, public: bytes, digest: bytes, sender: int, receiver: int
) -> tuple[bytes, ...]:
    """Inverse of ``seal_shares``: the share of the pairwise key, then one a segment.

    Raises:
        MessageError: Changed, of another session, sender or receiver, or no shares.
    """
    if len(bundle) != bundle_bytes(segments):
        raise MessageError(f"maskdelivery: the bundle of member {sender} has {len(bundle)} bytes")
    key = _share_key(private, public, digest, sender, receiver)
    try:
        raw = AESGCM(key).decrypt(bytes(12), bundle, _direction(sender, receiver))
    except InvalidTag as error:
        raise MessageError(f"maskdelivery: the bundle of member {sender} is not for this device and session") from error
    shares = tuple(split_payload(raw, [SHARE_BYTES] * (1 + segments)))
    for share in shares:
        read_share(share)
    return shares


def _share_key(private: bytes, public: bytes, digest: bytes, sender: int, receiver: int) -> bytes:
    return _derive(_exchange(private, public), b"share" + _direction(sender, receiver), digest, 32)


def _direction(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(2, "big") + receiver.to_bytes(2, "big")


def _exchange(private: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise MessageError("maskroster: a key that makes every secret zero") from error


def _derive(secret: bytes, label: bytes, digest: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=digest, info=b"sevenfold mask v1 " + label).derive(secret)


def _keys_bytes(invite: MaskInvite, rank: int, mask_key: bytes, share_key: bytes) -> bytes:
    """Fields of fixed length around one whose length is told: no two meanings have the same bytes."""
    name = invite.federation.encode("ascii")
    numbers = invite.round.to_bytes(8, "big") + rank.to_bytes(2, "big") + len(name).to_bytes(2, "big")
    return _KEYS_DOMAIN + bytes.fromhex(invite.session) + numbers + name + mask_key + share_key


def _enrolled_bytes(federation: str, serial: int, payload: bytes) -> bytes:
    name = federation.encode("ascii")
    return len(name).to_bytes(2, "big") + name + serial.to_bytes(8, "big") + payload
