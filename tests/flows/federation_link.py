"""A SuperLink as a process, and devices of a test's own making that meet there: residents in threads of this process.

Everything between the round loop and a resident is what people run: TLS, registered keys, Flower's ServerApp, our
SuperNode. What a device says is the test's: it may lie, or die in the middle of a sentence.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from numpy.typing import NDArray

from edge_runtime.config import ClientConfig
from edge_runtime.federated import supernode
from edge_runtime.federated.data import LocalData, Retention
from edge_runtime.federated.identity import device_key, node_key, write_enrolment
from edge_runtime.federated.resident import Resident, Surroundings
from edge_runtime.federated.secure import SecureSessions
from edge_runtime.federated.state import DeviceState
from edge_runtime.federated.stopping import Stop
from edge_runtime.federated.supernode import Link, serve_superlink
from edge_runtime.formats.envelope import Envelope
from edge_runtime.formats.manifest import AdapterSlots
from edge_runtime.formats.messages import MaskPlan, Plan
from edge_runtime.formats.package import seal_package
from edge_runtime.formats.signing import signing_key
from server import registry
from server.certificates import ensure_certificates
from server.config import FederationConfig, load_federation
from server.following import start_federation
from server.home import Home, open_home
from server.ledger import read_records
from server.superlink import SuperLink, running_superlink
from tests.edge_runtime.fakes import BOS, EOS, SPEC, byte_tokenizer
from tests.edge_runtime.federated.device import BASE_DIGEST, TARGETS, LinearTrainer, granted, small_manifest
from tests.flows.fleet import free_port

QUICK = ClientConfig(shortest_poll_s=0.05, longest_poll_s=0.5, idle_poll_s=0.5)
PATIENCE_S = 120.0

Handler = Callable[[Envelope], Envelope]


class Died(BaseException):
    """The device is gone, as by SIGKILL: whatever it would have said next is not said."""


@dataclass(frozen=True, slots=True)
class Masked:
    """What a device put under masks: codes and weight, in which session of which round; and what it sent of them."""

    round: int
    mask: MaskPlan
    codes: NDArray[np.int32]
    weight: int
    payload: bytes


class Recording(SecureSessions):
    """Masks as a device does, and remembers what."""

    def __init__(self, device_key: Ed25519PrivateKey) -> None:
        super().__init__(device_key, None)
        self.masked: list[Masked] = []

    def mask(self, plan: Plan, codes: NDArray[np.int32], sizes: Sequence[int], weight: int) -> bytes:
        assert plan.mask is not None
        payload = super().mask(plan, codes, sizes, weight)
        self.masked.append(Masked(plan.round, plan.mask, codes.copy(), weight, payload))
        return payload


def make_resident(name: str, folder: Path, state: DeviceState) -> Resident:
    """A resident whose gradients are written down by hand, over text of its own; a new one has no memory but disk."""
    text = folder / "text"
    if not text.is_dir():
        text.mkdir(parents=True)
        lines = (f"{name} writes line {number} about {number * 7 % 13} foxes\n" for number in range(300))
        (text / "notes.txt").write_text("".join(lines))
    data = LocalData(
        text, lambda words: list(words.encode()), BOS, EOS, 1 << 20, Retention(), lambda: 0.0, lambda line: None
    )
    data.refresh()
    key = device_key(state.directory)
    around = Surroundings(
        lease=granted, readiness=lambda: None, stopping=lambda: False, clock=time.monotonic, log=lambda line: None
    )
    return Resident(name, small_manifest(), LinearTrainer(), data, state, key, around, Recording(key))


@dataclass
class Device:
    """A SuperNode in a thread.

    Attributes:
        wrap: Makes the handler out of the resident; a restarted device gets a new resident.
    """

    name: str
    folder: Path
    link: Link
    wrap: Callable[[Resident], Handler] = lambda resident: resident.handle
    stop: Stop = field(default_factory=Stop)
    lines: list[str] = field(default_factory=list)
    resident: Resident | None = None
    thread: threading.Thread | None = None
    error: BaseException | None = None

    @property
    def dead(self) -> bool:
        return isinstance(self.error, Died)

    def start(self) -> Device:
        self.stop, self.error, self.lines = Stop(), None, []
        state = DeviceState(self.folder / "state", self.lines.append)
        self.resident = make_resident(self.name, self.folder, state)
        handle = self.wrap(self.resident)

        def run() -> None:
            try:
                serve_superlink(
                    self.link, node_key(state.directory), state, handle, self.stop, self.lines.append, QUICK
                )
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name=self.name, daemon=True)
        self.thread.start()
        return self

    def connected(self) -> bool:
        assert self.error is None, self.error
        return any("connected" in line for line in self.lines)

    def end(self) -> None:
        self.stop.tell()
        if self.thread is not None:
            self.thread.join(timeout=30)
            assert not self.thread.is_alive()


@dataclass
class Meeting:
    """A SuperLink, a package whose base everybody holds, and enrolled devices that are not connected yet."""

    home: Home
    link: SuperLink
    package: Path
    folder: Path
    started: list[Device] = field(default_factory=list)

    def device(self, name: str, wrap: Callable[[Resident], Handler] | None = None) -> Device:
        """Start one and wait until the SuperLink has let it in."""
        link = Link(self.link.address, self.home.ca_certificate)
        device = Device(name, self.folder / name, link, wrap or (lambda resident: resident.handle))
        self.started.append(device.start())
        wait_for(device.connected, f"the connection of {name}")
        return device

    def run(self, config: FederationConfig) -> None:
        """Start the ServerApp, for the first time or again."""
        start_federation(self.home, config)

    def app_pid(self, name: str) -> int:
        return int((self.home.run(name) / "lock").read_text())

    def ledger(self, name: str, event: str = "") -> list[dict[str, Any]]:
        return read_ledger(self.home, name, event)

    def wait_for_end(self, name: str, round_number: int) -> list[dict[str, Any]]:
        """The records of all rounds, after the last."""
        ends = lambda: any(record["round"] == round_number for record in self.ledger(name, "end"))  # noqa: E731
        wait_for(ends, f"the end of {name} after round {round_number}")
        return self.ledger(name, "round")

    def dismiss(self) -> None:
        """End every device, each by itself; the next test begins with nobody connected."""
        for device in self.started:
            device.stop.tell()
        for device in self.started:
            device.end()
        self.started.clear()


@contextlib.contextmanager
def meeting(folder: Path, names: tuple[str, ...]) -> Iterator[Meeting]:
    """A running SuperLink where devices of these names are enrolled."""
    with open_superlink(folder, names) as (home, link):
        held = Meeting(home, link, seal(folder / "package"), folder)
        try:
            yield held
        finally:
            held.dismiss()


@contextlib.contextmanager
def open_superlink(folder: Path, names: tuple[str, ...], hosts: Sequence[str] = ()) -> Iterator[tuple[Home, SuperLink]]:
    """A SuperLink that knows the keys which it finds, or makes, in ``folder / name / "state"``."""
    home = open_home(folder / "home", create=True)
    ensure_certificates(home, hosts, datetime.now(UTC))
    for name in names:
        (folder / name / "state").mkdir(parents=True, exist_ok=True)
        registry.enrol(home, write_enrolment(folder / name / "state", name))
    with running_superlink(home, free_port()) as link:
        with _control(home, link) as control:
            commands = registry.NodeCommands(
                lambda name, key: _register(control, folder / name / "state"), lambda node: None, dict
            )
            assert registry.apply(home, commands)[0] == sorted(names)
        yield home, link


@contextlib.contextmanager
def hard_deaths() -> Iterator[None]:
    """A device that died says no goodbye: the SuperLink misses its heartbeats, after twenty seconds at the earliest."""
    leave = supernode._NodeOfLink.leave

    def silent(self: Any) -> None:
        if not isinstance(sys.exception(), Died):
            leave(self)

    supernode._NodeOfLink.leave = silent  # type: ignore[method-assign]
    try:
        yield
    finally:
        supernode._NodeOfLink.leave = leave  # type: ignore[method-assign]


def settings(name: str, package: Path, *overrides: str) -> FederationConfig:
    """A federation whose rounds take no time to compute."""
    return load_federation(
        "default",
        (
            f"name={name}", f"package={package}", "gate=false", "candidate_every=0", "evaluation.every=0",
            f"adapter.targets=[{','.join(TARGETS)}]", "adapter.ranks=[2,4]", "adapter.alpha=8", "local.steps=3",
            "local.batch_sequences=4", "local.sequence_tokens=16", "local.learning_rate=1e-2",
            "local.learning_rate_b=1e-2", "phases.schedule=both", "optimizer.name=fedavg", "optimizer.average=0",
            "gates.norm_factor=0", "cohort.over_selection=1", "cohort.patience_s=60",
            "cohort.shortest_deadline_s=60", "cohort.longest_deadline_s=60", *overrides,
        ),
    )  # fmt: skip


def read_ledger(home: Home, name: str, event: str = "") -> list[dict[str, Any]]:
    """A federation's records, or those of one event; one that failed fails the test."""
    records = read_records(home.run(name) / "ledger.jsonl")
    failed = [record["reason"] for record in records if record["event"] == "failed"]
    assert not failed, failed
    return [record for record in records if event in ("", record["event"])]


def seal(directory: Path) -> Path:
    """A signed package without graphs: its manifest is all that a server reads."""
    (directory / "onnx").mkdir(parents=True)
    (directory / "onnx" / "model.onnx").write_bytes(b"never opened here")
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    seal_package(
        directory, name="tiny", version="0.1.0", counter=1, base_digest=BASE_DIGEST, decoder=SPEC, bos=BOS,
        eos=(EOS,), containers={"onnx": AdapterSlots(TARGETS)}, licence="Apache-2.0", key=signing_key(),
    )  # fmt: skip
    return directory


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """The condition's value as soon as it holds; what did not happen in time fails the test."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        threading.Event().wait(0.05)
    return value


@contextlib.contextmanager
def _control(home: Home, link: SuperLink) -> Iterator[ControlHttpClient]:
    """Flower's command takes seconds a device to start; its client does not."""
    with ControlHttpClient.from_server_address(link.address, False, home.ca_certificate.read_bytes(), []) as client:
        yield client


def _register(control: ControlHttpClient, state: Path) -> int:
    key = public_key_to_bytes(node_key(state).public_key())
    return int(control.RegisterNode(RegisterNodeRequest(public_key=key)).node_id)
