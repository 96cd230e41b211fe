from __future__ import annotations

import json

import numpy as np
import pytest

from edge_runtime.formats.envelope import seal, unseal
from edge_runtime.formats.errors import UserError
from edge_runtime.formats.layout import AdapterLayout, Phase
from edge_runtime.formats.messages import Profile, Update, hello
from server import server_app
from server.adapter_state import start_state
from server.federation import adapter_digest
from server.fleet import DriftingDevice, load_factory, simulate, simulated_layout
from server.local_grid import LocalGrid
from server.plan import make_plan
from server.rounds import FederationError, run_federation
from server.selection import Device
from server.server_app import from_record, run_on_grid, to_record
from tests.server.simulated import events_of, federate, phones, rounds_of, settings

QUICK = ("rounds=8", "evaluation.every=1", "cohort.size=4", "local.steps=4", "adapter.ranks=[8]", "adapter.alpha=16")


def test_simulated_devices_learn_together_through_flowers_messages(tmp_path) -> None:
    reported = []
    run = simulate(settings(*QUICK, "phases.schedule=both"), 4, tmp_path, report=reported.append)
    baseline = events_of(run, "baseline")[0]["held_out_loss"]
    assert [r["round"] for r in reported] == list(range(1, 9)) and run.number == 8
    assert run.record["held_out_loss"] < 0.5 * baseline
    assert all(r["folded"] == 4 and not r["declined"] and not r["refused"] for r in reported)


def test_a_simulation_is_the_same_over_the_grid_and_over_a_plain_transport(tmp_path) -> None:
    config = settings("rounds=3", "codec.down=int4")
    one = simulate(config, 3, tmp_path / "grid", factory=DriftingDevice)
    run_federation(two := federate(config, tmp_path / "wire", phones(config)))
    assert adapter_digest(one) == adapter_digest(two)


def test_a_simulation_goes_on_in_its_directory(tmp_path) -> None:
    simulate(settings("rounds=2", "phases.schedule=both"), 3, tmp_path)
    run = simulate(settings("rounds=3", "phases.schedule=both"), 3, tmp_path)
    assert [r["round"] for r in rounds_of(run)] == [1, 2, 3] and len(events_of(run, "start")) == 1


def test_drift_is_how_far_devices_pull_apart(tmp_path) -> None:
    found = []
    for drift in (0.0, 1.0):
        directory = tmp_path / str(drift)
        config = settings("rounds=1", "codec.up=fp32", "phases.schedule=ffa")
        factory = lambda index, layout, seed, drift=drift: DriftingDevice(index, layout, seed, drift)  # noqa: E731
        found.append(simulate(config, 3, directory, factory).record["dispersion"])
    assert found[0] < 1e-6 and found[1] > 0.2


@pytest.mark.parametrize("phase", list(Phase))
def test_a_device_descends_along_the_gradient_of_its_loss(phase) -> None:
    config = settings()
    layout = simulated_layout(config)
    device, rng = DriftingDevice(2, layout, config.seed), np.random.default_rng(3)
    state = start_state(layout, config.seed, config.codec.down)
    state.apply("b", rng.standard_normal(state.values["b"].size) * 0.1)
    if phase is Phase.CORE:
        state.enter_core()
    factors = state.factors()
    moved = {name: value.copy() for name, value in factors.items()}
    device._descend(moved, phase.groups, 1e-4)
    for name, value in factors.items():
        step = moved[name].astype(np.float64) - value
        if {"A": "a", "B": "b"}.get(name[-1], "core") not in phase.groups:
            assert not step.any()
            continue
        # Central differences along the step, in the direction that the device took: the loss falls as it must.
        nudged = [device.loss(factors | {name: (value + sign * step).astype(np.float32)}) for sign in (1, -1)]
        assert nudged[0] < device.loss(factors) < nudged[1]


def test_a_device_answers_a_repeated_plan_with_the_same_bytes_and_trains_once() -> None:
    config = settings()
    layout = simulated_layout(config)
    device = DriftingDevice(0, layout, config.seed)
    profile = unseal(device(seal(hello("test", layout))), Profile)
    assert (profile.device, profile.rank, profile.layout_digest) == ("simulated-00000", 4, layout.digest)
    state = start_state(layout, config.seed, config.codec.down)
    plan = make_plan(config, state, Device(1, profile.device, rank=4), 1, Phase.B, 9.0)
    first = device(plan)
    device._train = None
    assert device(plan) is first and unseal(first, Update).steps == 2


def test_a_layout_is_that_of_the_configured_targets() -> None:
    layout = simulated_layout(settings("adapter.targets=[v_proj,q_proj]", "adapter.ranks=[2,4]"))
    assert isinstance(layout, AdapterLayout) and layout.ranks == (2, 4) and len(layout.modules) == 4


def test_a_factory_is_found_by_name() -> None:
    assert load_factory("server.fleet:DriftingDevice") is DriftingDevice


@pytest.mark.parametrize(
    "name", ["", "server.fleet", "server.fleet:Nobody", "no.such:module", ":x", "server.fleet:FEATURES"]
)
def test_what_is_no_factory_is_a_users_error(name) -> None:
    with pytest.raises(UserError, match="client"):
        load_factory(name)


# The ServerApp over a whole run ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A federation home whose package is the simulated base."""
    config = settings("rounds=2")
    directory = tmp_path / "runs" / "test"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    monkeypatch.setattr(server_app, "read_manifest", lambda config: None)
    monkeypatch.setattr(server_app, "read_layout", lambda config, manifest: simulated_layout(config))
    return tmp_path


def grid_of(devices):
    return LocalGrid({n: (lambda record, d=d: to_record(d(from_record(record)))) for n, d in devices.items()})


def test_a_federation_runs_from_its_directory_and_is_over_when_started_again(home) -> None:
    reported = []
    for _ in range(2):
        run_on_grid(grid_of(phones(settings())), home, "test", reported.append, registered=False)
    assert [r["round"] for r in reported] == [1, 2]
    events = [json.loads(line)["event"] for line in (home / "runs" / "test" / "ledger.jsonl").read_text().splitlines()]
    assert events == ["start", "round", "round", "candidate", "end", "resume", "end"]


def test_only_registered_nodes_take_part(home, monkeypatch) -> None:
    devices = phones(settings(), [4] * 4)
    told = {n: unseal(d(seal(hello("test", d.layout))), Profile) for n, d in devices.items()}
    keys = {n: (profile.device, profile.public_key) for n, profile in told.items()}
    known = {n: key for n, key in keys.items() if n != 4}
    monkeypatch.setattr(server_app, "identify", lambda home, node: known.get(node))
    run_on_grid(grid_of(devices), home, "test")
    found = json.loads((home / "runs" / "test" / "devices.json").read_text())
    assert sorted(d["node"] for d in found) == [1, 2, 3]


def test_a_run_that_cannot_go_on_says_why_in_the_ledger(home, monkeypatch) -> None:
    monkeypatch.setattr(server_app.time, "sleep", lambda seconds: None)
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr(server_app.time, "time", lambda: float(next(clock)))
    with pytest.raises(FederationError):
        run_on_grid(LocalGrid({}), home, "test")
    last = json.loads((home / "runs" / "test" / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed" and "round 1: no quorum" in last["reason"]
