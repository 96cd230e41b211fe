"""A federation's server and devices as the processes that people start, on this machine, over TLS."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.formats.decoder import PROJECTIONS
from edge_runtime.formats.int4 import save_weights
from edge_runtime.formats.manifest import AdapterSlots
from edge_runtime.formats.package import seal_package
from edge_runtime.formats.signing import signing_key
from pipeline.artifacts import PROJECT, file_digest
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_graph import write_onnx
from pipeline.export.train_step_onnx import write_onnx_train_steps
from server.home import Home
from server.ledger import read_records
from server.processes import end_processes, is_running, marked_processes
from tests.edge_runtime.fakes import byte_tokenizer
from tests.train_cases import base_of

NAMES = ("one", "two", "three")
TOKENS, BATCH, RANK = 32, 4, 4
PATIENCE_S = 120.0


def make_package(folder: Path) -> Path:
    """A tiny decoder with untrained weights that ONNX Runtime trains, signed with this machine's key."""
    base, directory, weights = base_of("tied", padded=True), folder / "package", folder / "weights.safetensors"
    (directory / "onnx").mkdir(parents=True)
    save_weights(weights, base.spec, base.weights)
    slots = LoraSlots(PROJECTIONS, rank=RANK)
    stored = write_onnx(directory / "onnx", base.spec, base.weights, lora=slots, accuracy_level=4)
    write_onnx_train_steps(directory / "onnx", base.spec, stored, slots, buckets=(TOKENS,), batch_sequences=BATCH)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    seal_package(
        directory, name="tiny", version="0.1.0", counter=1, base_digest=file_digest(weights), decoder=base.spec,
        bos=None, eos=(257,), containers={"onnx": AdapterSlots(PROJECTIONS)}, licence="Apache-2.0", key=signing_key(),
    )  # fmt: skip
    return directory


def write_texts(folder: Path) -> None:
    """Real text, other modules for each device."""
    for index, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for module in (("argparse", "ast"), ("decimal", "email/header"), ("http/client", "inspect"))[index]:
            source = Path(os.__file__).parent / f"{module}.py"
            if not source.exists():
                source = source.with_name("_pydecimal.py")
            (folder / name / f"{source.stem}.txt").write_text(source.read_text()[:60_000])


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Fleet:
    """``up``, devices and runs; every process is ended by ``stop``.

    Attributes:
        folder: Holds the home, the devices' states and their texts.
    """

    folder: Path
    package: Path
    up: subprocess.Popen[str] | None = None
    devices: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def home(self) -> Home:
        return Home(self.folder / "home")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{json.loads(self.home.link_file.read_text())['port']}"

    def server(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command("server", *words), env=environment(), capture_output=True, text=True, check=False, timeout=300
        )

    def start_up(self) -> list[str]:
        """Start ``up`` and return the lines that it prints first."""
        # Its own port from the start: other tests run beside this one, and a restart must find it free.
        port = () if self.home.link_file.exists() else ("--port", str(free_port()))
        self.up = start(self._command("server", "up", "--page-port", "0", *port), self.folder / "up.log")
        lines: list[str] = wait_for(lambda: self.up.poll() or printed(self.folder / "up.log", "Ctrl-C"), "up")
        assert self.up.poll() is None, (self.folder / "up.log").read_text()
        return lines

    def make_keys(self, name: str) -> Path:
        state = self.folder / "state" / name
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime", "client", "keys", "--name", name, "--state", str(state)],
            cwd=PROJECT, env=environment(), capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert json.loads(done.stdout)["name"] == name
        return state / "device.json"

    def start_device(self, name: str, data: str | None = None) -> subprocess.Popen[str]:
        words = ["--name", name, "--state", str(self.folder / "state" / name), "--package", str(self.package)]
        words += ["--data", str(self.folder / "data" / (data or name)), "--superlink", self.address]
        words += ["--root-certificate", str(self.home.ca_certificate), "--trainer", "onnx", "--threads", "1"]
        words += ["--lease", str(self.folder / "lease"), "--memory-bytes", "0"]
        command = [sys.executable, "-m", "edge_runtime", "client", *words]
        self.devices[name] = start(command, self.folder / f"{name}.log")
        return self.devices[name]

    def start_run(self, command: str, *words: str) -> subprocess.Popen[str]:
        """``run`` or ``resume``."""
        return start(self._command("server", command, *words), self.folder / "run.log")

    def ledger(self, federation: str) -> list[dict[str, Any]]:
        return read_records(self.home.run(federation) / "ledger.jsonl")

    def rounds(self, federation: str) -> list[dict[str, Any]]:
        return [record for record in self.ledger(federation) if record["event"] == "round"]

    def wait_for_round(self, federation: str, number: int) -> None:
        wait_for(lambda: any(record["round"] >= number for record in self.rounds(federation)), f"round {number}")

    def app_pid(self, federation: str) -> int:
        return int((self.home.run(federation) / "lock").read_text())

    def stop(self) -> None:
        running = [process for process in (*self.devices.values(), self.up) if process and process.poll() is None]
        end_processes([process.pid for process in running], grace_s=20.0)
        for process in running:
            process.wait()
        end_processes(marked_processes(self.home.root), grace_s=5.0)

    def _command(self, module: str, *words: str) -> list[str]:
        return [sys.executable, "-m", module, words[0], "--home", str(self.home.root), *words[1:]]


@contextlib.contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    """``up`` with three enrolled devices, connected."""
    fleet = Fleet(folder, make_package(folder))
    write_texts(folder / "data")
    try:
        for name in NAMES:
            done = fleet.server("enrol", str(fleet.make_keys(name)))
            assert done.returncode == 0 and "effective at the next" in done.stdout, done.stderr
        fleet.start_up()
        for name in NAMES:
            fleet.start_device(name)
        yield fleet
    finally:
        fleet.stop()


def settings(name: str, package: Path) -> list[str]:
    """Overrides of ``default`` for a short federation whose every round needs all three devices."""
    return [
        "federation=default", f"name={name}", f"package={package}", "rounds=5", "gate=false", "adapter.ranks=[2,4]",
        "adapter.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        "phases.schedule=alternating", "phases.warmup_rounds=1", "phases.turn_rounds=1",
        "local.steps=6", f"local.batch_sequences={BATCH}", f"local.sequence_tokens={TOKENS}",
        "local.learning_rate=1e-2", "local.learning_rate_b=1e-2",
        "cohort.size=3", "cohort.over_selection=1", "cohort.quorum=3", "cohort.patience_s=120",
        "cohort.shortest_deadline_s=60", "cohort.longest_deadline_s=60",
        "evaluation.most_sequences=8", "gates.norm_factor=0",
    ]  # fmt: skip


def start(command: list[str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=PROJECT, env=environment(), text=True, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}


def printed(log: Path, word: str) -> list[str]:
    """The log's lines once one of them holds the word."""
    lines = log.read_text().splitlines()
    return lines if any(word in line for line in lines) else []


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """The condition's value as soon as it holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid), f"the end of {pid}", 20.0)
