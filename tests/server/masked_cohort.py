"""Devices of a masked round in one process, and a transport that loses or changes what it is told to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from edge_runtime.federated.secure import KINDS, SecureSessions
from edge_runtime.formats.codec import Codec
from edge_runtime.formats.envelope import Envelope, seal, sha256, unseal
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from edge_runtime.formats.masking_keys import EnrolledKeys
from edge_runtime.formats.messages import Decline, MaskPlan, Plan, Reason, Update
from server.secure_sum import Abandoned, Member, SecureSettings, SecureSum, run_secure_round
from server.transport import Arrival

FEDERATION, ROUND = "home", 3
LAYOUT = AdapterLayout("ab" * 32, (Module("k_proj", 5, 3), Module("q_proj", 7, 9)), (2, 4, 8), 16.0)
GROUPS = ("a", "b")
SIZES = LAYOUT.segment_sizes(GROUPS, LAYOUT.max_rank)
SETTINGS = SecureSettings(min_cohort=2, largest_code=127, stage_timeout_s=10.0, deadline_s=100.0, weight_cap=9)
SCALES = (0.5, 0.25, 0.125)

Change = Callable[[int, Envelope], Envelope | None]


def random_source(*seed: int) -> Callable[[int], bytes]:
    """Reproducible bytes in place of the operating system's."""
    generator = np.random.default_rng(seed)
    return generator.bytes


@dataclass
class Device:
    """One member: its codes and weight, and what it says."""

    node: int
    rank: int
    codes: NDArray[np.int32]
    weight: int
    key: Ed25519PrivateKey
    sessions: SecureSessions

    def answer(self, envelope: Envelope) -> Envelope:
        if envelope.kind in KINDS:
            return self.sessions.handle(envelope)
        plan = unseal(envelope, Plan)
        assert plan.mask is not None
        payload = self.sessions.mask(plan, self.codes, LAYOUT.segment_sizes(GROUPS, self.rank), self.weight)
        return seal(update_for(plan, payload, self.weight), payload)


def update_for(plan: Plan, payload: bytes, weight: int) -> Update:
    return Update(
        plan_id=plan.plan_id,
        layout_digest=plan.layout_digest,
        base_digest=LAYOUT.base_digest,
        round=plan.round,
        phase=plan.phase,
        rank=plan.rank,
        codec=plan.codec,
        weight=weight,
        steps=1,
        tokens=10,
        loss_before=2.0,
        loss_after=1.0,
        norm=1.0,
        step_s=0.1,
        payload_sha256=sha256(payload),
    )


def plan_for(node: int, rank: int, mask: MaskPlan, settings: SecureSettings = SETTINGS, clip_norm: float = 0.0) -> Plan:
    return Plan(
        federation=FEDERATION,
        layout_digest=LAYOUT.digest,
        round=ROUND,
        plan_id=hashlib.sha256(f"{mask.session}/{node}".encode()).hexdigest(),
        phase=Phase.BOTH,
        rank=rank,
        steps=1,
        batch_sequences=1,
        sequence_tokens=8,
        learning_rate=0.1,
        learning_rate_b=0.1,
        weight_decay=0.0,
        seed=0,
        data_seed=0,
        codec=Codec.INT8,
        residual_decay=1.0,
        weight_cap=settings.weight_cap,
        clip_norm=clip_norm,
        noise_std=settings.noise_std,
        folded="",
        deadline_s=100.0,
        mask=mask,
        parts=(),
        payload_sha256=sha256(b""),
    )


def make_devices(ranks: Sequence[int], seed: int = 0, enrolled: bool = True, weight_cap: int = 9) -> list[Device]:
    """Devices with random codes up to the largest, and random weights."""
    generator = np.random.default_rng([seed, 1])
    keys = [Ed25519PrivateKey.from_private_bytes(generator.bytes(32)) for _ in ranks]
    known = EnrolledKeys(FEDERATION, 1, frozenset(key.public_key().public_bytes_raw() for key in keys))
    return [
        Device(
            node=100 + 7 * index,
            rank=rank,
            codes=generator.integers(-127, 128, LAYOUT.size(GROUPS, rank)).astype(np.int32),
            weight=int(generator.integers(1, weight_cap + 1)),
            key=key,
            sessions=SecureSessions(key, known if enrolled else None, random_source(seed, 2, index)),
        )
        for index, (rank, key) in enumerate(zip(ranks, keys, strict=True))
    ]


@dataclass
class Cohort:
    """The transport: answers come one a pull, in the order of ``shuffle``.

    Attributes:
        silent: By device, the kind of the first message that it no longer answers.
        change: Called with node and reply; None loses it.
    """

    devices: list[Device]
    silent: Mapping[int, str] = field(default_factory=dict)
    change: Change = lambda node, envelope: envelope
    shuffle: int = 0
    now_s: float = 0.0
    sent: list[tuple[int, Envelope]] = field(default_factory=list)
    received: list[tuple[int, Envelope]] = field(default_factory=list)
    waiting: dict[str, tuple[int, Envelope]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)

    def nodes(self) -> list[int]:
        return [device.node for device in self.devices]

    def push(self, messages: Sequence[tuple[int, Envelope]], ttl_s: float, group: str) -> list[str]:
        ids = [f"{group}/{len(self.sent) + index}" for index in range(len(messages))]
        self.sent.extend(messages)
        self.waiting |= dict(zip(ids, messages, strict=True))
        return ids

    def pull(self, message_ids: Collection[str]) -> list[Arrival]:
        known = sorted(set(message_ids) & set(self.waiting), key=lambda name: sha256(f"{self.shuffle}{name}".encode()))
        for message_id in known:
            node, envelope = self.waiting.pop(message_id)
            place = self.nodes().index(node)
            if self.silent.get(place) == envelope.kind:
                self.gone.add(node)
            reply = None if node in self.gone else self.change(node, self.devices[place].answer(envelope))
            if reply is not None:
                self.received.append((node, reply))
                return [Arrival(message_id, node, reply)]
        return []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s


def run(
    cohort: Cohort,
    settings: SecureSettings = SETTINGS,
    scales: Sequence[float] = SCALES,
    session_seed: bytes = b"attempt 1",
    ranks: Mapping[int, int] | None = None,
) -> SecureSum | Abandoned:
    """A round over the cohort."""
    members = [
        Member(device.node, f"device-{index}", device.key.public_key().public_bytes_raw().hex(), device.rank)
        for index, device in enumerate(cohort.devices)
    ]
    if ranks:
        members = [replace(member, rank=ranks.get(member.node, member.rank)) for member in members]
    return run_secure_round(
        cohort,
        members,
        lambda member, mask: seal(plan_for(member.node, member.rank, mask, settings)),
        LAYOUT,
        GROUPS,
        settings,
        scales,
        session_seed,
        cohort.clock,
        cohort.sleep,
        federation=FEDERATION,
        number=ROUND,
    )


def decline(reason: Reason = Reason.BATTERY) -> Envelope:
    return seal(Decline(reason, "", 60.0))


def plain_sum(devices: Sequence[Device], opened: Sequence[bool] = (True, True, True)) -> NDArray[np.int64]:
    """What the sum must be: NumPy's, over the opened segments."""
    rows = np.zeros((len(devices), sum(SIZES)), np.int64)
    for row, device in zip(rows, devices, strict=True):
        row[: device.codes.size] = device.codes.astype(np.int64) * device.weight
    total: NDArray[np.int64] = np.sum(rows, axis=0)
    total[~np.repeat(opened, SIZES)] = 0
    return total
