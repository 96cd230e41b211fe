"""A trainer whose gradients are written down by hand, and a resident around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from edge_runtime.federated.data import LocalData, Retention
from edge_runtime.federated.resident import Resident, Surroundings
from edge_runtime.federated.secure import SecureSessions
from edge_runtime.federated.state import DeviceState
from edge_runtime.formats.broadcast import initial_vector, pack_parts, take_snapshot
from edge_runtime.formats.codec import Codec
from edge_runtime.formats.envelope import Envelope, seal, sha256
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from edge_runtime.formats.manifest import FileEntry, Manifest
from edge_runtime.formats.messages import Decline, Plan, ScorePlan, hello
from tests.edge_runtime.fakes import BOS, EOS, SPEC, VOCAB_SIZE

BASE_DIGEST = "ab" * 32
SEED = 11
TARGETS = ("q_proj", "v_proj")
Floats = NDArray[np.float32]


def small_layout(ranks: tuple[int, ...] = (2, 4), base_digest: str = BASE_DIGEST) -> AdapterLayout:
    shapes = {name: SPEC.projection_shape(target) for name, target in SPEC.module_names(TARGETS)}
    modules = tuple(Module(name, columns, rows) for name, (rows, columns) in sorted(shapes.items()))
    return AdapterLayout(base_digest, modules, ranks, 8.0)


def small_manifest(base_digest: str = BASE_DIGEST) -> Manifest:
    files = {"tokenizer.json": FileEntry(1, "0" * 64)}
    return Manifest("tiny", "0.1.0", 1, base_digest, SPEC, BOS, (EOS,), {}, files, "Apache-2.0")


@dataclass
class LinearTrainer:
    """Every module maps the embedding of a token to a target of the next one; squared error, in float64."""

    name: str = "linear"
    buckets: tuple[int, ...] = (8, 16)
    batch_sequences: int = 3
    targets: tuple[str, ...] = TARGETS
    max_rank: int | None = None
    fail: Exception | None = None
    calls: list[tuple[NDArray[np.int32], Collection[str] | None]] = field(default_factory=list)
    on_step: Callable[[], None] = lambda: None

    def loss_and_gradients(
        self,
        tokens: NDArray[np.int32],
        loss_mask: Floats,
        factors: Mapping[str, Floats],
        scale: float,
        *,
        wanted: Collection[str] | None = None,
    ) -> tuple[float, int, dict[str, Floats]]:
        assert len(tokens) <= self.batch_sequences and tokens.shape == loss_mask.shape
        self.calls.append((tokens.copy(), wanted))
        self.on_step()
        if self.fail is not None:
            raise self.fail
        mask = loss_mask[:, :-1].ravel().astype(np.float64)
        inputs = table("embedding", 32)[tokens[:, :-1].ravel()]
        total, gradients = 0.0, {}
        for name in sorted({name.rsplit(".", 1)[0] for name in factors}):
            lora_a, lora_b = (factors[f"{name}.lora_{half}"].astype(np.float64) for half in "AB")
            wished = table(name, lora_b.shape[0])[tokens[:, 1:].ravel()]
            error = (scale * inputs @ lora_a.T @ lora_b.T - wished) * mask[:, None]
            total += 0.5 * float(np.sum(error**2))
            gradients[f"{name}.lora_B"] = (scale * error.T @ (inputs @ lora_a.T)).astype(np.float32)
            gradients[f"{name}.lora_A"] = (scale * (error @ lora_b).T @ inputs).astype(np.float32)
        chosen = gradients if wanted is None else {name: gradients[name] for name in wanted}
        return total, int(mask.sum()), chosen

    def loss(
        self, tokens: NDArray[np.int32], loss_mask: Floats, factors: Mapping[str, Floats], scale: float
    ) -> tuple[float, int]:
        return self.loss_and_gradients(tokens, loss_mask, factors, scale, wanted=())[:2]

    def close(self) -> None:
        pass


def table(name: str, width: int) -> NDArray[np.float64]:
    seed = int(sha256(name.encode())[:8], 16)
    return np.random.default_rng(seed).normal(0, 1, (VOCAB_SIZE, width))


class Clock:
    """Seconds that pass only when someone says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def granted(give_up: Callable[[], bool]) -> Iterator[bool]:
    yield not give_up()


@dataclass
class Device:
    """A resident and everything a test may turn."""

    directory: Path
    trainer: LinearTrainer = field(default_factory=LinearTrainer)
    clock: Clock = field(default_factory=Clock)
    lines: list[str] = field(default_factory=list)
    not_ready: Decline | None = None
    stopping: bool = False
    manifest: Manifest = field(default_factory=small_manifest)
    most_rank: int | None = None

    def start(self) -> Resident:
        """A new process would do the same with the same directories."""
        text = self.directory / "text"
        text.mkdir(parents=True, exist_ok=True)
        if not any(text.iterdir()):
            (text / "notes.txt").write_text("".join(f"line {n}: the quick brown fox jumps\n" for n in range(400)))
        state = DeviceState(self.directory / "state", self.lines.append)
        state.directory.mkdir(exist_ok=True)
        data = LocalData(
            text, lambda words: list(words.encode()), BOS, EOS, 1 << 20, Retention(), lambda: 0.0, self.lines.append
        )
        key = Ed25519PrivateKey.from_private_bytes(bytes(32))
        around = Surroundings(
            lease=granted,
            readiness=lambda: self.not_ready,
            stopping=lambda: self.stopping,
            clock=self.clock,
            log=self.lines.append,
            most_rank=self.most_rank,
        )
        sessions = SecureSessions(key, None)
        return Resident("kitchen", self.manifest, self.trainer, data, state, key, around, sessions)


def greet(layout: AdapterLayout, federation: str = "demo") -> Envelope:
    return seal(hello(federation, layout))


def make_plan(layout: AdapterLayout, **changes: object) -> Envelope:
    """A plan for round 1 from version 0; ``snapshots`` and ``held`` choose the parts."""
    rank = int(changes.get("rank", layout.max_rank))  # type: ignore[call-overload]
    snapshots = changes.pop("snapshots", None) or start_snapshots(layout)
    parts, payload = pack_parts(layout, snapshots, rank, changes.pop("held", {}))  # type: ignore[arg-type]
    plan = Plan(
        federation="demo",
        layout_digest=layout.digest,
        round=1,
        plan_id="1" * 64,
        phase=Phase.B,
        rank=rank,
        steps=3,
        batch_sequences=4,
        sequence_tokens=16,
        learning_rate=0.01,
        learning_rate_b=0.02,
        weight_decay=0.0,
        seed=SEED,
        data_seed=5,
        codec=Codec.INT8,
        residual_decay=1.0,
        weight_cap=1,
        clip_norm=0.0,
        noise_std=0.0,
        folded="",
        deadline_s=3600.0,
        mask=None,
        parts=parts,
        payload_sha256=sha256(payload),
    )
    return seal(replace(plan, **changes), payload)  # type: ignore[arg-type]


def make_score_plan(layout: AdapterLayout, **changes: object) -> Envelope:
    parts, payload = pack_parts(layout, start_snapshots(layout), layout.max_rank, {})
    plan = ScorePlan("demo", layout.digest, 0, layout.max_rank, SEED, 16, 64, parts, sha256(payload))
    return seal(replace(plan, **changes), payload)  # type: ignore[arg-type]


def start_snapshots(layout: AdapterLayout, moved: bool = False) -> list[object]:
    """Versions 0; or, ``moved``, version 1 of everything, a core included."""
    found = []
    for index, group in enumerate(("a", "b", "core") if moved else ("a", "b")):
        vector = initial_vector(layout, group, layout.max_rank, SEED).astype(np.float64)
        if moved:
            vector = vector + np.random.default_rng(index).normal(0, 0.1, vector.size)
        snapshot, *_ = take_snapshot(layout, group, 1, [vector], Codec.FP32, SEED)
        found.append(snapshot if moved else replace(snapshot, version=0, raw=b""))
    return found
