"""The resident: one process that keeps the base loaded and answers a federation's messages.

Whatever a message contains, the answer is an envelope, never an exception: a ``Decline`` says what was wrong. A plan
that was answered before is answered with the same bytes, before and after a crash, so a server may ask again. What
encoding keeps back of an update enters the next one once the server has said that it folded this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.federated.data import LocalData
from edge_runtime.federated.local_steps import Conditions, Trained, score_locally, train_locally
from edge_runtime.federated.secure import KINDS as MASKING_KINDS
from edge_runtime.federated.secure import SecureSessions
from edge_runtime.federated.state import DeviceState
from edge_runtime.federated.trainer import Trainer
from edge_runtime.federated.updates import Work, answer, commit_residuals, labels, work_digest
from edge_runtime.formats.broadcast import to_factors, unpack_parts
from edge_runtime.formats.envelope import Envelope, check_payload, seal, sha256, unseal
from edge_runtime.formats.errors import MessageError, SevenfoldError
from edge_runtime.formats.layout import AdapterLayout, Factors
from edge_runtime.formats.manifest import Manifest
from edge_runtime.formats.messages import PROTOCOL, Decline, Hello, Plan, Profile, Reason, Score, ScorePlan

_NOT_PRINTABLE = re.compile(r"[^ -~]")
_TOO_SLOW_DECAY = 0.7  # a speed measured on a bad day is forgotten after a few refused plans
_NEVER_S = 30 * 86400.0  # asking again changes nothing

Lease = Callable[[Callable[[], bool]], AbstractContextManager[bool]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a resident needs of its process and its device; tests bring their own.

    Attributes:
        lease: Grants one training step; asks its argument whether to give up.
        readiness: Why not to train now, or None.
        stopping: Whether the process was told to end.
        clock: Seconds, monotonic.
        log: Takes one line an event.
        retry_after_s: When to ask a busy device again.
        most_rank: Largest rank to train, or None for what the package takes.
    """

    lease: Lease
    readiness: Callable[[], Decline | None]
    stopping: Callable[[], bool]
    clock: Callable[[], float]
    log: Callable[[str], None]
    retry_after_s: float = 60.0
    most_rank: int | None = None


@dataclass(slots=True)
class Resident:
    """Answers messages, one at a time.

    Attributes:
        name: The device's, for people.
        manifest: Of the verified package whose base is trained on.
        trainer: Open over that base.
        key: Signs what this device says to others.
        sessions: Secure aggregation's.
    """

    name: str
    manifest: Manifest
    trainer: Trainer
    data: LocalData
    state: DeviceState
    key: Ed25519PrivateKey
    around: Surroundings
    sessions: SecureSessions

    def handle(self, envelope: Envelope) -> Envelope:
        """The answer to a message of any content. Not for two threads at once."""
        received_s = self.around.clock()
        try:
            return self._answer(envelope, received_s)
        except MessageError as error:
            return self._decline(Reason.INVALID, str(error), 0)
        except (SevenfoldError, OSError, MemoryError) as error:
            # The device's own trouble: a full disk, a runtime that failed. Another day may be better.
            return self._decline(Reason.BUSY, f"{type(error).__name__}: {error}", self.around.retry_after_s)
        except (ValueError, ArithmeticError) as error:
            return self._decline(Reason.INVALID, f"cannot be computed: {error}", 0)

    def _answer(self, envelope: Envelope, received_s: float) -> Envelope:
        if envelope.kind == "hello":
            return self._greet(unseal(envelope, Hello), envelope)
        if envelope.kind == "plan":
            return self._train(unseal(envelope, Plan), envelope, received_s)
        if envelope.kind == "scoreplan":
            return self._score(unseal(envelope, ScorePlan), envelope, received_s)
        if envelope.kind in MASKING_KINDS:
            # Who would decline the plan declines here, before others count on his share of the masks.
            not_now = self.around.readiness() if envelope.kind == "maskinvite" else None
            return self.sessions.handle(envelope) if not_now is None else seal(not_now)
        raise MessageError(f"message: {envelope.kind[:40]!r} is none that a device answers")

    # Greeting --------------------------------------------------------------------------------------------------

    def _greet(self, greeting: Hello, envelope: Envelope) -> Envelope:
        mine = self.manifest.base_digest
        if greeting.protocol != PROTOCOL:
            return self._never(Reason.LAYOUT, f"protocol {greeting.protocol}, this device speaks {PROTOCOL}")
        if greeting.base_digest != mine:
            # Both digests fit into a detail of 200 characters.
            return self._never(Reason.BASE, f"the federation trains {greeting.base_digest}, this device holds {mine}")
        layout = greeting.layout()
        if misfit := self._misfit(layout):
            return self._never(Reason.LAYOUT, misfit)
        self.state.save_greeting(greeting.federation, envelope)
        self.data.refresh()
        speed = self.state.load_json("speed.json")
        profile = Profile(
            device=self.name,
            public_key=self.key.public_key().public_bytes_raw().hex(),
            base_digest=mine,
            layout_digest=layout.digest,
            rank=self._largest_rank(layout),
            trainer=self.trainer.name,
            buckets=self.trainer.buckets,
            sequences=self.data.count(self.trainer.buckets[0]),
            step_s=float(speed.get("step_s", 0.0)),
        )
        self.around.log(f"{greeting.federation}: greeted; rank {profile.rank}, {profile.sequences} sequences")
        return seal(profile)

    def _misfit(self, layout: AdapterLayout) -> str:
        """Why the package cannot take such an adapter; empty when it can."""
        spec, targets = self.manifest.decoder, self.trainer.targets
        shapes = {module: (name, *spec.projection_shape(name)) for module, name in spec.module_names()}
        for module in layout.modules:
            projection, rows, columns = shapes.get(module.name, ("", 0, 0))
            if (module.out_features, module.in_features) != (rows, columns):
                sent = f"{module.name} of {module.in_features} to {module.out_features}"
                return f"{sent}; this base has {columns} to {rows} there (layout {layout.digest[:16]})"
            if projection not in targets:
                return f"{module.name}: this package's {self.trainer.name} files train {' '.join(targets)} only"
        if self._largest_rank(layout) == 0:
            return f"rank {layout.ranks[0]} at least; this device trains up to {self._most_rank()}"
        return ""

    def _most_rank(self) -> int:
        limits = [limit for limit in (self.trainer.max_rank, self.around.most_rank) if limit is not None]
        return min(limits, default=1024)

    def _largest_rank(self, layout: AdapterLayout) -> int:
        """The largest segment end that this device can train; 0 when it can train none."""
        return max((rank for rank in layout.ranks if rank <= self._most_rank()), default=0)

    # Training --------------------------------------------------------------------------------------------------

    def _train(self, plan: Plan, envelope: Envelope, received_s: float) -> Envelope:
        layout = self._layout(plan.federation, plan.layout_digest)
        if layout is None:
            return self._decline(Reason.LAYOUT, "no greeting of this federation with this layout came before", 0)
        factors, digests = self._factors(plan, layout, envelope)
        if factors is None:
            return self._decline(Reason.FACTORS, "a part was left out that this device does not hold", 0)
        work = Work(plan, layout, factors, work_digest(plan, digests))
        if (known := self.state.load_reply(plan.federation, plan.plan_id, work.digest)) is not None:
            self.around.log(f"{plan.federation} round {plan.round}: asked again, answered as before")
            return known
        commit_residuals(self.state, plan, layout)
        if (refusal := self._refusal(plan, layout)) is not None:
            return refusal
        trained = self._run(work, received_s)
        if isinstance(trained, Reason):
            return self._decline(trained, f"round {plan.round}", self.around.retry_after_s)
        reply = answer(work, trained, self._weight(plan), self.manifest.base_digest, self.state, self.sessions)
        losses = f"loss {trained.loss_before:.4f} to {trained.loss_after:.4f}"
        sent = f"{len(reply.payload)} bytes up, {len(envelope.payload)} down"
        self.around.log(
            f"{plan.federation} round {plan.round}: {plan.phase} rank {plan.rank}, {trained.steps} steps of "
            f"{trained.step_s:.3f} s, {losses}, {sent}"
        )
        return reply

    def _refusal(self, plan: Plan, layout: AdapterLayout) -> Envelope | None:
        """Why not to train this plan here and now."""
        if plan.rank not in layout.ranks or plan.rank > self._largest_rank(layout):
            raise MessageError(
                f"plan: rank {plan.rank}; this device trains one of {layout.ranks} up to {self._most_rank()}"
            )
        if plan.sequence_tokens > self.trainer.buckets[-1]:
            raise MessageError(f"plan: sequences of {plan.sequence_tokens} tokens; at most {self.trainer.buckets[-1]}")
        if plan.phase == "core" and "core" not in {part.group for part in plan.parts}:
            raise MessageError("plan: trains a core and brings none")
        if (not_now := self.around.readiness()) is not None:
            self.around.log(f"{plan.federation} round {plan.round}: declined, {not_now.reason}: {not_now.detail}")
            return seal(not_now)
        self.data.refresh()
        if self.data.count(plan.sequence_tokens) == 0:
            return self._decline(Reason.DATA, "no training text in the data directory", self.around.retry_after_s)
        return None

    def _run(self, work: Work, received_s: float) -> Trained | Reason:
        plan, batch_tokens = work.plan, work.plan.batch_sequences * work.plan.sequence_tokens
        speed = self.state.load_json("speed.json")
        # Time grows with the tokens of a step; a speed measured on other steps is scaled to these.
        expected_s = float(speed.get("step_s", 0.0)) * batch_tokens / max(float(speed.get("tokens", batch_tokens)), 1.0)
        batches = self.data.batches(plan.sequence_tokens, plan.batch_sequences, plan.data_seed)
        conditions = Conditions(self.around.lease, self.around.clock, self.around.stopping, received_s, expected_s)
        trained = train_locally(self.trainer, work.layout, plan, work.factors, batches, conditions)
        if isinstance(trained, Trained):
            self.state.save_json("speed.json", {"step_s": trained.step_s, "tokens": batch_tokens})
        elif trained is Reason.DEADLINE and speed:
            self.state.save_json("speed.json", speed | {"step_s": float(speed["step_s"]) * _TOO_SLOW_DECAY})
        return trained

    def _weight(self, plan: Plan) -> int:
        return max(1, min(plan.weight_cap, self.data.count(plan.sequence_tokens)))

    # Scoring ---------------------------------------------------------------------------------------------------

    def _score(self, plan: ScorePlan, envelope: Envelope, received_s: float) -> Envelope:
        layout = self._layout(plan.federation, plan.layout_digest)
        if layout is None:
            return self._decline(Reason.LAYOUT, "no greeting of this federation with this layout came before", 0)
        factors, _ = self._factors(plan, layout, envelope)
        if factors is None:
            return self._decline(Reason.FACTORS, "a part was left out that this device does not hold", 0)
        if plan.sequence_tokens > self.trainer.buckets[-1]:
            raise MessageError(
                f"scoreplan: sequences of {plan.sequence_tokens} tokens; at most {self.trainer.buckets[-1]}"
            )
        if (not_now := self.around.readiness()) is not None:
            return seal(not_now)
        self.data.refresh()
        batches = self.data.held_out(plan.sequence_tokens, plan.most_sequences, self.trainer.batch_sequences)
        conditions = Conditions(self.around.lease, self.around.clock, self.around.stopping, received_s)
        scored = score_locally(self.trainer, layout, factors, batches, conditions)
        if isinstance(scored, Reason):
            return self._decline(scored, f"round {plan.round}", self.around.retry_after_s)
        return seal(Score(plan.round, float(scored[0]), scored[1]))

    # Shared ----------------------------------------------------------------------------------------------------

    def _layout(self, federation: str, digest: str) -> AdapterLayout | None:
        """The adapter as the federation's greeting described it, if it is still the same and fits."""
        greeting = self.state.load_greeting(federation)
        layout = None if greeting is None else unseal(greeting, Hello).layout()
        if layout is None or layout.digest != digest or layout.base_digest != self.manifest.base_digest:
            return None
        return None if self._misfit(layout) else layout

    def _factors(
        self, plan: Plan | ScorePlan, layout: AdapterLayout, envelope: Envelope
    ) -> tuple[Factors | None, dict[str, str]]:
        """The plan's factors and their digests by group; None when a part is missing. New parts are kept."""
        if plan.rank not in layout.ranks:
            raise MessageError(f"{envelope.kind}: rank {plan.rank} is not one of {layout.ranks}")
        payload = check_payload(envelope, plan.payload_sha256)
        known, held = labels(plan, layout), {}
        for part in plan.parts:
            if part.version and not part.size_bytes:
                wanted = known | {"version": str(part.version)}
                if (stored := self.state.load_vector(plan.federation, f"held.{part.group}", wanted)) is not None:
                    held[part.group, part.version] = stored.vector
        vectors = unpack_parts(layout, plan.parts, payload, plan.rank, plan.seed, held)
        if vectors is None:
            return None, {}
        for part in plan.parts:
            if part.size_bytes:
                named = known | {"version": str(part.version)}
                self.state.save_vector(plan.federation, f"held.{part.group}", vectors[part.group, part.version], named)
        digests = {f"{group} {version}": sha256(vector.tobytes()) for (group, version), vector in vectors.items()}
        return to_factors(layout, vectors, plan.rank), digests

    def _never(self, reason: Reason, detail: str) -> Envelope:
        return self._decline(reason, detail, _NEVER_S)

    def _decline(self, reason: Reason, detail: str, retry_after_s: float) -> Envelope:
        self.around.log(f"declined, {reason}: {detail}")
        return seal(Decline(reason, _NOT_PRINTABLE.sub("?", detail)[:200], retry_after_s))
