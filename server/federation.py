"""What a run carries from round to round, and how it is kept on disk and picked up again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError
from edge_runtime.formats.files import write_atomically
from edge_runtime.formats.layout import AdapterLayout, Module, Phase, effective_pairs
from edge_runtime.formats.lora import Adapter, save_adapter
from edge_runtime.formats.manifest import Manifest
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from server.adapter_state import AdapterState, restore_state, start_state
from server.config import FederationConfig
from server.gates import NormGate
from server.ledger import Ledger, load_checkpoint, save_checkpoint
from server.optimizer import ServerOptimizer, make_optimizer
from server.plan import Drift
from server.privacy import Accountant
from server.selection import Device
from server.transport import Transport

CHECKPOINTS, CANDIDATES, DEVICES_FILE = "checkpoints", "candidates", "devices.json"
_OPTIMIZER = "optimizer."

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Federation:
    """One federation between two rounds.

    Attributes:
        number: The last committed round; 0 before the first.
        devices: By enrolled name.
        record: Ledger record of the last committed round.
        clock: Seconds since the epoch.
        sleep: Waits so many seconds.
        loss: Last held-out loss that was measured.
        accountant: Of the noise, where there is any.
        enrolled: Name and device key (hex) registered for a node; None: nothing is registered (simulation).
    """

    config: FederationConfig
    layout: AdapterLayout
    directory: Path
    transport: Transport
    ledger: Ledger
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    state: AdapterState
    optimizer: ServerOptimizer
    norm_gate: NormGate
    enrolled: Callable[[int], tuple[str, str] | None] | None = None
    accountant: Accountant | None = None
    number: int = 0
    drift: Drift = field(default_factory=Drift)
    devices: dict[str, Device] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    mask_scales: dict[str, tuple[float, ...]] = field(default_factory=dict)
    loss: float | None = None


def read_layout(config: FederationConfig, manifest: Manifest) -> AdapterLayout:
    """The adapter that a federation trains over a package's base."""
    shapes = {name: manifest.decoder.projection_shape(p) for name, p in manifest.decoder.module_names()}
    targets = {name for name, p in manifest.decoder.module_names() if p in config.adapter.targets}
    modules = tuple(Module(name, shapes[name][1], shapes[name][0]) for name in sorted(targets))
    return AdapterLayout(manifest.base_digest, modules, config.adapter.ranks, config.adapter.alpha)


def read_manifest(config: FederationConfig) -> Manifest:
    """The manifest of the federation's package, signature verified.

    Raises:
        PackageError: Not a package that this machine trusts.
    """
    return open_package(config.package, load_trust(), containers=()).manifest


def open_federation(
    config: FederationConfig,
    layout: AdapterLayout,
    directory: Path,
    transport: Transport,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    enrolled: Callable[[int], tuple[str, str] | None] | None = None,
) -> Federation:
    """Start a federation, or go on after its last committed round when there is one."""
    federation = Federation(
        config=config,
        layout=layout,
        directory=directory,
        transport=transport,
        ledger=Ledger(directory),
        clock=clock,
        sleep=sleep,
        state=start_state(layout, config.seed, config.codec.down),
        optimizer=new_optimizer(config),
        norm_gate=NormGate(config.gates.norm_factor, 0.0, config.gates.max_norm),
        enrolled=enrolled,
        accountant=Accountant(config.privacy.delta) if config.privacy.noise != "none" else None,
    )
    found = load_checkpoint(directory / CHECKPOINTS)
    if found is None:
        federation.ledger.append({"event": "start", "time": clock(), "layout_digest": layout.digest})
        return federation
    _restore(federation, *found)
    federation.ledger.append({"event": "resume", "time": clock(), "round": federation.number})
    log.info("resumed after round %d", federation.number)
    return federation


def new_optimizer(config: FederationConfig) -> ServerOptimizer:
    """The server's optimizer, without memory."""
    chosen = config.optimizer
    return make_optimizer(chosen.name, chosen.learning_rate, chosen.momentum, chosen.beta2, chosen.epsilon)


def change_basis(federation: Federation, phase: Phase) -> None:
    """Enter or leave the core phase; a repeated attempt finds it done."""
    inside = "core" in federation.state.snapshots
    if phase is Phase.CORE and not inside:
        federation.state.enter_core()
        federation.optimizer = new_optimizer(federation.config)  # moments of another basis mean nothing
    elif phase is not Phase.CORE and inside:
        federation.state.leave_core()
        federation.optimizer = new_optimizer(federation.config)  # moments of another basis mean nothing


def save_federation(federation: Federation) -> None:
    """Make the committed round durable; what comes after may be lost and is then done again."""
    optimizer = {f"{_OPTIMIZER}{name}": value for name, value in federation.optimizer.state().items()}
    drift = federation.drift
    meta = {
        "layout_digest": federation.layout.digest,
        "state": federation.state.numbers(),
        "norms": federation.norm_gate.state(),
        "drift": [drift.phase and drift.phase.value, drift.dispersion, drift.apart, drift.streak],
        "devices": [device.to_dict() for device in federation.devices.values()],
        "mask_scales": {key: list(scales) for key, scales in federation.mask_scales.items()},
        "privacy": federation.accountant.state() if federation.accountant else None,
        "loss": federation.loss,
        "record": federation.record,
    }
    save_checkpoint(federation.directory / CHECKPOINTS, federation.number, federation.state.arrays() | optimizer, meta)


def write_devices(federation: Federation) -> None:
    """devices.json, for the fleet page."""
    devices = [device.to_dict() for device in federation.devices.values()]
    write_atomically(federation.directory / DEVICES_FILE, json.dumps(devices, sort_keys=True).encode() + b"\n")


def write_candidate(federation: Federation, held_out_loss: float | None) -> Path:
    """The adapter (the running mean, where one is kept) in PEFT's format, for the gate."""
    layout, target = federation.layout, federation.directory / CANDIDATES / f"{federation.number:06d}"
    pairs = effective_pairs(layout, federation.state.factors(averaged=True))
    (target / "candidate.json").unlink(missing_ok=True)  # written last: where it stands, the rest is whole
    save_adapter(target, Adapter(layout.max_rank, layout.scale, pairs, layout.base_digest))
    about = {
        "federation": federation.config.name,
        "round": federation.number,
        "base_digest": layout.base_digest,
        "package": str(federation.config.package),
        "held_out_loss": held_out_loss,
    }
    write_atomically(target / "candidate.json", json.dumps(about, sort_keys=True, indent=2).encode() + b"\n")
    federation.ledger.append({"event": "candidate", "time": federation.clock(), "round": federation.number})
    return target


def adapter_digest(federation: Federation) -> str:
    """sha256 of the factors as devices hold them, in the layout's order."""
    digest = hashlib.sha256()
    for group in sorted(federation.state.values):
        digest.update(federation.state.values[group].tobytes())
    return digest.hexdigest()


def _restore(federation: Federation, number: int, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    if meta["layout_digest"] != federation.layout.digest:
        raise UserError(
            str(federation.directory),
            f"a federation of another base or adapter ({meta['layout_digest'][:12]})",
            f"one of {federation.layout.digest[:12]}",
            "give the federation another name, or its earlier adapter settings",
        )
    federation.number, federation.record = number, meta["record"]
    federation.state = restore_state(federation.layout, arrays, meta["state"])
    federation.optimizer.load_state(
        {name.removeprefix(_OPTIMIZER): value for name, value in arrays.items() if name.startswith(_OPTIMIZER)}
    )
    federation.norm_gate.load_state(meta["norms"])
    phase, *rest = meta["drift"]
    federation.drift = Drift(None if phase is None else Phase(phase), *rest)
    federation.loss = meta["loss"]
    if federation.accountant is not None and meta["privacy"] is not None:
        federation.accountant.load_state(meta["privacy"])
    federation.devices = {entry["name"]: Device(**entry) for entry in meta["devices"]}
    federation.mask_scales = {key: tuple(scales) for key, scales in meta["mask_scales"].items()}
