"""A round in which the server learns the sum of the updates and no single one.

It drives the stages of ``masking_messages`` over a transport, adds each masked update to a sum modulo 2**bits and
forgets it, then takes the masks away with the shares that the survivors reveal. Up to a third of the members may be
lost at any stage; with fewer left the round is abandoned, and the next attempt begins with new keys. The server sees
headers and the sum: a member that lies about its values spoils the round, unnoticed while the sum stays in range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.envelope import Envelope, check_payload, seal, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout
from edge_runtime.formats.masking import field_bits
from edge_runtime.formats.masking_keys import check_keys
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
    RosterEntry,
    bundle_bytes,
    pack_roster,
    split_payload,
)
from edge_runtime.formats.messages import MaskPlan, Plan, Update
from edge_runtime.formats.secret_sharing import SHARE_BYTES, read_share
from server.gates import Refusal
from server.masked_sum import MaskedAccumulator
from server.secure_talk import Member, Refused, SecureSettings, Talk, Tally, TooFew
from server.transport import Transport

_MARGIN = 4.0  # of the largest code over the largest |value| of a mean
_FINEST = 2.0**-16  # of the widest scale

__all__ = ["Abandoned", "Member", "SecureSettings", "SecureSum", "Tally", "choose_scales", "run_secure_round"]


@dataclass(frozen=True, slots=True)
class SecureSum:
    """An unmasked sum.

    Attributes:
        sums: (N,) int64 at rank r_max: codes times weights, summed; zero where no sum was opened.
        scales: What a code stands for, one a segment that was sent.
        weights: Sum of weights, one a segment; 0: not opened, it stays as it is.
        contributors: Number of devices, one a segment.
        updates: Headers of the updates in the sum, by node, in roster order.
    """

    sums: NDArray[np.int64]
    scales: tuple[float, ...]
    weights: tuple[int, ...]
    contributors: tuple[int, ...]
    updates: dict[int, Update]
    tally: Tally

    def mean(self, sizes: Sequence[int]) -> NDArray[np.float64]:
        """Weighted mean of the deltas (N,); segments that were not opened are zero.

        Args:
            sizes: Values of each segment at rank r_max.
        """
        mean, start = np.zeros(self.sums.shape), 0
        for size, scale, weight in zip(sizes, self.scales, self.weights, strict=False):
            if weight:
                mean[start : start + size] = self.sums[start : start + size] * (scale / weight)
            start += size
        return mean


@dataclass(frozen=True, slots=True)
class Abandoned:
    """No sum: too few are left at ``stage``, or what they sent does not fit together."""

    stage: str
    reason: str
    tally: Tally


def run_secure_round(
    transport: Transport,
    members: Sequence[Member],
    make_plan: Callable[[Member, MaskPlan], Envelope],
    layout: AdapterLayout,
    groups: Sequence[str],
    settings: SecureSettings,
    scales: Sequence[float],
    session_seed: bytes,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    *,
    federation: str,
    number: int,
) -> SecureSum | Abandoned:
    """One attempt at a masked round; returns when it is decided.

    Args:
        transport: Reaches the members.
        members: The cohort.
        make_plan: A member's plan. Its plan_id must differ from session to session: a device's stored reply to
            an earlier one is masked with keys that are gone. Called again for a member that declined because it
            lacks factors.
        layout: The adapter.
        groups: The phase's.
        settings: How.
        scales: What a code stands for, one a rank segment (``choose_scales``).
        session_seed: Fresh random bytes of this attempt.
        clock: Seconds, monotonic.
        sleep: Waits so many seconds.
        federation: Its name.
        number: Of the round.

    Raises:
        ValueError: Members share a node, or the sum does not fit 32 bits.
    """
    if len({member.node for member in members}) != len(members):
        raise ValueError("members must be different nodes")
    name = hashlib.sha256(b"sevenfold mask session v1\x00" + session_seed).hexdigest()
    invite = MaskInvite(name, federation, number, layout.max_rank, layout.ranks, settings.min_cohort)
    talk = Talk(transport, f"round-{number}", clock, sleep)
    try:
        session = _exchange_keys(talk, invite, members, settings)
        bundles, commitments = _exchange_shares(session)
        sharers = tuple(sorted(bundles))
        ready = _deliver(session, bundles)
        mask = _mask_plan(session, sharers, scales)
        sizes = layout.segment_sizes(groups, layout.max_rank)
        accumulator = MaskedAccumulator(session.roster, sharers, sizes, mask, settings.noise_std)
        updates = _collect(session, ready, lambda place: make_plan(session.cohort[place], mask), layout, accumulator)
        revealed = _unmask(session, sharers, sorted(updates), accumulator)
        sums, weights, contributors = accumulator.unmask(revealed, commitments)
    except TooFew as error:
        return Abandoned(error.stage, str(error), talk.tally)
    except MessageError as error:
        return Abandoned("unmask", str(error), talk.tally)
    by_node = {session.cohort[place].node: updates[place] for place in sorted(updates)}
    return SecureSum(sums, mask.scales, weights, contributors, by_node, talk.tally)


def choose_scales(
    previous: Sequence[float],
    mean: NDArray[np.float64] | None,
    sizes: Sequence[int],
    largest_code: int,
    bound: float,
    noise_std: float = 0.0,
) -> tuple[float, ...]:
    """The next round's common scales, one a segment: a pure function of what everybody knows.

    A single device moves further than the mean of many: the largest code stands for 4 times the largest
    |value| of the last mean, and what it cannot hold stays in the device's residual. A scale at most halves from
    round to round. With noise of the devices' own, its deviation is kept between 2 codes, below which a sum of
    discrete Gaussians is none, and 1024, above which finer codes would only cost bits.

    Args:
        previous: The last round's scales of the same groups; empty: there was none.
        mean: (N,) of that round as it was applied (with any central noise, which the scales would tell the devices
            about otherwise), zero where no sum was opened; None: there was none.
        sizes: Values of each segment at rank r_max.
        largest_code: Of one device.
        bound: What no update should exceed: learning rate times local steps, since AdamW moves a value by about
            the learning rate a step.
        noise_std: Of each device's share of distributed noise.
    """
    widest = bound / largest_code
    scales, start = [], 0
    for index, size in enumerate(sizes):
        before = previous[index] if index < len(previous) else widest
        largest = 0.0 if mean is None else float(np.abs(mean[start : start + size]).max(initial=0.0))
        wanted = max(_MARGIN * largest / largest_code, before / 2) if largest else before
        scale = min(max(wanted, widest * _FINEST), widest)
        scales.append(min(max(scale, noise_std / 1024), noise_std / 2) if noise_std else scale)
        start += size
    return tuple(scales)


@dataclass(frozen=True, slots=True)
class _Session:
    """What every stage after the first needs.

    Attributes:
        cohort: Members by their place in the roster.
    """

    talk: Talk
    settings: SecureSettings
    roster: Roster
    cohort: dict[int, Member]

    @property
    def name(self) -> str:
        return self.roster.invite.session

    @property
    def fewest(self) -> int:
        """Members without whom there is no sum."""
        return max(self.roster.threshold, self.settings.min_cohort)

    def same(self, name: str) -> None:
        """Refuse a reply of another session."""
        if name != self.name:
            raise Refused(Refusal.REPLAY)

    def check_left(self, stage: str, count: int) -> None:
        """End the attempt when too few are left."""
        if count < self.fewest:
            raise TooFew(stage, f"{count} of {len(self.cohort)} members are left, {self.fewest} are needed")


def _exchange_keys(talk: Talk, invite: MaskInvite, members: Sequence[Member], settings: SecureSettings) -> _Session:
    """Everybody's signed keys make the roster."""
    by_node = {member.node: member for member in members}
    entries: dict[int, RosterEntry] = {}
    seen: set[bytes] = set()

    def accept(node: int, envelope: Envelope) -> None:
        keys, member = unseal(envelope, MaskKeys), by_node[node]
        raw = [bytes.fromhex(text) for text in (member.public_key, keys.mask_key, keys.share_key, keys.signature)]
        entry = RosterEntry(raw[0], raw[1], raw[2], raw[3], member.rank)
        if keys.session != invite.session:
            raise Refused(Refusal.REPLAY)
        check_keys(invite, entry)
        if not seen.isdisjoint(raw[:3]) or len(set(raw[:3])) != 3:
            raise Refused(Refusal.DUPLICATE)
        seen.update(raw[:3])
        entries[node] = entry

    messages = {member.node: seal(replace(invite, rank=member.rank)) for member in members}
    talk.ask("keys", messages, settings.stage_timeout_s, accept)
    nodes = sorted(entries)
    if len(nodes) < settings.min_cohort:
        raise TooFew("keys", f"{len(nodes)} members, at least {settings.min_cohort}")
    roster = Roster(invite, tuple(entries[node] for node in nodes))
    return _Session(talk, settings, roster, {place: by_node[node] for place, node in enumerate(nodes)})


def _exchange_shares(session: _Session) -> tuple[dict[int, dict[int, bytes]], dict[int, tuple[str, ...]]]:
    """By sender: its encrypted bundle for each other member, and its commitments."""
    roster = session.roster
    places = {member.node: place for place, member in session.cohort.items()}
    bundles: dict[int, dict[int, bytes]] = {}
    commitments: dict[int, tuple[str, ...]] = {}

    def accept(node: int, envelope: Envelope) -> None:
        message, place = unseal(envelope, MaskShares), places[node]
        session.same(message.session)
        if len(message.commitments) != roster.segments(place):
            raise Refused(Refusal.SHAPE)
        peers = [peer for peer in session.cohort if peer != place]
        parts = split_payload(envelope.payload, [bundle_bytes(roster.segments(place))] * len(peers))
        bundles[place] = dict(zip(peers, parts, strict=True))
        commitments[place] = message.commitments

    message = seal(MaskRoster(session.name), pack_roster(roster.members))
    session.talk.ask("shares", dict.fromkeys(places, message), session.settings.stage_timeout_s, accept)
    session.check_left("shares", len(bundles))
    return bundles, commitments


def _deliver(session: _Session, bundles: Mapping[int, Mapping[int, bytes]]) -> list[int]:
    """Hand every sharer the bundles for it; who can mask now."""
    sharers = tuple(sorted(bundles))
    places = {session.cohort[place].node: place for place in sharers}
    ready: list[int] = []

    def accept(node: int, envelope: Envelope) -> None:
        session.same(unseal(envelope, MaskReady).session)
        ready.append(places[node])

    header = MaskDelivery(session.name, sharers)
    messages = {
        node: seal(header, b"".join(bundles[sender][place] for sender in sharers if sender != place))
        for node, place in places.items()
    }
    session.talk.ask("delivery", messages, session.settings.stage_timeout_s, accept)
    session.check_left("delivery", len(ready))
    return sorted(ready)


def _mask_plan(session: _Session, sharers: Sequence[int], scales: Sequence[float]) -> MaskPlan:
    settings = session.settings
    sent = tuple(scales[: session.roster.sent_segments(sharers)])
    noise_codes = settings.noise_std / min(sent)
    bits = field_bits(len(sharers), settings.weight_cap, settings.largest_code, noise_codes)
    return MaskPlan(session.name, bits, sent, settings.largest_code)


def _collect(
    session: _Session,
    ready: Sequence[int],
    make_plan: Callable[[int], Envelope],
    layout: AdapterLayout,
    accumulator: MaskedAccumulator,
) -> dict[int, Update]:
    """Add every masked update as it comes; the headers by place."""
    places = {session.cohort[place].node: place for place in ready}
    messages = {node: make_plan(place) for node, place in places.items()}
    asked = {node: unseal(envelope, Plan) for node, envelope in messages.items()}
    updates: dict[int, Update] = {}
    enough = session.settings.enough and max(session.settings.enough, session.fewest)

    def accept(node: int, envelope: Envelope) -> None:
        update = unseal(envelope, Update)
        _check_header(update, asked[node], layout, session.settings)
        try:
            payload = check_payload(envelope, update.payload_sha256)
        except MessageError as error:
            raise Refused(Refusal.DIGEST) from error
        try:
            accumulator.fold(places[node], payload, update.weight)
        except MessageError as error:
            raise Refused(Refusal.SHAPE) from error
        updates[places[node]] = update

    session.talk.ask(
        "update",
        messages,
        session.settings.deadline_s,
        accept,
        done=lambda: 0 < enough <= len(updates) and all(accumulator.opened()),
        again=lambda node: make_plan(places[node]),
    )
    session.check_left("update", len(updates))
    if not any(accumulator.opened()):
        raise TooFew("update", "no segment has enough updates")
    return updates


def _unmask(
    session: _Session, sharers: Sequence[int], survivors: Sequence[int], accumulator: MaskedAccumulator
) -> dict[int, list[list[bytes]]]:
    """What the first survivors to answer reveal, as many as it takes: for each sharer its shares."""
    places = {session.cohort[place].node: place for place in survivors}
    counts, threshold = accumulator.share_counts(), session.roster.threshold
    revealed: dict[int, list[list[bytes]]] = {}

    def accept(node: int, envelope: Envelope) -> None:
        session.same(unseal(envelope, MaskReveal).session)
        parts = split_payload(envelope.payload, [count * SHARE_BYTES for count in counts])
        shares = [split_payload(part, [SHARE_BYTES] * count) for part, count in zip(parts, counts, strict=True)]
        for share in (share for member in shares for share in member):
            read_share(share)
        if len(revealed) < threshold:
            revealed[places[node]] = shares

    lost = tuple(sorted(set(sharers) - set(survivors)))
    message = seal(MaskUnmask(session.name, tuple(survivors), lost))
    before = dict(session.talk.tally.lost)
    session.talk.ask(
        "unmask",
        dict.fromkeys(places, message),
        session.settings.stage_timeout_s,
        accept,
        done=lambda: len(revealed) >= threshold,
    )
    session.talk.tally.lost = before  # who is silent now is in the sum all the same
    if len(revealed) < threshold:
        raise TooFew("unmask", f"{len(revealed)} members revealed shares, {threshold} are needed")
    return revealed


def _check_header(update: Update, plan: Plan, layout: AdapterLayout, settings: SecureSettings) -> None:
    checks = (
        (Refusal.STALE, update.round == plan.round),
        (Refusal.REPLAY, update.plan_id == plan.plan_id),
        (Refusal.BASE, update.base_digest == layout.base_digest),
        (Refusal.LAYOUT, update.layout_digest == plan.layout_digest),
        (Refusal.PHASE, update.phase is plan.phase),
        (Refusal.RANK, update.rank == plan.rank),
        (Refusal.WEIGHT, update.weight <= min(plan.weight_cap, settings.weight_cap)),
    )
    for refusal, passed in checks:
        if not passed:
            raise Refused(refusal)
