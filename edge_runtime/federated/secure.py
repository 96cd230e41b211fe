"""The device's side of secure aggregation: what it signs, what it shares, what it refuses.

The device trusts no field of the server's messages. It masks only among members whose keys their own devices
signed, opens only sums that enough of them are in, and never gives away both of a member's secrets. A session
lives in memory: after a restart it is gone and the device counts as lost. Its secrets are dropped once it revealed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from edge_runtime.formats.envelope import Envelope, header_text, seal, sha256, unseal
from edge_runtime.formats.errors import MessageError, SignatureError
from edge_runtime.formats.masking import (
    Field,
    RandomBytes,
    add_stream,
    field_bits,
    field_dtype,
    integer_noise,
    pack_bits,
)
from edge_runtime.formats.masking_keys import (
    EnrolledKeys,
    check_keys,
    commitment,
    open_shares,
    pair_key,
    public_bytes,
    seal_shares,
    segment_key,
    sign_keys,
)
from edge_runtime.formats.masking_messages import (
    MaskDelivery,
    MaskInvite,
    MaskKeys,
    MaskReady,
    MaskReveal,
    MaskRoster,
    MaskShares,
    MaskUnmask,
    Roster,
    bundle_bytes,
    check_places,
    split_payload,
    unpack_roster,
)
from edge_runtime.formats.messages import Decline, MaskPlan, Plan, Reason
from edge_runtime.formats.secret_sharing import SECRET_BYTES, share_secret

KINDS = frozenset({"maskinvite", "maskroster", "maskdelivery", "maskunmask"})
MAX_SESSIONS = 16  # one a federation; the oldest gives way
MAX_PAST = 4096  # ended sessions whose names are remembered

log = logging.getLogger(__name__)


class SecureSessions:
    """Masking sessions of this device.

    Args:
        device_key: Signs this device's keys of each session.
        enrolled: Devices it masks with; None: every key with a valid signature, which a dishonest server can
            invent (said in the log and in ``MaskKeys``).
        random_bytes: Source of secrets.
        least_cohort: This device takes no part in sums of fewer, whatever the server's minimum.
    """

    def __init__(
        self,
        device_key: Ed25519PrivateKey,
        enrolled: EnrolledKeys | None,
        random_bytes: RandomBytes = os.urandom,
        least_cohort: int = 2,
    ) -> None:
        self._device_key, self._enrolled = device_key, enrolled
        self._random_bytes, self._least_cohort = random_bytes, least_cohort
        self._sessions: dict[str, _Session] = {}
        self._past: dict[str, None] = {}

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer a message whose kind is in KINDS; ``Decline`` when it is not allowed. Never raises for its content.

        The same message again gets the same answer; another one at the same stage of a session is refused.
        """
        try:
            return self._answer(envelope)
        except (MessageError, SignatureError) as error:
            log.warning("%s refused: %s", envelope.kind[:40], error)
            detail = "".join(letter if " " <= letter <= "~" else "?" for letter in str(error))
            return seal(Decline(Reason.INVALID, detail[:200], 0.0))

    def mask(self, plan: Plan, codes: NDArray[np.int32], sizes: Sequence[int], weight: int) -> bytes:
        """The payload of an update: ``codes * weight`` under all masks, packed segment by segment. Once a session.

        Adds ``plan.noise_std`` as integer noise itself: the caller adds none when ``plan.mask`` is set, and none
        of it may enter the residual, which would take it back.

        Args:
            plan: With ``mask`` set.
            codes: (n,) from ``masking.quantize_for_mask``.
            sizes: Values of each segment of the plan's rank; their sum is n.
            weight: In [1, plan.weight_cap].

        Raises:
            MessageError: No such session at this stage, or a plan, code or weight that it does not allow.
        """
        if plan.mask is None:
            raise MessageError("plan: mask is not set")
        session = self._at(plan.mask.session, _Stage.READY)
        _check_plan(session, plan, plan.mask, codes, sizes, weight)
        sizes = sizes[: len(plan.mask.scales)]
        values = _weighted(plan, plan.mask, codes, sizes, weight, self._random_bytes)
        session.stage, session.sent = _Stage.MASKED, len(plan.mask.scales)  # whatever follows, these masks are used
        _add_masks(session, values, sizes)
        parts = np.split(values, np.cumsum(sizes)[:-1])
        return b"".join(pack_bits(part, plan.mask.bits) for part in parts)

    def _answer(self, envelope: Envelope) -> Envelope:
        steps: dict[str, tuple[type[Any], Callable[[Any, bytes], Envelope]]] = {
            "maskinvite": (MaskInvite, self._invite),
            "maskroster": (MaskRoster, self._roster),
            "maskdelivery": (MaskDelivery, self._delivery),
            "maskunmask": (MaskUnmask, self._unmask),
        }
        if envelope.kind not in steps:
            raise MessageError(f"message: {envelope.kind[:40]!r} belongs to no masking session")
        cls, step = steps[envelope.kind]
        message = unseal(envelope, cls)
        asked = sha256(header_text(envelope).encode() + envelope.payload)
        session = self._sessions.get(message.session)
        if session is not None and envelope.kind in session.answers:
            before, answer = session.answers[envelope.kind]
            if before != asked:
                raise MessageError(f"{envelope.kind}: another one was answered in this session")
            return answer
        answer = step(message, envelope.payload)
        self._sessions[message.session].answers[envelope.kind] = (asked, answer)
        return answer

    def _at(self, name: str, stage: _Stage) -> _Session:
        session = self._sessions.get(name)
        if session is None:
            raise MessageError(f"session {name[:8]}: unknown here; it ended, or this device was restarted")
        if session.stage is not stage:
            raise MessageError(f"session {name[:8]}: {session.stage.name.lower()}, not {stage.name.lower()}")
        return session

    def _invite(self, invite: MaskInvite, payload: bytes) -> Envelope:
        if invite.session in self._past:
            raise MessageError("maskinvite: a session that ended")
        if payload or list(invite.ranks) != sorted(set(invite.ranks)) or invite.rank not in invite.ranks:
            raise MessageError(f"maskinvite: rank {invite.rank} of segments {list(invite.ranks)}")
        if invite.min_cohort < self._least_cohort:
            raise MessageError(f"maskinvite: min_cohort {invite.min_cohort}, at least {self._least_cohort} here")
        if self._enrolled is None:
            log.warning("no signed list of enrolled devices here: the server is trusted to invent none")
        elif self._enrolled.federation != invite.federation:
            raise MessageError(f"maskinvite: the list of enrolled devices is of {self._enrolled.federation}")
        self._forget(invite.federation)
        session = _Session(
            invite, self._random_bytes(SECRET_BYTES), self._random_bytes(SECRET_BYTES), self._seeds(invite)
        )
        self._sessions[invite.session] = session
        keys = (public_bytes(session.mask_private), public_bytes(session.share_private))
        signature = sign_keys(invite, invite.rank, keys[0], keys[1], self._device_key)
        known = len(self._enrolled.keys) if self._enrolled else 0
        return seal(MaskKeys(invite.session, keys[0].hex(), keys[1].hex(), signature.hex(), known))

    def _roster(self, message: MaskRoster, payload: bytes) -> Envelope:
        session = self._at(message.session, _Stage.INVITED)
        roster = unpack_roster(payload, session.invite)
        place = self._check_roster(session, roster)
        count, threshold = len(roster.members), roster.threshold
        secrets = (session.mask_private, *session.seeds)
        shares = list(zip(*(share_secret(s, count, threshold, self._random_bytes) for s in secrets), strict=True))
        bundles = [
            seal_shares(shares[peer], session.share_private, member.share_key, roster.digest, place, peer)
            for peer, member in enumerate(roster.members)
            if peer != place
        ]
        session.roster, session.place, session.shares[place] = roster, place, shares[place]
        session.stage = _Stage.SHARED
        return seal(MaskShares(message.session, tuple(map(commitment, session.seeds))), b"".join(bundles))

    def _delivery(self, message: MaskDelivery, payload: bytes) -> Envelope:
        session = self._at(message.session, _Stage.SHARED)
        roster, place = session.known
        check_places(message.sharers, len(roster.members))
        if place not in message.sharers or len(message.sharers) < max(roster.threshold, session.invite.min_cohort):
            raise MessageError(f"maskdelivery: {len(message.sharers)} sharers of {len(roster.members)} are too few")
        peers = [peer for peer in message.sharers if peer != place]
        bundles = split_payload(payload, [bundle_bytes(roster.segments(peer)) for peer in peers])
        opened = {
            peer: open_shares(
                bundle,
                roster.segments(peer),
                session.share_private,
                roster.members[peer].share_key,
                roster.digest,
                peer,
                place,
            )
            for peer, bundle in zip(peers, bundles, strict=True)
        }
        session.shares.update(opened)
        session.sharers, session.stage = message.sharers, _Stage.READY
        return seal(MaskReady(message.session))

    def _unmask(self, message: MaskUnmask, payload: bytes) -> Envelope:
        session = self._at(message.session, _Stage.MASKED)
        roster, place = session.known
        survivors, lost = message.survivors, message.lost
        check_places(survivors, len(roster.members))
        check_places(lost, len(roster.members))
        if payload or tuple(sorted((*survivors, *lost))) != session.sharers:
            raise MessageError("maskunmask: survivors and lost are not the session's members, each once")
        if place not in survivors or len(survivors) < max(roster.threshold, session.invite.min_cohort):
            raise MessageError(f"maskunmask: {len(survivors)} survivors of {len(roster.members)} are too few")
        opened = roster.open_segments(session.sharers, survivors, session.sent)
        parts = []
        for member in session.sharers:
            key_share, *seed_shares = session.shares[member]
            if member in survivors:
                parts += [share for share, is_open in zip(seed_shares, opened, strict=False) if is_open]
            else:
                parts.append(key_share)
        session.end()
        return seal(MaskReveal(message.session), b"".join(parts))

    def _check_roster(self, session: _Session, roster: Roster) -> int:
        """This device's place in a roster that it accepts."""
        members, invite = roster.members, session.invite
        if len(members) < invite.min_cohort:
            raise MessageError(f"maskroster: {len(members)} members, at least {invite.min_cohort}")
        own = self._device_key.public_key().public_bytes_raw()
        place = next((place for place, member in enumerate(members) if member.public_key == own), None)
        if place is None:
            raise MessageError("maskroster: this device is not in it")
        keys = (public_bytes(session.mask_private), public_bytes(session.share_private), invite.rank)
        if (members[place].mask_key, members[place].share_key, members[place].rank) != keys:
            raise MessageError("maskroster: this device's own keys or rank were changed")
        if self._enrolled is not None and any(member.public_key not in self._enrolled.keys for member in members):
            raise MessageError("maskroster: a member is not on the signed list of enrolled devices")
        for member in members:
            check_keys(invite, member)
        return place

    def _seeds(self, invite: MaskInvite) -> tuple[bytes, ...]:
        return tuple(self._random_bytes(SECRET_BYTES) for _ in range(invite.ranks.index(invite.rank) + 1))

    def _forget(self, federation: str) -> None:
        """End a federation's session before its next begins, and the oldest when there are too many."""
        for name, session in list(self._sessions.items()):
            if session.invite.federation == federation or len(self._sessions) >= MAX_SESSIONS:
                del self._sessions[name]
                self._past[name] = None
        while len(self._past) > MAX_PAST:
            del self._past[next(iter(self._past))]


class _Stage(IntEnum):
    """What the device did last."""

    INVITED = 0
    SHARED = 1
    READY = 2
    MASKED = 3
    REVEALED = 4


@dataclass(slots=True)
class _Session:
    """A session's secrets and what was agreed in it.

    Attributes:
        seeds: Of the device's own masks, one a segment.
        shares: By member: what this device holds of its secrets (the pairwise key's, then one a segment).
        sent: Segments of the masked update.
        answers: By kind: the digest of what was asked, and the answer.
    """

    invite: MaskInvite
    mask_private: bytes
    share_private: bytes
    seeds: tuple[bytes, ...]
    stage: _Stage = _Stage.INVITED
    roster: Roster | None = None
    place: int = -1
    shares: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    sharers: tuple[int, ...] = ()
    sent: int = 0
    answers: dict[str, tuple[str, Envelope]] = field(default_factory=dict)

    @property
    def known(self) -> tuple[Roster, int]:
        """The roster and this device's place in it, once there is one."""
        if self.roster is None:
            raise MessageError("session: no roster yet")
        return self.roster, self.place

    def end(self) -> None:
        """Drop every secret; answers stay, for a message that is delivered twice."""
        self.mask_private = self.share_private = b""
        self.seeds, self.shares, self.stage = (), {}, _Stage.REVEALED


def _check_plan(
    session: _Session, plan: Plan, mask: MaskPlan, codes: NDArray[np.int32], sizes: Sequence[int], weight: int
) -> None:
    """Raise MessageError unless this plan may be answered in this session with these codes."""
    roster, place = session.known
    invite, sent = session.invite, len(mask.scales)
    if (plan.federation, plan.round, plan.rank) != (invite.federation, invite.round, invite.rank):
        raise MessageError("plan: federation, round or rank is not the session's")
    if len(sizes) != roster.segments(place) or codes.shape != (sum(sizes),):
        raise MessageError(f"plan: {codes.shape} codes for segments of {list(sizes)}")
    if not 1 <= sent <= roster.sent_segments(session.sharers):
        raise MessageError(f"plan: {sent} segments, of which one has fewer than {invite.min_cohort} devices")
    scales = np.repeat(mask.scales[: len(sizes)], sizes[:sent])
    known = codes[: scales.size].astype(np.float64)
    if max(int(codes.max(initial=0)), -int(codes.min(initial=0))) > mask.largest_code:
        raise MessageError(f"plan: a code beyond {mask.largest_code}")
    if not 1 <= weight <= plan.weight_cap:
        raise MessageError(f"plan: weight {weight} is not in [1, {plan.weight_cap}]")
    try:
        bits = field_bits(len(session.sharers), plan.weight_cap, mask.largest_code, plan.noise_std / min(mask.scales))
    except ValueError as error:
        raise MessageError(f"plan: {error}") from error
    if bits > mask.bits:
        raise MessageError(f"plan: {mask.bits} bits, the sum needs {bits}")
    rounding = 0.5 * float(np.sqrt(scales @ scales))
    if plan.clip_norm and float(np.linalg.norm(known * scales)) > (plan.clip_norm + rounding) * (1 + 1e-6):
        raise MessageError(f"plan: the codes are longer than clip_norm {plan.clip_norm:g}")


def _weighted(
    plan: Plan, mask: MaskPlan, codes: NDArray[np.int32], sizes: Sequence[int], weight: int, random_bytes: RandomBytes
) -> Field:
    """``codes * weight`` and noise modulo 2**bits, of the segments that are sent."""
    values: Field = np.zeros(sum(sizes), field_dtype(mask.bits))
    start = 0
    for size, scale in zip(sizes, mask.scales, strict=False):
        exact = codes[start : start + size].astype(np.int64) * weight
        if plan.noise_std:
            try:
                exact += integer_noise(plan.noise_std / scale, size, random_bytes)
            except ValueError as error:
                raise MessageError(f"plan: {error}") from error
        values[start : start + size] = exact.astype(values.dtype)
        start += size
    return values


def _add_masks(session: _Session, values: Field, sizes: Sequence[int]) -> None:
    """The device's own masks, and one with each other sharer over the segments that both train."""
    roster, place = session.known
    digest, start = roster.digest, 0
    for segment, size in enumerate(sizes):
        key = segment_key(session.seeds[segment], segment, digest)
        add_stream(values[start : start + size], key, subtract=False)
        start += size
    for peer in session.sharers:
        if peer != place:
            key = pair_key(session.mask_private, roster.members[peer].mask_key, digest)
            shared = sum(sizes[: roster.segments(peer)])
            add_stream(values[:shared], key, subtract=place > peer)
