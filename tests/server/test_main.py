"""The commands: quick, one line a mistake, and what they print is what is there."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from server.__main__ import main
from server.home import open_home
from tests.server.test_registry import card

ROOT = Path(__file__).resolve().parents[2]


def complain(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Lines on stderr of a command that must exit with 2."""
    try:
        code = main(words)
    except SystemExit as exit:  # argparse's own
        code = int(str(exit.code))
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    return printed.err.strip().split("\n")


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("up", "--help")])
def test_help_answers_within_half_a_second_of_cpu(words: tuple[str, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "server", *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert "usage: python -m server" in done.stdout


def test_every_mistake_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    cases = {
        ("status", "--home", home): "python -m server up makes one",
        ("run", "rounds=3", "--home", home): "add federation=demo",
        ("run", "federation=demmo", "--home", home): "did you mean demo?",
        ("resume", "--home", home): "add federation=NAME",
        ("simulate",): "add clients=100",
        ("simulate", "clients=0"): "1 to 1000000",
        ("up", "--port", "70000"): "1 to 65535",
        ("up", "--listen", "9000"): "HOST:PORT",
        ("up", "--home", home, "--name", "a b"): "a host name or an IP address",
        ("nonsense",): "invalid choice",
        ("enrol", str(tmp_path / "missing.json"), "--home", home): "a readable device.json",
        ("revoke", "pi", "--home", home): "no device is enrolled yet",
    }
    for words, expected in cases.items():
        (line,) = complain(capsys, *words)
        assert expected in line, line


def test_every_fault_of_a_configuration_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = complain(capsys, "run", "federation=demo", "rouns=2", "local.steps=0", "codec.up=x")
    assert {line.partition(":")[0] for line in lines} == {"rouns", "local.steps", "codec.up"}


def test_devices_come_and_go_before_the_superlink_was_ever_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = str(tmp_path / "home")
    assert main(["enrol", str(card(tmp_path)), "--home", home]) == 0
    assert capsys.readouterr().out == "pi is enrolled, effective at the next python -m server up\n"
    assert main(["status", "--home", home, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status == {
        "superlink": None, "devices": {"enrolled": 1, "revoked": 0, "online": None}, "federations": [],
    }  # fmt: skip
    assert main(["revoke", "pi", "--home", home]) == 0
    capsys.readouterr()
    assert main(["status", "--home", home]) == 0
    assert "devices     0 enrolled, 1 revoked\n" in capsys.readouterr().out


def test_a_federation_without_rounds_cannot_be_resumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    home = open_home(tmp_path / "home", create=True)
    home.run("demo").mkdir(parents=True)
    (line,) = complain(capsys, "resume", "federation=demo", "--home", str(home.root))
    assert "no federation here has a committed round" in line


def test_a_run_needs_a_superlink_and_a_package_that_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    home = str(open_home(tmp_path / "home", create=True).root)
    words = ("run", "federation=demo", "gate=false", f"package={tmp_path / 'nowhere'}", "--home", home)
    assert "no package here" in complain(capsys, *words)[0]


def test_simulated_devices_learn_and_the_summary_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["clients=6", "rounds=4", "local.steps=5", "phases.warmup_rounds=1"]
    assert main(["simulate", *words, "--out", str(tmp_path / "fleet")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("6/6 folded" in line for line in rounds)
    losses = [float(line.split("held-out ")[1].split()[0]) for line in rounds]
    assert losses[-1] < losses[0]
    assert lines[-1].startswith("6 simulated devices, 4 rounds, ")
    assert (tmp_path / "fleet" / "ledger.jsonl").exists()


def test_a_client_factory_that_is_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nowhere:f", "server.home:nothing", "server.home:DEFAULT_HOME"):
        (line,) = complain(capsys, "simulate", "clients=2", "--client", name)
        assert line.startswith("server: client: got")
