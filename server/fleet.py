"""Federations of simulated devices on the LocalGrid: any number of them, in one process, through the real round loop.

A device is a function from envelope to envelope; ``simulate`` takes any factory of such functions. The one here
fits a low-rank matrix to a target that is partly its own, by normalized gradient descent: small, but a real federated
LoRA problem whose drift between devices is a parameter.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.broadcast import to_factors, unpack_parts
from edge_runtime.formats.codec import decode, encode
from edge_runtime.formats.envelope import Envelope, check_payload, seal, sha256, unseal
from edge_runtime.formats.errors import MessageError, UserError
from edge_runtime.formats.layout import AdapterLayout, Factors, Module
from edge_runtime.formats.messages import Decline, Hello, Plan, Profile, Reason, Score, ScorePlan, Update
from server.config import FederationConfig
from server.federation import Federation, open_federation
from server.local_grid import LocalGrid
from server.rounds import run_federation
from server.server_app import FlowerTransport, from_record, to_record

Responder = Callable[[Envelope], Envelope]
Factory = Callable[[int, AdapterLayout, int], Responder]
FEATURES, BUCKETS = 64, (16, 32, 64, 128, 256, 512, 1024, 2048)


def simulate(
    config: FederationConfig,
    clients: int,
    directory: Path,
    factory: Factory | None = None,
    report: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Federation:
    """Run a federation of simulated devices and return it after its last round.

    Args:
        config: ``package`` is not read: the simulated base has two layers of width 64.
        clients: Devices.
        directory: The federation's own; one that holds a checkpoint goes on after it.
        factory: (index, layout, seed) to a device; None: ``DriftingDevice`` with a drift of 0.3.
        report: Called with each round's ledger record.
    """
    layout, make = simulated_layout(config), factory or DriftingDevice
    grid = LocalGrid({index + 1: _on_records(make(index, layout, config.seed)) for index in range(clients)})
    federation = open_federation(config, layout, directory, FlowerTransport(grid), clock=time.time, sleep=time.sleep)
    run_federation(federation, report)
    return federation


def simulated_layout(config: FederationConfig) -> AdapterLayout:
    """The configured targets in two layers of width 64."""
    names = (f"model.layers.{layer}.{target}" for layer in range(2) for target in config.adapter.targets)
    modules = tuple(Module(name, FEATURES, FEATURES) for name in sorted(names))
    return AdapterLayout("0" * 64, modules, config.adapter.ranks, config.adapter.alpha)


def load_factory(name: str) -> Factory:
    """A factory named ``module:function``.

    Raises:
        UserError: There is none of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError("client", name, "module:function that can be imported", str(error)) from error
    if not callable(factory):
        raise UserError("client", name, "a function (index, layout, seed) -> (envelope -> envelope)")
    return factory  # type: ignore[no-any-return]


class DriftingDevice:
    """Fits ``scale * B A`` of every module to a target: a common matrix plus ``drift`` times its own.

    Args:
        index: From 0; makes its name, its target and its amount of data.
        layout: The federation's adapter.
        seed: Of the common target.
        drift: Norm of its own part, relative to the common one.
    """

    def __init__(self, index: int, layout: AdapterLayout, seed: int, drift: float = 0.3) -> None:
        self.index, self.layout, self.seed, self.drift = index, layout, seed, drift
        self.name = f"simulated-{index:05d}"
        self.replies: dict[str, Envelope] = {}
        self.residuals: dict[str, NDArray[np.float32]] = {}
        self.pending: tuple[str, str, NDArray[np.float32]] | None = None

    def __call__(self, envelope: Envelope) -> Envelope:
        """Answer one message."""
        if envelope.kind == "hello":
            layout = unseal(envelope, Hello).layout()
            key = sha256(self.name.encode())
            known = (self.name, key, layout.base_digest, layout.digest, layout.max_rank)
            return seal(Profile(*known, "simulated", BUCKETS, 8 + self.index % 8, 0.001))
        if envelope.kind == "scoreplan":
            return self._score(envelope, unseal(envelope, ScorePlan))
        plan = unseal(envelope, Plan)
        if plan.plan_id in self.replies:
            return self.replies[plan.plan_id]
        reply = self._train(envelope, plan)
        if reply.kind == "update":
            self.replies = {plan.plan_id: reply}
        return reply

    def loss(self, factors: Factors) -> float:
        """Mean squared distance to its target."""
        return float(np.mean([np.square(self._error(factors, module.name)).mean() for module in self.layout.modules]))

    def _train(self, envelope: Envelope, plan: Plan) -> Envelope:
        factors = self._received(envelope, plan)
        if factors is None:
            return seal(Decline(Reason.FACTORS, "", 0.0))
        groups = plan.phase.groups
        before, start = self.loss(factors), self.layout.flatten(factors, groups, plan.rank)
        for _ in range(plan.steps):
            self._descend(factors, groups, plan.learning_rate)
        delta = self.layout.flatten(factors, groups, plan.rank) - start
        payload = self._encode(plan, delta)
        update = Update(
            plan_id=plan.plan_id,
            layout_digest=self.layout.digest,
            base_digest=self.layout.base_digest,
            round=plan.round,
            phase=plan.phase,
            rank=plan.rank,
            codec=plan.codec,
            weight=min(8 + self.index % 8, plan.weight_cap),
            steps=plan.steps,
            tokens=plan.steps,
            loss_before=before,
            loss_after=self.loss(factors),
            norm=float(np.linalg.norm(delta)),
            step_s=0.001,
            payload_sha256=sha256(payload),
        )
        return seal(update, payload)

    def _encode(self, plan: Plan, delta: NDArray[np.float32]) -> bytes:
        """Error feedback: what encoding drops enters the next delta, once the server says that this one counted."""
        key = "+".join(plan.phase.groups)
        if self.pending is not None and self.pending[0] == plan.folded:
            self.residuals[self.pending[1]] = self.pending[2]
        sizes = self.layout.segment_sizes(plan.phase.groups, plan.rank)
        wanted = delta + np.float32(plan.residual_decay) * self.residuals.get(key, np.float32(0))
        payload = encode(wanted.astype(np.float32), sizes, plan.codec)
        self.pending = (plan.plan_id, key, wanted - decode(payload, sizes, plan.codec))
        return payload

    def _score(self, envelope: Envelope, plan: ScorePlan) -> Envelope:
        factors = self._received(envelope, plan)
        if factors is None:
            return seal(Decline(Reason.FACTORS, "", 0.0))
        return seal(Score(plan.round, self.loss(factors) * 100, 100))

    def _received(self, envelope: Envelope, plan: Plan | ScorePlan) -> Factors | None:
        payload = check_payload(envelope, plan.payload_sha256)
        # Nothing is kept between rounds, so that a thousand devices take no memory; the server sends it again.
        vectors = unpack_parts(self.layout, plan.parts, payload, plan.rank, plan.seed, {})
        if vectors is None:
            return None
        factors = to_factors(self.layout, vectors, plan.rank)
        if not all(np.isfinite(factor).all() for factor in factors.values()):
            raise MessageError("plan: factors that are not finite")
        return factors

    def _descend(self, factors: Factors, groups: tuple[str, ...], learning_rate: float) -> None:
        """One gradient step on the squared error of every module."""
        for module in self.layout.modules:
            a, b, c = (f"{module.name}{suffix}" for suffix in (".lora_A", ".lora_B", ".core"))
            error = self._error(factors, module.name) * np.float32(self.layout.scale)
            left = factors[b] @ factors[c] if c in factors else factors[b]
            steps = {a: left.T @ error, b: error @ factors[a].T}
            if c in factors:
                steps[c] = factors[b].T @ error @ factors[a].T
            for group, name in zip(("a", "b", "core"), (a, b, c), strict=True):
                if group in groups:
                    # Steps of one size, as Adam's: the learning rates of real federations work here too.
                    size = np.sqrt(np.square(steps[name]).mean()) + np.float32(1e-12)
                    factors[name] = (factors[name] - np.float32(learning_rate) / size * steps[name]).astype(np.float32)

    def _error(self, factors: Factors, module: str) -> NDArray[np.float32]:
        lora_a, lora_b = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
        core = factors.get(f"{module}.core")
        product = (lora_b if core is None else lora_b @ core) @ lora_a
        error = np.float32(self.layout.scale) * product - self._target(module)
        as_float32: NDArray[np.float32] = np.asarray(error, np.float32)
        return as_float32

    def _target(self, module: str) -> NDArray[np.float32]:
        where = [entry.name for entry in self.layout.modules].index(module)
        common = np.random.default_rng([self.seed, where]).standard_normal((2, FEATURES, 4))
        own = np.random.default_rng([self.seed, where, self.index + 1]).standard_normal((2, FEATURES, 4))
        product = common[0] @ common[1].T + self.drift * (own[0] @ own[1].T)
        target: NDArray[np.float32] = (product / FEATURES).astype(np.float32)
        return target


def _on_records(responder: Responder) -> Callable[[Any], Any]:
    return lambda record: to_record(responder(from_record(record)))
