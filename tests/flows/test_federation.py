"""SuperLink and three devices as processes on loopback, with TLS and registered keys: whole rounds, and crashes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from edge_runtime.formats.lora import load_adapter
from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from server.processes import is_running, marked_processes
from server.registry import enrolled
from tests.flows.fleet import NAMES, Fleet, kill, printed, running_fleet, settings, wait_for

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("federation")]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet) -> subprocess.CompletedProcess[str]:
    """A federation of five rounds in which nothing happens."""
    return fleet.server("run", *settings("calm", fleet.package))


def test_three_devices_train_round_by_round_and_the_loss_falls(
    fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    assert undisturbed.returncode == 0, undisturbed.stderr + undisturbed.stdout
    rounds, events = fleet.rounds("calm"), [record["event"] for record in fleet.ledger("calm")]
    assert [(record["round"], record["folded"], record["lost"]) for record in rounds] == [
        (n, 3, 0) for n in range(1, 6)
    ]
    assert [record["phase"] for record in rounds] == ["b", "a", "b", "a", "b"]
    assert (events[0], events[1], events[-1]) == ("start", "baseline", "end")
    losses = [fleet.ledger("calm")[1]["held_out_loss"], *(record["held_out_loss"] for record in rounds)]
    # An untrained model guesses among all 511 tokens.
    assert losses[0] == pytest.approx(math.log(511), rel=0.1) and losses[-1] < losses[0] - 0.02
    assert losses == sorted(losses, reverse=True)


def test_what_is_printed_is_one_line_a_round_and_where_the_adapter_is(
    fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    lines = undisturbed.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("round ") and "folded" in line] == [
        f"{number}/5" for number in range(1, 6)
    ]
    candidate = fleet.home.run("calm") / "candidates" / "000005"
    assert lines[-1] == f"candidate of round 5: not evaluated; {candidate}"


def test_the_candidate_is_an_adapter_of_the_packages_base(
    fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    manifest = open_package(fleet.package, load_trust()).manifest
    candidate = fleet.home.run("calm") / "candidates" / "000005"
    adapter = load_adapter(candidate, manifest.decoder, manifest.base_digest)
    assert adapter.rank == 4 and all(np.abs(b).max() > 0 for _, b in adapter.pairs.values())
    assert json.loads((candidate / "candidate.json").read_text())["package"] == str(fleet.package)


def test_flower_is_given_settings_and_no_code(fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]) -> None:
    installed = [path for path in (fleet.home.flower / "apps").rglob("*") if path.is_file()]
    assert {path.name for path in installed} == {"pyproject.toml", "LICENSE"}


def test_status_and_fleet_page_agree_with_the_ledger(
    fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    status = json.loads(fleet.server("status", "--json").stdout)
    assert (status["superlink"], status["devices"]) == (fleet.address, {"enrolled": 3, "revoked": 0, "online": 3})
    (calm,) = [entry for entry in status["federations"] if entry["name"] == "calm"]
    assert (calm["state"], calm["round"], calm["rounds"]) == ("ended", 5, 5)
    (page,) = [line.split()[2] for line in (fleet.folder / "up.log").read_text().splitlines() if "fleet page" in line]
    with urllib.request.urlopen(page, timeout=30) as reply:
        text = reply.read().decode()
    assert all(f"<td>{name}</td>" in text for name in NAMES) and f"{calm['held_out_loss']:.4f}" in text


def test_a_finished_federation_is_not_overwritten(fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]) -> None:
    done = fleet.server("run", *settings("calm", fleet.package))
    assert done.returncode == 2 and "resume federation=calm" in done.stderr and "\n" not in done.stderr.strip()


def test_a_device_is_let_in_by_enrolment_alone_and_shut_out_by_revocation(fleet: Fleet) -> None:
    card = fleet.make_keys("stranger")
    stranger = fleet.start_device("stranger", data="one")
    assert stranger.wait(timeout=120) == 2
    assert len(enrolled(fleet.home)) == 3
    done = fleet.server("enrol", str(card))
    assert done.stdout == "stranger is enrolled, effective now\n", done.stderr
    fleet.start_device("stranger", data="one")
    wait_for(lambda: printed(fleet.folder / "stranger.log", "connected"), "the connection of an enrolled device")
    kill(fleet.devices["stranger"].pid)
    fleet.devices["stranger"].wait()
    assert fleet.server("revoke", "stranger").stdout == "stranger is revoked, effective now\n"
    assert fleet.start_device("stranger", data="one").wait(timeout=120) == 2


@LINUX
def test_kills_in_every_phase_and_resume_end_at_the_same_bits(
    fleet: Fleet, undisturbed: subprocess.CompletedProcess[str]
) -> None:
    name, resume = "stormy", ("resume", "federation=stormy")
    run = fleet.start_run("run", *settings(name, fleet.package))
    # The ServerApp, right after it committed a round: the next one's plans are being made or sent.
    fleet.wait_for_round(name, 1)
    kill(fleet.app_pid(name))
    assert run.wait(timeout=120) == 1
    assert printed(fleet.folder / "run.log", "python -m server resume federation=stormy")
    # A device while it trains; started again, it answers what it was asked.
    run = fleet.start_run(*resume)
    wait_for(lambda: any(record["event"] == "resume" for record in fleet.ledger(name)), "resume")
    fleet.wait_for_round(name, 2)
    time.sleep(0.3)
    kill(fleet.devices["two"].pid)
    fleet.devices["two"].wait()
    fleet.start_device("two")
    # The SuperLink in the next round; `up` starts it again on the same port and database.
    fleet.wait_for_round(name, 3)
    link = json.loads(fleet.home.link_file.read_text())["pid"]
    kill(link)
    assert run.wait(timeout=120) == 1
    wait_for(lambda: json.loads(fleet.home.link_file.read_text())["pid"] != link, "another SuperLink")
    wait_for(lambda: len(printed(fleet.folder / "up.log", "it is started again")) > 0, "word of it")
    wait_for(lambda: (fleet.folder / "up.log").read_text().count("SuperLink   127.0.0.1") == 2, "its readiness")
    done = fleet.server(*resume)
    assert done.returncode == 0, done.stderr + done.stdout
    calm, stormy = fleet.rounds("calm"), {record["round"]: record for record in fleet.rounds(name)}
    assert [stormy[number]["folded"] for number in range(1, 6)] == [3] * 5
    assert [stormy[n]["adapter_sha256"] for n in range(1, 6)] == [record["adapter_sha256"] for record in calm]
    adapters = [
        (fleet.home.run(federation) / "candidates" / "000005" / "adapter_model.safetensors").read_bytes()
        for federation in ("calm", name)
    ]
    assert adapters[0] == adapters[1]


@LINUX
def test_up_killed_leaves_helpers_that_the_next_up_ends(fleet: Fleet) -> None:
    assert fleet.up is not None
    before, port = marked_processes(fleet.home.root), fleet.address
    kill(fleet.up.pid)
    fleet.up.wait()
    assert any(is_running(pid) for pid in before), "a SuperLink outlives its killed parent"
    fleet.start_up()
    assert not any(is_running(pid) for pid in before) and fleet.address == port
    wait_for(lambda: json.loads(fleet.server("status", "--json").stdout)["devices"]["online"] == 3, "all devices back")


def test_an_interrupted_run_is_stopped_and_says_how_to_go_on(fleet: Fleet) -> None:
    run = fleet.start_run("run", *settings("short", fleet.package))
    fleet.wait_for_round("short", 1)
    os.kill(run.pid, 2)
    assert run.wait(timeout=60) == 130
    assert printed(fleet.folder / "run.log", "resume federation=short goes on")
    wait_for(lambda: not is_running(fleet.app_pid("short")), "the end of the ServerApp", 60.0)


def test_everything_ends_with_up(fleet: Fleet) -> None:
    assert fleet.up is not None
    fleet.up.terminate()
    assert fleet.up.wait(timeout=60) == 0
    assert marked_processes(fleet.home.root) == []
    done = fleet.server("run", *settings("late", fleet.package))
    assert done.returncode == 2 and "python -m server up" in done.stderr
