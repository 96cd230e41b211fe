"""What server and devices say to each other around a masked sum.

| from the server | answered by |
| --- | --- |
| ``MaskInvite``: a session begins | ``MaskKeys``: two keys of this session, signed by the device |
| ``MaskRoster``: everybody's keys | ``MaskShares``: shares of the device's secrets, encrypted to each member |
| ``MaskDelivery``: the shares for this device | ``MaskReady`` |
| ``Plan`` with ``mask`` set | ``Update`` whose payload is masked |
| ``MaskUnmask``: who sent an update, who was lost | ``MaskReveal``: one share for each of them |

A device that refuses answers ``Decline``. Members are named by their place in the roster. Shares are for the seeds
that hide a device's own segments (one a segment: given away for survivors) and for the key of its pairwise masks
(given away for the lost), never both for the same member.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edge_runtime.formats.envelope import checked, integer, listing, text, write_fields
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.messages import MAX_ROUND, NAME, SHA256
from edge_runtime.formats.secret_sharing import SHARE_BYTES

MAX_COHORT = 1024
TAG_BYTES = 16  # of AES-GCM

_ENTRY = struct.Struct("<32s32s32s64sH")
_PLACES = listing(integer(0, MAX_COHORT - 1), MAX_COHORT)


@dataclass(frozen=True, slots=True)
class MaskInvite:
    """A new session for one attempt at a round; nothing of an earlier session is ever used again.

    Attributes:
        session: Fresh random bytes, hex.
        rank: What this device will train.
        ranks: Ends of the adapter's rank segments.
        min_cohort: A sum of fewer devices is never opened, nor a segment's.
    """

    session: str = checked(SHA256)
    federation: str = checked(NAME)
    round: int = checked(integer(1, MAX_ROUND))
    rank: int = checked(integer(1, 1024))
    ranks: tuple[int, ...] = checked(listing(integer(1, 1024), 16))
    min_cohort: int = checked(integer(2, MAX_COHORT))


@dataclass(frozen=True, slots=True)
class MaskKeys:
    """A device's part in a session.

    Attributes:
        mask_key: X25519 (hex): pairwise masks are derived from it.
        share_key: X25519 (hex): shares for this device are encrypted to it.
        signature: Ed25519 by the device's own key (``masking_keys.sign_keys``).
        enrolled: Keys on the operator's signed list that it holds; 0: it has no list and cannot tell devices
            from inventions of the server.
    """

    session: str = checked(SHA256)
    mask_key: str = checked(SHA256)
    share_key: str = checked(SHA256)
    signature: str = checked(text(r"[0-9a-f]{128}"))
    enrolled: int = checked(integer(0, 1 << 20))


@dataclass(frozen=True, slots=True)
class MaskRoster:
    """Everybody's keys and signatures (payload: ``pack_roster``)."""

    session: str = checked(SHA256)


@dataclass(frozen=True, slots=True)
class MaskShares:
    """One encrypted bundle of shares for each other member, in roster order.

    Attributes:
        commitments: sha256 of each of the device's own seeds, one a segment: a wrong share is noticed.
    """

    session: str = checked(SHA256)
    commitments: tuple[str, ...] = checked(listing(SHA256, 16))


@dataclass(frozen=True, slots=True)
class MaskDelivery:
    """The bundles for this device, from each other of ``sharers``, in their order.

    Attributes:
        sharers: Members whose shares arrived, growing, the receiver among them: these mask with each other.
    """

    session: str = checked(SHA256)
    sharers: tuple[int, ...] = checked(_PLACES)


@dataclass(frozen=True, slots=True)
class MaskReady:
    """The device can mask now."""

    session: str = checked(SHA256)


@dataclass(frozen=True, slots=True)
class MaskUnmask:
    """Whose masked update is in the sum and who was lost, both growing; together all sharers."""

    session: str = checked(SHA256)
    survivors: tuple[int, ...] = checked(_PLACES)
    lost: tuple[int, ...] = checked(_PLACES)


@dataclass(frozen=True, slots=True)
class MaskReveal:
    """For each sharer in order: of a survivor the shares of its open segments' seeds, of a lost one that of its key."""

    session: str = checked(SHA256)


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """A line of the roster: raw keys, and the rank that the member signed."""

    public_key: bytes
    mask_key: bytes
    share_key: bytes
    signature: bytes
    rank: int


@dataclass(frozen=True, slots=True)
class Roster:
    """A session's members, equal on every device or nothing can be decrypted.

    Attributes:
        invite: Its ``rank`` is one receiver's and no part of the digest.
    """

    invite: MaskInvite
    members: tuple[RosterEntry, ...]

    @property
    def threshold(self) -> int:
        """Shares that open a secret, and the fewest survivors: a third of the members may be lost."""
        return fewest_of(len(self.members))

    @property
    def digest(self) -> bytes:
        """32 bytes that every key of the session depends on."""
        fields = {name: value for name, value in write_fields(self.invite).items() if name != "rank"}
        head = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
        return hashlib.sha256(b"sevenfold mask roster v1\x00" + head + b"\x00" + pack_roster(self.members)).digest()

    def segments(self, place: int) -> int:
        """How many rank segments a member trains."""
        return self.invite.ranks.index(self.members[place].rank) + 1

    def covering(self, segment: int, places: Collection[int]) -> list[int]:
        """Those of ``places`` that train a segment."""
        return [place for place in places if self.segments(place) > segment]

    def sent_segments(self, sharers: Collection[int]) -> int:
        """How many segments are summed at all: those that at least ``min_cohort`` sharers train."""
        counts = [len(self.covering(segment, sharers)) for segment in range(len(self.invite.ranks))]
        return sum(count >= self.invite.min_cohort for count in counts)

    def open_segments(self, sharers: Collection[int], survivors: Collection[int], sent: int) -> tuple[bool, ...]:
        """Which of the ``sent`` segments may be unmasked.

        At least ``min_cohort`` survivors and two thirds of the sharers that train it: a server that told devices
        different survivors could otherwise narrow a segment down to one of them.
        """
        flags = []
        for segment in range(sent):
            left, all_of_it = len(self.covering(segment, survivors)), len(self.covering(segment, sharers))
            flags.append(left >= max(self.invite.min_cohort, fewest_of(all_of_it)))
        return tuple(flags)


def fewest_of(count: int) -> int:
    """Two thirds, rounded up: with fewer than a third colluding, no two groups of so many can both be misled."""
    return -(-2 * count // 3)


def pack_roster(members: Sequence[RosterEntry]) -> bytes:
    """The payload of a ``MaskRoster``."""
    return b"".join(
        _ENTRY.pack(member.public_key, member.mask_key, member.share_key, member.signature, member.rank)
        for member in members
    )


def unpack_roster(payload: bytes, invite: MaskInvite) -> Roster:
    """Inverse of ``pack_roster``; signatures are not checked here.

    Raises:
        MessageError: A wrong length, a rank that ends no segment, or a key that occurs twice.
    """
    count, rest = divmod(len(payload), _ENTRY.size)
    if rest or not 1 <= count <= MAX_COHORT:
        raise MessageError(f"maskroster: {len(payload)} bytes are no list of at most {MAX_COHORT} members")
    members = tuple(RosterEntry(*entry) for entry in _ENTRY.iter_unpack(payload))
    for name in ("public_key", "mask_key", "share_key"):
        if len({getattr(member, name) for member in members}) != count:
            raise MessageError(f"maskroster: a {name} occurs twice")
    if any(member.rank not in invite.ranks for member in members):
        raise MessageError(f"maskroster: a rank is none of {list(invite.ranks)}")
    return Roster(invite, members)


def bundle_bytes(segments: int) -> int:
    """Length of an encrypted bundle: the share of the pairwise key, then one a segment, and the tag."""
    return (1 + segments) * SHARE_BYTES + TAG_BYTES


def split_payload(payload: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Cut a payload into parts.

    Raises:
        MessageError: The lengths do not add up to it.
    """
    if len(payload) != sum(lengths):
        raise MessageError(f"payload: {len(payload)} bytes, {sum(lengths)} are needed")
    parts, start = [], 0
    for length in lengths:
        parts.append(payload[start : start + length])
        start += length
    return parts


def check_places(places: Sequence[int], count: int) -> None:
    """Raise MessageError unless places grow and lie below ``count``."""
    if any(low >= high for low, high in pairwise(places)) or (places and places[-1] >= count):
        raise MessageError("members must be named in growing order, each once")
