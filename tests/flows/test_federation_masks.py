"""Secure aggregation over a real SuperLink: a third of the cohort dies behind its masks, and the server dies too."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from edge_runtime.federated.resident import Resident
from edge_runtime.formats.envelope import Envelope
from edge_runtime.formats.layout import Phase
from server.adapter_state import AdapterState, restore_state, start_state
from server.config import FederationConfig, with_overrides
from server.federation import read_layout, read_manifest
from server.ledger import load_checkpoint
from server.processes import is_running
from tests.flows.federation_link import (
    Device,
    Died,
    Masked,
    Meeting,
    Recording,
    hard_deaths,
    meeting,
    settings,
    wait_for,
)

pytestmark = [
    pytest.mark.flow,
    pytest.mark.slow,
    pytest.mark.xdist_group("federation_devices"),
    pytest.mark.filterwarnings("ignore:`verify=<str>` is deprecated:DeprecationWarning"),  # by flwr, to httpx
]

NAMES = ("ada", "barbara", "edsger", "frances", "grace", "niklaus")
LEAST = 4  # of six, whom the shares of two thirds of the members open


@dataclass
class Cohort:
    """Six devices, what is to happen to them, and what they put under masks.

    Attributes:
        dies_at: By name, the kind of message that a device hears last, and the round: what it was asked before it
            died it is asked again, in another life.
        held: Devices that do not answer a plan before ``go`` is set.
        masked: By name; earlier lives included.
    """

    place: Meeting
    dies_at: dict[str, tuple[str, int]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    go: threading.Event = field(default_factory=threading.Event)
    devices: dict[str, Device] = field(default_factory=dict)
    masked: dict[str, list[Masked]] = field(default_factory=lambda: {name: [] for name in NAMES})

    def start(self) -> None:
        for name in NAMES:
            self.devices[name] = self.place.device(name, lambda resident, name=name: self._handler(name, resident))

    def revive(self) -> None:
        """Start the dead again, as their owners would; what they knew of masks was in memory."""
        self.dies_at = {}
        dead = [device for device in self.devices.values() if device.dead]
        for device in dead:
            device.start()
        for device in dead:
            wait_for(device.connected, f"the return of {device.name}")

    def dead(self) -> set[str]:
        return {name for name, device in self.devices.items() if device.dead}

    def sessions(self, number: int) -> set[str]:
        return {entry.mask.session for entries in self.masked.values() for entry in entries if entry.round == number}

    def of(self, number: int, names: Sequence[str] = NAMES) -> dict[str, Masked]:
        """What each device masked last in a round, of those that did."""
        found = {name: [entry for entry in self.masked[name] if entry.round == number] for name in names}
        return {name: entries[-1] for name, entries in found.items() if entries}

    def _handler(self, name: str, resident: Resident):
        assert isinstance(resident.sessions, Recording)
        resident.sessions.masked = self.masked[name]

        def handle(envelope: Envelope) -> Envelope:
            kind, number = self.dies_at.get(name, ("", 0))
            if envelope.kind == kind and envelope.header.get("round", number) == number:
                raise Died
            if name in self.held and envelope.kind == "plan":
                assert self.go.wait(100)
            return resident.handle(envelope)

        return handle


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cohort]:
    with meeting(tmp_path_factory.mktemp("masked"), NAMES) as place:
        yield Cohort(place)


@pytest.fixture(scope="module")
def config(cohort: Cohort) -> FederationConfig:
    return settings(
        "masked", cohort.place.package, "rounds=1", "secure.enabled=true", "codec.up=int8", "codec.down=fp32",
        "local.weight=sequences", "local.weight_cap=1024", "cohort.size=6", f"cohort.quorum={LEAST}",
    )  # fmt: skip


def test_a_third_gone_behind_its_masks_leaves_an_exact_sum(cohort: Cohort, config: FederationConfig) -> None:
    """One dies with its shares before it masks anything, one right after it sent what is masked."""
    cohort.start()
    cohort.dies_at = {"frances": ("plan", 1), "niklaus": ("maskunmask", 1)}
    with hard_deaths():
        cohort.place.run(config)
        (record,) = cohort.place.wait_for_end(config.name, 1)
        wait_for(lambda: cohort.dead() == {"frances", "niklaus"}, "both deaths")
    assert (record["planned"], record["folded"], record["lost"], record["attempt"]) == (6, 5, 1, 0)
    folded = cohort.of(1)
    assert set(folded) == set(NAMES) - {"frances"}
    assert len({entry.weight for entry in folded.values()}) > 2, "weights that are all equal would hide a wrong one"
    assert_exact(cohort, config, folded, before=None)


def test_one_more_gone_abandons_the_attempt_and_the_next_has_other_masks(
    cohort: Cohort, config: FederationConfig
) -> None:
    cohort.revive()
    before = state_of(cohort, config)
    cohort.dies_at = dict.fromkeys(("edsger", "frances", "niklaus"), ("plan", 2))
    cohort.place.run(with_overrides(config, ["rounds=2"]))
    (abandoned,) = wait_for(lambda: cohort.place.ledger(config.name, "abandoned"), "the end of the first attempt")
    assert (abandoned["round"], abandoned["attempt"]) == (2, 0) and "lost 3" in abandoned["reason"]
    assert len(cohort.place.ledger(config.name, "round")) == 1
    (first,) = cohort.sessions(2)
    cohort.revive()
    record = cohort.place.wait_for_end(config.name, 2)[-1]
    assert record["attempt"] == 1 and record["folded"] >= LEAST
    assert len(cohort.sessions(2)) == 2
    folded = {name: entry for name, entry in cohort.of(2).items() if entry.mask.session != first}
    assert len(folded) == record["folded"]
    assert_exact(cohort, config, folded, before)


def test_a_server_killed_in_a_masked_round_comes_back_with_other_masks(
    cohort: Cohort, config: FederationConfig
) -> None:
    before, (config, name) = state_of(cohort, config), (with_overrides(config, ["rounds=3"]), config.name)
    cohort.held = {"ada"}
    cohort.place.run(config)
    wait_for(lambda: len(cohort.of(3)) == 5, "the masked updates of all but one")
    pid = cohort.place.app_pid(name)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid), "the end of the ServerApp")
    lost = cohort.of(3)
    cohort.held, _ = set(), cohort.go.set()
    cohort.place.run(config)
    record = cohort.place.wait_for_end(name, 3)[-1]
    assert (record["round"], record["attempt"], record["folded"]) == (3, 1, 6)
    attempts = [entry["attempt"] for entry in cohort.place.ledger(name, "attempt") if entry["round"] == 3]
    assert attempts == [0, 1]
    folded = cohort.of(3)
    for device, entry in lost.items():
        again = folded[device]
        assert np.array_equal(entry.codes, again.codes) and entry.weight == again.weight
        assert entry.mask.session != again.mask.session and entry.payload != again.payload
    assert_exact(cohort, config, folded, before)


def state_of(cohort: Cohort, config: FederationConfig) -> AdapterState:
    """What is committed now."""
    layout = read_layout(config, read_manifest(config))
    found = load_checkpoint(cohort.place.home.run(config.name) / "checkpoints")
    if found is None:
        return start_state(layout, config.seed, config.codec.down)
    return restore_state(layout, found.arrays, found.meta["state"])


def assert_exact(
    cohort: Cohort, config: FederationConfig, folded: dict[str, Masked], before: AdapterState | None
) -> None:
    """The committed change is the plain integer sum of what those devices had before masking, over their weights."""
    after = state_of(cohort, config)
    layout, groups = after.layout, Phase.BOTH.groups
    before = before or start_state(layout, config.seed, config.codec.down)
    (scales,) = {entry.mask.scales for entry in folded.values()}
    total = np.sum([entry.codes.astype(np.int64) * entry.weight for entry in folded.values()], axis=0)
    weight = sum(entry.weight for entry in folded.values())
    unit = np.repeat(scales, layout.segment_sizes(groups, layout.max_rank)) / weight
    sums, units = (layout.split(vector.astype(np.float64), groups, layout.max_rank) for vector in (total, unit))
    assert np.abs(total).max() > 10_000
    for group in groups:
        was, now = (state.values[group].astype(np.float64) + state.residuals[group] for state in (before, after))
        counted = (now - was) / units[group]
        assert np.array_equal(np.rint(counted), sums[group])
        assert np.abs(counted - sums[group]).max() < 0.01, "what float32 leaves of the residual is far from a unit"
