"""The lease between real processes; waiting is counted in steps, never in seconds."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import backends, bench
from edge_runtime.bench import BenchPlan
from edge_runtime.request import FinishReason, Token
from edge_runtime.scheduler.lease import RUNNING_FILE, WANTED_FILE, inference_lease, lease_directory, training_lease
from edge_runtime.session import Opening
from edge_runtime.terminal import consume
from tests.edge_runtime import fakes

ROOT = Path(__file__).resolve().parents[3]

# One line before and one after every step.
TRAINER = """
import sys, time
from pathlib import Path
from edge_runtime.scheduler.lease import training_lease
number = 0
while True:
    with training_lease(Path(sys.argv[1]), wait=time.sleep) as granted:
        number += 1
        print("begin", number, flush=True)
        time.sleep(float(sys.argv[2]))
        print("end", number, flush=True)
"""
GENERATOR = """
import sys
from pathlib import Path
from edge_runtime.scheduler.lease import inference_lease
with inference_lease(Path(sys.argv[1])):
    print("generating", flush=True)
    sys.stdin.readline()
print("done", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    """Start a program beside the test; every one is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "lease"), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """One line, and not a byte of the next."""
    assert process.stdout is not None
    raw = b""
    while not raw.endswith(b"\n"):
        raw += os.read(process.stdout.fileno(), 1)
    return raw.decode().strip()


def test_a_generation_beside_an_endless_trainer_waits_for_the_running_step_and_holds_back_the_next(
    tmp_path: Path, start: object
) -> None:
    trainer = start(TRAINER, "0.2")  # type: ignore[operator]
    assert line(trainer) == "begin 1"
    for _ in range(3):
        with inference_lease(tmp_path / "lease"):
            # The kernel has granted the lease: the step that was under way has ended, none has begun since.
            seen = drain(trainer)
            assert seen[-1].startswith("end")
            assert sum(text.startswith("begin") for text in seen) <= 1
            time.sleep(0.3)
            assert drain(trainer) == []
        assert line(trainer).startswith("begin")


def test_a_step_that_is_running_is_waited_for(tmp_path: Path, start: object) -> None:
    trainer = start(TRAINER, "0.4")  # type: ignore[operator]
    assert line(trainer) == "begin 1"
    with inference_lease(tmp_path / "lease"):
        assert drain(trainer) == ["end 1"]


def test_a_generation_that_waits_for_a_step_is_next_whatever_the_trainer_does(tmp_path: Path, start: object) -> None:
    with training_lease(tmp_path / "lease", wait=give_nothing):
        generator = start(GENERATOR)  # type: ignore[operator]
        end_s = time.monotonic() + 30
        while not is_wanted(tmp_path / "lease"):
            assert time.monotonic() < end_s
    # The step has ended; the generation may not have woken up yet, but the trainer is held back already.
    with training_lease(tmp_path / "lease", wait=give_nothing, give_up=lambda: True) as granted:
        assert not granted
    assert line(generator) == "generating"


def test_a_trainer_killed_in_a_step_leaves_no_lock(tmp_path: Path, start: object) -> None:
    trainer = start(TRAINER, "600")  # type: ignore[operator]
    assert line(trainer) == "begin 1"
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    generator = start(GENERATOR)  # type: ignore[operator]
    assert line(generator) == "generating"


def test_a_generation_that_was_killed_leaves_no_lock(tmp_path: Path, start: object) -> None:
    generator = start(GENERATOR)  # type: ignore[operator]
    assert line(generator) == "generating"
    with training_lease(tmp_path / "lease", wait=give_nothing, give_up=lambda: True) as granted:
        assert not granted
    os.kill(generator.pid, signal.SIGKILL)
    generator.wait()
    with training_lease(tmp_path / "lease", wait=give_nothing, give_up=lambda: True) as granted:
        assert granted


def test_generations_run_side_by_side(tmp_path: Path, start: object) -> None:
    generator = start(GENERATOR)  # type: ignore[operator]
    assert line(generator) == "generating"
    with inference_lease(tmp_path / "lease"), inference_lease(tmp_path / "lease"):
        pass


def test_training_asks_again_until_the_generation_is_over(tmp_path: Path, start: object) -> None:
    generator = start(GENERATOR)  # type: ignore[operator]
    assert line(generator) == "generating"
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            generator.communicate("\n")

    with training_lease(tmp_path / "lease", wait=wait) as granted:
        assert granted and len(waits) == 3


def test_two_trainers_never_step_together(tmp_path: Path) -> None:
    with training_lease(tmp_path, wait=give_nothing) as first:
        with training_lease(tmp_path, wait=give_nothing, give_up=lambda: True) as second:
            assert first and not second
        # The one that was turned away gave `wanted` back: a generation may announce itself meanwhile.
        handle = os.open(tmp_path / WANTED_FILE, os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(handle)


def test_the_files_are_the_owners_alone(tmp_path: Path) -> None:
    with inference_lease(tmp_path / "a" / "b"):
        for name in (WANTED_FILE, RUNNING_FILE):
            assert stat.S_IMODE((tmp_path / "a" / "b" / name).stat().st_mode) == 0o600


def test_text_still_comes_where_no_lease_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warnings: list[str] = []
    with inference_lease(tmp_path / "file" / "lease", warn=warnings.append):
        pass
    assert len(warnings) == 1 and "without a lease" in warnings[0]
    with pytest.raises(OSError), training_lease(tmp_path / "file" / "lease", wait=give_nothing):
        pass


def test_the_directory_is_this_machines_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEVENFOLD_STATE_DIR", str(tmp_path))
    assert lease_directory() == tmp_path / "lease"
    monkeypatch.delenv("SEVENFOLD_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert lease_directory() == tmp_path / "x" / "sevenfold" / "lease"


def give_nothing(seconds: float) -> None:
    """Do not sleep."""


def is_wanted(directory: Path) -> bool:
    with (directory / WANTED_FILE).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def drain(process: subprocess.Popen[str]) -> list[str]:
    """The lines that are there now."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    os.set_blocking(descriptor, False)
    try:
        raw = os.read(descriptor, 1 << 16)
    except BlockingIOError:
        raw = b""
    finally:
        os.set_blocking(descriptor, True)
    return raw.decode().split("\n")[:-1]


def may_train() -> bool:
    with training_lease(wait=give_nothing, give_up=lambda: True) as granted:
        return granted


@pytest.fixture
def own_lease(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEVENFOLD_STATE_DIR", str(tmp_path / "state"))


@pytest.mark.usefixtures("own_lease")
def test_a_generation_holds_the_lease_from_before_its_prefill_to_its_last_token() -> None:
    seen: list[bool] = []

    def steps() -> Iterator[Token]:
        seen.append(may_train())  # the prefill runs here
        yield Token(65, "A", None)
        seen.append(may_train())
        yield Token(66, "B", FinishReason.LENGTH)

    assert may_train()
    assert consume(steps(), show=False).text == "AB"
    assert seen == [False, False] and may_train()


@pytest.mark.usefixtures("own_lease")
def test_a_measurement_holds_the_lease(package_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for container, (_, _, file) in dict(backends.OPENERS).items():
        monkeypatch.setitem(backends.OPENERS, container, (fakes.__name__, "TableBackend", file))
    seen: list[bool] = []
    monkeypatch.setattr(bench, "_measure_speed", lambda session, plan: seen.append(may_train()) or {})
    bench.run_bench(Opening(package_dir), BenchPlan(4, 4, 1), as_json=True)
    assert seen == [False] and may_train()
