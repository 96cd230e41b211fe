"""What secure aggregation costs beside a plain int8 round, and what epsilon noise buys.

All devices of a round and the server run in this process, with real keys and masks; CPU seconds are those of the
process while it is the device's or the server's turn. Bytes are headers and payloads, both sides' exchanges included;
the adapter's broadcast is the same in both and left out. The plain side encodes, decodes and folds the same values.

    python benchmarks/federated_secure.py [--devices 16 64 256] [--values 100000]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.machine import heading
from edge_runtime.federated.secure import KINDS, SecureSessions
from edge_runtime.formats.codec import Codec, decode, encode
from edge_runtime.formats.envelope import Envelope, header_text, seal, sha256, unseal
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from edge_runtime.formats.masking import quantize_for_mask
from edge_runtime.formats.masking_keys import EnrolledKeys
from edge_runtime.formats.messages import MaskPlan, Plan, Update
from server.aggregation import Accumulator
from server.privacy import Sampling, epsilon
from server.secure_sum import Member, SecureSettings, SecureSum, run_secure_round
from server.transport import Arrival

RANK, LARGEST_CODE, DELTA = 8, 127, 1e-5
FEDERATION = "bench"


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--values", type=int, default=100_000)
    options = parser.parse_args()
    layout = AdapterLayout("ab" * 32, (Module("q_proj", 8, options.values // RANK),), (RANK,), 16.0)
    print(heading(f"a masked round of {layout.size(('b',), RANK):,} values beside a plain int8 round"))
    print(
        "| devices | lost after masking | bits | CPU ms a device | plain | CPU s server | plain "
        "| kB up a device | plain | kB down a device |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for count in options.devices:
        for lost in (0, count // 3):
            print(_row(layout, count, lost))
    print("\n" + heading(f"epsilon at delta {DELTA:g}") + "\n" + _epsilon_table())
    return 0


@dataclass
class Fleet:
    """Every device, and the transport between them and the server, in one process."""

    layout: AdapterLayout
    sessions: list[SecureSessions]
    deltas: list[np.ndarray]
    lost: Collection[int] = ()
    waiting: dict[str, tuple[int, Envelope]] = field(default_factory=dict)
    pushed: int = 0
    device_s: float = 0.0
    bytes_up: int = 0  # of the last device, which is never lost
    now_s: float = 0.0
    bits: int = 0

    def nodes(self) -> list[int]:
        return list(range(len(self.sessions)))

    def push(self, messages: Sequence[tuple[int, Envelope]], ttl_s: float, group: str) -> list[str]:
        ids = [f"{group}/{self.pushed + index}" for index in range(len(messages))]
        self.pushed += len(messages)
        self.waiting |= dict(zip(ids, messages, strict=True))
        return ids

    def pull(self, message_ids: Collection[str]) -> list[Arrival]:
        for message_id in message_ids:
            if message_id in self.waiting:
                node, envelope = self.waiting.pop(message_id)
                if node in self.lost and envelope.kind == "plan":
                    continue
                started_s = time.process_time()
                reply = self.answer(node, envelope)
                self.device_s += time.process_time() - started_s
                if node == len(self.sessions) - 1:
                    self.bytes_up += len(header_text(reply)) + len(reply.payload)
                return [Arrival(message_id, node, reply)]
        return []

    def answer(self, node: int, envelope: Envelope) -> Envelope:
        if envelope.kind in KINDS:
            return self.sessions[node].handle(envelope)
        plan = unseal(envelope, Plan)
        assert plan.mask is not None
        self.bits = plan.mask.bits
        sizes = self.layout.segment_sizes(("b",), RANK)
        codes, _ = quantize_for_mask(self.deltas[node], sizes, plan.mask)
        payload = self.sessions[node].mask(plan, codes, sizes, 1)
        return seal(_update(plan, payload), payload)

    def clock(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.now_s += pause_s


def _row(layout: AdapterLayout, count: int, lost: int) -> str:
    keys = [Ed25519PrivateKey.generate() for _ in range(count)]
    raw = [key.public_key().public_bytes_raw() for key in keys]
    enrolled = EnrolledKeys(FEDERATION, 1, frozenset(raw))
    rng = np.random.default_rng(count)
    deltas = [rng.normal(0, 0.01, layout.size(("b",), RANK)).astype(np.float32) for _ in keys]
    fleet = Fleet(layout, [SecureSessions(key, enrolled) for key in keys], deltas, range(lost))
    members = [Member(node, f"d{node}", public.hex(), RANK) for node, public in enumerate(raw)]
    settings = SecureSettings(3, LARGEST_CODE, 10.0, 100.0)
    started_s = time.process_time()
    result = run_secure_round(
        fleet,
        members,
        lambda member, mask: seal(_plan(layout, member.node, mask)),
        layout,
        ("b",),
        settings,
        (0.05 / LARGEST_CODE,),
        os.urandom(32),
        fleet.clock,
        fleet.sleep,
        federation=FEDERATION,
        number=1,
    )
    total_s = time.process_time() - started_s
    assert isinstance(result, SecureSum), result
    plan_bytes = count * len(header_text(seal(_plan(layout, 0, MaskPlan("0" * 64, 16, (1.0,), 1)))))
    device_s, server_s, plain_bytes = _plain(layout, deltas[lost:])
    return (
        f"| {count} | {lost} | {fleet.bits} | {fleet.device_s / count * 1e3:.0f} | {device_s * 1e3:.1f} "
        f"| {total_s - fleet.device_s:.2f} | {server_s:.2f} | {fleet.bytes_up / 1e3:.0f} "
        f"| {plain_bytes / 1e3:.0f} | {(result.tally.bytes_down - plan_bytes) / count / 1e3:.0f} |"
    )


def _plain(layout: AdapterLayout, deltas: Sequence[np.ndarray]) -> tuple[float, float, int]:
    """(CPU seconds of a device, of the server, bytes up of a device)."""
    sizes, accumulator = layout.segment_sizes(("b",), RANK), Accumulator(layout, ("b",))
    device_s = server_s = 0.0
    for delta in deltas:
        started_s = time.process_time()
        payload = encode(delta, sizes, Codec.INT8)
        device_s += time.process_time() - started_s
        started_s = time.process_time()
        accumulator.fold(decode(payload, sizes, Codec.INT8), RANK, 1)
        server_s += time.process_time() - started_s
    started_s = time.process_time()
    accumulator.mean()
    server_s += time.process_time() - started_s
    header = _update(_plan(layout, 0, None), payload)
    return device_s / len(deltas), server_s, len(header_text(seal(header))) + len(payload)


def _plan(layout: AdapterLayout, node: int, mask: MaskPlan | None) -> Plan:
    name = f"{mask.session if mask else ''}/{node}"
    return Plan(
        federation=FEDERATION,
        layout_digest=layout.digest,
        round=1,
        plan_id=hashlib.sha256(name.encode()).hexdigest(),
        phase=Phase.B,
        rank=RANK,
        steps=10,
        batch_sequences=8,
        sequence_tokens=128,
        learning_rate=0.005,
        learning_rate_b=0.005,
        weight_decay=0.0,
        seed=0,
        data_seed=0,
        codec=Codec.INT8,
        residual_decay=1.0,
        weight_cap=1,
        clip_norm=0.0,
        noise_std=0.0,
        folded="",
        deadline_s=100.0,
        mask=mask,
        parts=(),
        payload_sha256=sha256(b""),
    )


def _update(plan: Plan, payload: bytes) -> Update:
    return Update(
        plan_id=plan.plan_id,
        layout_digest=plan.layout_digest,
        base_digest="ab" * 32,
        round=plan.round,
        phase=plan.phase,
        rank=plan.rank,
        codec=plan.codec,
        weight=1,
        steps=plan.steps,
        tokens=1024,
        loss_before=2.0,
        loss_after=1.9,
        norm=0.0,
        step_s=0.5,
        payload_sha256=sha256(payload),
    )


def _epsilon_table() -> str:
    lines = [
        "| cohort | rounds | noise multiplier | known rounds (busiest device's) | fixed size, unseen | Poisson |",
        "|---|---|---|---|---|---|",
    ]
    for cohort, population, rounds in ((10, 40, 60), (100, 1000, 100), (100, 10_000, 200)):
        rng = np.random.default_rng(0)
        taken = np.zeros(population, int)
        for _ in range(rounds):
            taken[rng.choice(population, cohort, replace=False)] += 1
        for multiplier in (0.5, 1.0, 2.0, 4.0, 8.0):
            known = epsilon(int(taken.max()), 1.0, multiplier, DELTA, Sampling.NONE)
            fixed, poisson = (
                epsilon(rounds, cohort / population, multiplier, DELTA, sampling)
                for sampling in (Sampling.FIXED, Sampling.POISSON)
            )
            lines.append(
                f"| {cohort} of {population} | {rounds} | {multiplier:g} | {known:.2f} ({taken.max()}) "
                f"| {fixed:.2f} | {poisson:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
