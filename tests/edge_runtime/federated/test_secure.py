"""A device answers an honest session and refuses every change to it.

Devices here draw reproducible bytes, so that the messages of one recorded session can be played to a fresh copy of
the device up to any point, and changed from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.federated.secure import SecureSessions
from edge_runtime.formats.envelope import Envelope, seal, unseal
from edge_runtime.formats.errors import MessageError, SignatureError
from edge_runtime.formats.masking_keys import (
    EnrolledKeys,
    open_enrolled,
    public_bytes,
    sign_enrolled,
    sign_keys,
)
from edge_runtime.formats.masking_messages import (
    MaskDelivery,
    MaskInvite,
    MaskKeys,
    MaskUnmask,
    RosterEntry,
    bundle_bytes,
    pack_roster,
    unpack_roster,
)
from edge_runtime.formats.messages import Decline, Plan
from edge_runtime.formats.signing import TrustStore, fingerprint, sign
from server.secure_sum import SecureSum
from tests.server.masked_cohort import (
    GROUPS,
    LAYOUT,
    Cohort,
    Device,
    make_devices,
    random_source,
    run,
)

RANKS = [8, 8, 8, 4, 8, 2]
STAGES = ("maskinvite", "maskroster", "maskdelivery", "plan", "maskunmask")


@dataclass
class Recorded:
    """What the server sent to the first device, by kind."""

    script: dict[str, Envelope]
    invite: MaskInvite

    def device(self, stage: str, enrolled: bool = True) -> Device:
        """A copy of the first device that has answered everything before ``stage``."""
        device = make_devices(RANKS, enrolled=enrolled)[0]
        for kind in STAGES[: STAGES.index(stage)]:
            assert device.answer(self.script[kind]).kind != "decline"
        return device


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    cohort = Cohort(make_devices(RANKS), silent={4: "plan"})
    assert isinstance(run(cohort), SecureSum)
    script = {envelope.kind: envelope for node, envelope in cohort.sent if node == 100}
    return Recorded(script, unseal(script["maskinvite"], MaskInvite))


def refused(reply: Envelope) -> str:
    decline = unseal(reply, Decline)
    assert decline.reason.value == "invalid"
    return decline.detail


def with_header(envelope: Envelope, **changes: Any) -> Envelope:
    return replace(envelope, header={**envelope.header, **changes})


@pytest.mark.parametrize("stage", ["maskinvite", "maskroster", "maskdelivery", "maskunmask"])
def test_a_message_delivered_twice_gets_the_same_answer(recorded: Recorded, stage: str) -> None:
    device = recorded.device(stage)
    first = device.answer(recorded.script[stage])
    assert first.kind != "decline"
    assert device.answer(recorded.script[stage]) == first


@pytest.mark.parametrize("stage", ["maskroster", "maskdelivery", "maskunmask"])
def test_stages_cannot_be_skipped(recorded: Recorded, stage: str) -> None:
    device = recorded.device(STAGES[STAGES.index(stage) - 1])
    assert refused(device.answer(recorded.script[stage]))
    unknown = make_devices(RANKS)[0]
    assert "unknown" in refused(unknown.answer(recorded.script[stage]))


def test_another_invitation_in_the_same_session_is_refused(recorded: Recorded) -> None:
    device = recorded.device("maskroster")
    assert "another" in refused(device.answer(with_header(recorded.script["maskinvite"], round=4)))


def test_a_session_that_ended_cannot_be_played_again(recorded: Recorded) -> None:
    device = recorded.device("maskunmask")
    other = with_header(recorded.script["maskinvite"], session="77" * 32)
    assert device.answer(other).kind == "maskkeys"
    for kind in ("maskinvite", "maskroster", "maskdelivery", "maskunmask"):
        assert refused(device.answer(recorded.script[kind]))
    plan = unseal(recorded.script["plan"], Plan)
    with pytest.raises(MessageError, match="unknown"):
        device.sessions.mask(plan, device.codes, LAYOUT.segment_sizes(GROUPS, 8), 1)


def test_another_federations_session_stays(recorded: Recorded) -> None:
    device = make_devices(RANKS, enrolled=False)[0]
    device.answer(recorded.script["maskinvite"])
    other = with_header(recorded.script["maskinvite"], session="77" * 32, federation="work")
    assert device.answer(other).kind == "maskkeys"
    assert device.answer(recorded.script["maskroster"]).kind == "maskshares"


def test_new_sessions_push_out_the_oldest_only(recorded: Recorded) -> None:
    device = make_devices(RANKS, enrolled=False)[0]
    device.answer(recorded.script["maskinvite"])
    for index in range(40):
        other = with_header(recorded.script["maskinvite"], session=f"{index:064x}", federation=f"f{index}")
        assert device.answer(other).kind == "maskkeys"
    assert refused(device.answer(recorded.script["maskroster"]))


@pytest.mark.parametrize(
    "changes",
    [{"ranks": [8, 4, 2]}, {"ranks": [2, 4]}, {"ranks": [2, 2, 8]}, {"min_cohort": 2}, {"federation": "work"}],
)
def test_an_invitation_that_does_not_suit_is_declined(recorded: Recorded, changes: dict[str, Any]) -> None:
    key = make_devices(RANKS)[0].key
    known = EnrolledKeys(recorded.invite.federation, 1, frozenset({key.public_key().public_bytes_raw()}))
    sessions = SecureSessions(key, known, random_source(1), least_cohort=3)
    assert refused(sessions.handle(with_header(recorded.script["maskinvite"], **changes)))


Tamper = Callable[[list[RosterEntry], MaskInvite], list[RosterEntry]]


def change_entry(place: int, **changes: Any) -> Tamper:
    return lambda members, invite: [
        replace(member, **changes) if index == place else member for index, member in enumerate(members)
    ]


def signed_by_a_stranger(members: list[RosterEntry], invite: MaskInvite) -> list[RosterEntry]:
    """A device that the server made up: every signature in the roster is valid."""
    stranger = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
    keys = (public_bytes(b"m" * 32), public_bytes(b"n" * 32))
    signature = sign_keys(invite, 8, *keys, stranger)
    return [*members[:1], RosterEntry(stranger.public_key().public_bytes_raw(), *keys, signature, 8), *members[2:]]


def signed_for(**changes: Any) -> Tamper:
    """The second device's true keys and signature of another session or round."""

    def tamper(members: list[RosterEntry], invite: MaskInvite) -> list[RosterEntry]:
        device = make_devices(RANKS)[1]
        entry = members[1]
        signature = sign_keys(replace(invite, **changes), entry.rank, entry.mask_key, entry.share_key, device.key)
        return [members[0], replace(entry, signature=signature), *members[2:]]

    return tamper


ROSTERS: dict[str, tuple[Tamper, str]] = {
    "signature": (change_entry(1, signature=b"\x01" * 64), "not signed"),
    "mask key": (change_entry(1, mask_key=public_bytes(b"m" * 32)), "not signed"),
    "share key": (change_entry(1, share_key=public_bytes(b"m" * 32)), "not signed"),
    "rank": (change_entry(1, rank=4), "not signed"),
    "impossible rank": (change_entry(1, rank=5), "rank"),
    "device key": (change_entry(1, public_key=b"\x05" * 32), "list of enrolled"),
    "own mask key": (change_entry(0, mask_key=public_bytes(b"m" * 32)), "own keys"),
    "own rank": (change_entry(0, rank=4), "own keys"),
    "own signature": (change_entry(0, signature=b"\x01" * 64), "not signed"),
    "another session": (signed_for(session="77" * 32), "not signed"),
    "another round": (signed_for(round=4), "not signed"),
    "another federation": (signed_for(federation="hom"), "not signed"),
    "a stranger": (signed_by_a_stranger, "list of enrolled"),
    "twice": (lambda members, invite: [*members, members[1]], "twice"),
    "own twice": (lambda members, invite: [*members, replace(members[1], mask_key=members[0].mask_key)], "twice"),
    "without it": (lambda members, invite: members[1:], "not in it"),
    "alone": (lambda members, invite: members[:1], "at least"),
}


@pytest.mark.parametrize("name", ROSTERS)
def test_a_changed_roster_is_refused(recorded: Recorded, name: str) -> None:
    tamper, message = ROSTERS[name]
    members = list(unpack_roster(recorded.script["maskroster"].payload, recorded.invite).members)
    changed = pack_roster(tamper(members, recorded.invite))
    reply = recorded.device("maskroster").answer(replace(recorded.script["maskroster"], payload=changed))
    assert message in refused(reply)


def test_without_a_signed_list_an_invented_device_passes_and_the_log_says_so(
    recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        device = recorded.device("maskroster", enrolled=False)
    assert "no signed list" in caplog.text
    members = list(unpack_roster(recorded.script["maskroster"].payload, recorded.invite).members)
    changed = pack_roster(signed_by_a_stranger(members, recorded.invite))
    assert device.answer(replace(recorded.script["maskroster"], payload=changed)).kind == "maskshares"


def test_a_device_says_how_many_keys_it_knows(recorded: Recorded) -> None:
    for enrolled, known in ((True, len(RANKS)), (False, 0)):
        device = make_devices(RANKS, enrolled=enrolled)[0]
        assert unseal(device.answer(recorded.script["maskinvite"]), MaskKeys).enrolled == known


def test_a_second_other_roster_is_refused(recorded: Recorded) -> None:
    device = recorded.device("maskdelivery")
    members = unpack_roster(recorded.script["maskroster"].payload, recorded.invite).members
    smaller = replace(recorded.script["maskroster"], payload=pack_roster(members[:-1]))
    assert "another" in refused(device.answer(smaller))


def test_devices_that_saw_different_rosters_cannot_read_each_others_shares(recorded: Recorded) -> None:
    members = unpack_roster(recorded.script["maskroster"].payload, recorded.invite).members
    device = recorded.device("maskroster")
    fewer = replace(recorded.script["maskroster"], payload=pack_roster(members[:-1]))
    assert device.answer(fewer).kind == "maskshares"
    sharers = list(range(len(members) - 1))
    payload = recorded.script["maskdelivery"].payload[: -bundle_bytes(1)]
    reply = device.answer(seal(MaskDelivery(recorded.invite.session, tuple(sharers)), payload))
    assert "not for this device" in refused(reply)


def test_a_key_that_makes_every_secret_zero_is_refused(recorded: Recorded) -> None:
    device, peer = recorded.device("maskroster"), make_devices(RANKS)[1]
    members = list(unpack_roster(recorded.script["maskroster"].payload, recorded.invite).members)
    zero = bytes(32)
    signature = sign_keys(recorded.invite, 8, members[1].mask_key, zero, peer.key)
    members[1] = replace(members[1], share_key=zero, signature=signature)
    reply = device.answer(replace(recorded.script["maskroster"], payload=pack_roster(members)))
    assert "zero" in refused(reply)


def test_shares_of_another_peer_are_refused(recorded: Recorded) -> None:
    envelope = recorded.script["maskdelivery"]
    size = bundle_bytes(3)
    first, second = envelope.payload[:size], envelope.payload[size : 2 * size]
    for payload in (second + first + envelope.payload[2 * size :], first + first + envelope.payload[2 * size :]):
        reply = recorded.device("maskdelivery").answer(replace(envelope, payload=payload))
        assert "member 1" in refused(reply) or "member 2" in refused(reply)


def test_bundles_for_another_receiver_are_refused(recorded: Recorded) -> None:
    cohort = Cohort(make_devices(RANKS), silent={4: "plan"})
    run(cohort)
    other = next(envelope for node, envelope in cohort.sent if node == 107 and envelope.kind == "maskdelivery")
    assert "not for this device" in refused(recorded.device("maskdelivery").answer(other))


@pytest.mark.parametrize(
    "sharers", [[0, 1, 2], [1, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5], [0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 9]]
)
def test_wrong_sharers_are_refused(recorded: Recorded, sharers: list[int]) -> None:
    envelope = with_header(recorded.script["maskdelivery"], sharers=sharers)
    assert refused(recorded.device("maskdelivery").answer(envelope))


@pytest.mark.parametrize(
    ("changes", "mask", "message"),
    [
        ({}, {"session": "77" * 32}, "unknown"),
        ({"round": 4}, {}, "session's"),
        ({"federation": "work"}, {}, "session's"),
        ({"rank": 4}, {}, "session's"),
        ({}, {"bits": 13}, "needs 14"),
        ({"weight_cap": 10}, {}, None),
        ({"weight_cap": 11}, {}, "needs 15"),
        ({}, {"scales": (0.5, 0.25, 0.125, 0.1)}, "fewer than"),
        ({}, {"scales": ()}, "fewer than"),
        ({}, {"largest_code": 126}, "beyond 126"),
        ({"noise_std": 1000.0}, {}, "needs"),
        ({"noise_std": 1e6}, {"bits": 32}, "noise of"),
        ({"clip_norm": 1.0}, {}, "clip_norm"),
        ({"clip_norm": 1000.0}, {}, None),
    ],
)
def test_a_plan_outside_the_session_or_too_narrow_is_refused(
    recorded: Recorded, changes: dict[str, Any], mask: dict[str, Any], message: str | None
) -> None:
    device = recorded.device("plan")
    plan = unseal(recorded.script["plan"], Plan)
    assert plan.mask is not None and plan.mask.bits == 14
    changed = replace(plan, **{"mask": replace(plan.mask, **mask), **changes})
    sizes = LAYOUT.segment_sizes(GROUPS, 8)
    if message is None:
        assert device.sessions.mask(changed, device.codes, sizes, 1)
        return
    with pytest.raises(MessageError, match=message):
        device.sessions.mask(changed, device.codes, sizes, 1)
    assert device.sessions.mask(plan, device.codes, sizes, 1)  # the refusal used nothing up


def test_masks_are_used_once(recorded: Recorded) -> None:
    device, plan = recorded.device("maskunmask"), unseal(recorded.script["plan"], Plan)
    with pytest.raises(MessageError, match="masked, not ready"):
        device.sessions.mask(plan, device.codes, LAYOUT.segment_sizes(GROUPS, 8), device.weight)


@pytest.mark.parametrize("weight", [0, 10])
def test_a_weight_outside_the_plan_is_refused(recorded: Recorded, weight: int) -> None:
    device, plan = recorded.device("plan"), unseal(recorded.script["plan"], Plan)
    with pytest.raises(MessageError, match="weight"):
        device.sessions.mask(plan, device.codes, LAYOUT.segment_sizes(GROUPS, 8), weight)


def test_codes_of_another_length_are_refused(recorded: Recorded) -> None:
    device, plan = recorded.device("plan"), unseal(recorded.script["plan"], Plan)
    sizes = LAYOUT.segment_sizes(GROUPS, 8)
    for codes, cut in ((device.codes[:-1], sizes), (device.codes, sizes[:2])):
        with pytest.raises(MessageError, match="codes for segments"):
            device.sessions.mask(plan, codes, cut, 1)
    with pytest.raises(MessageError, match="not set"):
        device.sessions.mask(replace(plan, mask=None), device.codes, sizes, 1)


@pytest.mark.parametrize(
    ("survivors", "lost"),
    [
        ((0, 1, 2), (3, 4, 5)),  # too few
        ((1, 2, 3, 4, 5), (0,)),  # without this device
        ((0, 1, 2, 3, 4, 5), (4,)),  # both shares of one
        ((0, 1, 2, 3), (4,)),  # one is forgotten
        ((0, 1, 2, 3, 4, 5, 6), ()),  # one is invented
        ((1, 0, 2, 3), (4, 5)),
        ((0, 1, 2, 3, 3), (4, 5)),
    ],
)
def test_a_wrong_unmasking_is_refused(recorded: Recorded, survivors: tuple[int, ...], lost: tuple[int, ...]) -> None:
    device = recorded.device("maskunmask")
    assert refused(device.answer(seal(MaskUnmask(recorded.invite.session, survivors, lost))))
    assert device.answer(recorded.script["maskunmask"]).kind == "maskreveal"


def test_a_second_other_unmasking_is_refused_and_secrets_are_gone(recorded: Recorded) -> None:
    device = recorded.device("maskunmask")
    first = device.answer(recorded.script["maskunmask"])
    other = MaskUnmask(recorded.invite.session, (0, 1, 2, 4, 5), (3,))
    assert "another" in refused(device.answer(seal(other)))
    session = next(iter(device.sessions._sessions.values()))
    assert (session.mask_private, session.share_private, session.seeds, session.shares) == (b"", b"", (), {})
    assert device.answer(recorded.script["maskunmask"]) == first


def test_what_is_revealed_is_one_kind_of_share_a_member(recorded: Recorded) -> None:
    device = recorded.device("maskunmask")
    session = next(iter(device.sessions._sessions.values()))
    held = {place: tuple(shares) for place, shares in session.shares.items()}
    payload = device.answer(recorded.script["maskunmask"]).payload
    shares = {payload[start : start + 33] for start in range(0, len(payload), 33)}
    for place, (key_share, *seed_shares) in held.items():
        assert (key_share in shares) == (place == 4)
        assert all((share in shares) == (place != 4) for share in seed_shares)


def test_the_same_codes_under_other_masks_share_nothing_and_masks_hide_only_by_adding(recorded: Recorded) -> None:
    from edge_runtime.formats.masking import unpack_bits

    plan, sizes = unseal(recorded.script["plan"], Plan), LAYOUT.segment_sizes(GROUPS, 8)
    assert plan.mask is not None
    codes = np.arange(sum(sizes), dtype=np.int32) % 100
    length = -(-sizes[0] * plan.mask.bits // 8)

    def masked(values: np.ndarray) -> np.ndarray:
        payload = recorded.device("plan").sessions.mask(plan, values, sizes, 3)
        return unpack_bits(payload[:length], sizes[0], plan.mask.bits).astype(np.int64)

    difference = (masked(codes) - masked(np.zeros_like(codes))) % 2**plan.mask.bits
    assert np.array_equal(difference, 3 * codes[: sizes[0]])


@pytest.mark.parametrize("seed", range(6))
def test_no_message_makes_it_raise(recorded: Recorded, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = [None, -1, 2**70, 0.5, True, "", "x" * 300, "é", [], [1, 2], [None], {}, {"a": 1}, "00" * 32, "0" * 128]
    for stage in ("maskinvite", "maskroster", "maskdelivery", "maskunmask"):
        envelope = recorded.script[stage]
        device = recorded.device(stage)
        for _ in range(40):
            header, payload = dict(envelope.header), bytearray(envelope.payload)
            name = str(generator.choice(sorted(header)))
            kind = int(generator.integers(5))
            if kind == 0:
                header[name] = values[int(generator.integers(len(values)))]
            elif kind == 1:
                del header[name]
            elif kind == 2 and payload:
                payload[int(generator.integers(len(payload)))] ^= 1 << int(generator.integers(8))
            elif kind == 3:
                payload = payload[: int(generator.integers(len(payload) + 1))] or bytearray(b"x")
            else:
                payload += generator.bytes(int(generator.integers(1, 200)))
            changed = Envelope(stage, header, bytes(payload))
            reply = device.answer(changed)
            if changed != envelope and stage != "maskinvite":
                refused(reply)
        assert recorded.device(stage).answer(envelope).kind != "decline"
    assert "belongs to no" in refused(recorded.device("plan").sessions.handle(Envelope("score", {}, b"")))


def operator(*bytes_of_key: int) -> tuple[Ed25519PrivateKey, TrustStore]:
    key = Ed25519PrivateKey.from_private_bytes(bytes(bytes_of_key))
    return key, TrustStore({fingerprint(key.public_key()): key.public_key()})


def test_the_list_of_enrolled_devices_is_read_with_a_trusted_signature_only() -> None:
    key, trusted = operator(*range(32))
    stranger, _ = operator(*range(1, 33))
    enrolled = EnrolledKeys("home", 7, frozenset({b"a" * 32, b"b" * 32}))
    envelope = sign_enrolled(enrolled, key)
    assert open_enrolled(envelope, trusted) == enrolled
    with pytest.raises(SignatureError, match="not trusted"):
        open_enrolled(sign_enrolled(enrolled, stranger), trusted)
    for changed in (
        with_header(envelope, serial=8),
        with_header(envelope, federation="work"),
        replace(envelope, payload=b"a" * 32 + b"c" * 32),
        replace(envelope, payload=b"a" * 32),
    ):
        with pytest.raises(SignatureError, match="changed"):
            open_enrolled(changed, trusted)
    for payload in (b"", b"a" * 31, b"b" * 32 + b"a" * 32, b"a" * 64):
        with pytest.raises(MessageError, match="payload"):
            open_enrolled(replace(envelope, payload=payload), trusted)


def test_a_package_signature_is_none_for_a_list() -> None:
    key, trusted = operator(*range(32))
    envelope = sign_enrolled(EnrolledKeys("home", 7, frozenset({b"a" * 32})), key)
    signed = b"\x00\x04home" + (7).to_bytes(8, "big") + b"a" * 32
    as_package = sign(signed, key).decode().rstrip("\n")
    with pytest.raises(SignatureError, match="changed"):
        open_enrolled(with_header(envelope, signature=as_package), trusted)
