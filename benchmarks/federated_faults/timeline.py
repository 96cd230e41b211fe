"""A whole federation as processes, killed again and again, and a supervisor that restarts what died.

Nothing here is special to the benchmark but the devices' base: `python -m server up`, `run` and `resume` are what a
user types, with TLS and registered keys. The supervisor is a loop that types them again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.federated_faults.device import DEVICES, PACKAGE, PLAN_FILE, write_package
from benchmarks.federated_faults.digits import Base, Tokens, write_text
from benchmarks.federated_faults.events import SERVER_APP, SUPERLINK, Kill, Schedule
from edge_runtime.federated.identity import write_enrolment
from server import registry
from server.home import Home
from server.ledger import LEDGER_FILE, read_records
from server.operation import has_rounds
from server.processes import end_processes, marked_processes
from server.superlink import PROJECT

NAME = "chaos"
LONGEST_RUN_S = 1500.0
_POLL_S, _RESTART_S = 0.05, 0.3


@dataclass(slots=True)
class Blow:
    """A kill that was carried out.

    Attributes:
        number: The round that was under way.
        at_s: Since the start of the run.
        recovered_s: From the signal to the next committed round.
    """

    kill: Kill
    number: int
    at_s: float
    recovered_s: float = float("nan")


@dataclass(slots=True)
class Timeline:
    """What the supervisor saw.

    Attributes:
        records: Ledger records of committed rounds, in the ledger's order.
        committed_s: Round to when it was seen in the ledger, since the start.
        contributors: Round to the devices whose updates are in it, from its checkpoint.
        blows: In order.
        restarts: Victim's kind to how often it was started again.
    """

    records: list[dict] = field(default_factory=list)
    committed_s: dict[int, float] = field(default_factory=dict)
    contributors: dict[int, list[str]] = field(default_factory=dict)
    blows: list[Blow] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)

    @property
    def usual_s(self) -> float:
        """Median seconds between two commits."""
        times = [self.committed_s[number] for number in sorted(self.committed_s)]
        return statistics.median([b - a for a, b in pairwise(times)] or [1.0])


def prepare_home(home: Home, base: Base, text: Mapping[str, Tokens], schedule: Schedule, late_s: float) -> None:
    """The package, and a directory with keys, text and enrolment for each device."""
    write_package(home.root / PACKAGE, base)
    for name, rows in text.items():
        directory = home.root / DEVICES / name
        (directory / "text").mkdir(parents=True)
        write_text(rows, directory / "text" / "images.jsonl")
        registry.enrol(home, write_enrolment(directory, name))
    conduct = {name: {str(number): kind for number, kind in mine.items()} for name, mine in schedule.items()}
    (home.root / PLAN_FILE).write_text(json.dumps({"devices": conduct, "late_s": late_s}))


def run_disturbed(home: Home, settings: Path, rounds: int, kills: Sequence[Kill], names: Sequence[str]) -> Timeline:
    """Run a federation to its end while processes are killed.

    Args:
        home: Prepared.
        settings: YAML of the federation ``chaos``.
        rounds: Of it.
        kills: In the order of their rounds.
        names: Devices.

    Raises:
        TimeoutError: It did not end; the message holds the ends of the logs.
    """
    with _superlink(home), contextlib.ExitStack() as stack:
        processes = _Processes(home, settings)
        stack.callback(processes.end)
        for name in names:
            processes.start_device(name)
        return _supervise(home, processes, rounds, list(kills))


def _supervise(home: Home, processes: _Processes, rounds: int, left: list[Kill]) -> Timeline:
    seen, start_s, due_s = Timeline(restarts=processes.restarts), time.monotonic(), None
    while True:
        now_s = time.monotonic() - start_s
        if now_s > LONGEST_RUN_S:
            raise TimeoutError(f"round {len(seen.records)} of {rounds} after {now_s:.0f} s; {processes.last_words()}")
        for record in _new_rounds(home, seen):
            number = record["round"]
            seen.committed_s.setdefault(number, now_s)
            seen.contributors[number] = _contributors(home, number)
            for blow in seen.blows:
                if math.isnan(blow.recovered_s) and number >= blow.number:
                    blow.recovered_s = now_s - blow.at_s
        newest = max(seen.committed_s, default=0)
        if left and due_s is None and newest >= left[0].after:
            due_s = now_s + left[0].fraction * min(seen.usual_s, 5.0)
        if left and due_s is not None and now_s >= due_s and processes.can_kill(left[0].victims):
            processes.kill(left[0].victims)
            seen.blows.append(Blow(left.pop(0), max(seen.committed_s, default=0) + 1, now_s))
            due_s = None
        if processes.keep_alive() and newest >= rounds:
            return seen
        time.sleep(_POLL_S)


class _Processes:
    """The devices and the command that follows the run; what ended is started again."""

    def __init__(self, home: Home, settings: Path) -> None:
        self.home, self.settings = home, settings
        self.restarts: dict[str, int] = {}
        self._devices: dict[str, subprocess.Popen[bytes]] = {}
        self._runner: subprocess.Popen[bytes] | None = None
        self._started_s: dict[str, float] = {}

    def start_device(self, name: str) -> None:
        address = _address(self.home)
        words = ["-m", "benchmarks.federated_faults.device", str(self.home.root), name, address]
        self._devices[name] = _spawn(words, self.home.root / f"{name}.log")

    def keep_alive(self) -> bool:
        """Start again what ended; whether the federation has ended well."""
        for name, device in list(self._devices.items()):
            if device.poll() is not None and self._rested(name):
                self._count("device")
                self.start_device(name)
        if self._runner is None or (self._runner.poll() not in (None, 0) and self._rested("runner")):
            words = ["run", f"federation={self.settings}"]
            if has_rounds(self.home.run(NAME)):
                words = ["resume", f"federation={NAME}"]
            if self._runner is not None:
                self._count(words[0])
            words = ["-m", "server", words[0], "--home", str(self.home.root), words[1]]
            self._runner = _spawn(words, self.home.root / "runner.log")
        return self._runner.poll() == 0

    def can_kill(self, victims: Sequence[str]) -> bool:
        """Whether all of them run."""
        return all(self._pid(victim) for victim in victims)

    def kill(self, victims: Sequence[str]) -> None:
        """Signal 9, to each by its id."""
        for pid in [self._pid(victim) for victim in victims]:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """End everything that was started here."""
        running = [process for process in [*self._devices.values(), self._runner] if process is not None]
        end_processes([process.pid for process in running if process.poll() is None], grace_s=5.0)
        for process in running:
            process.wait()

    def last_words(self) -> str:
        """The ends of the logs."""
        logs = sorted(self.home.root.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-800:]}" for log in logs)

    def _pid(self, victim: str) -> int:
        """0 when it does not run."""
        if victim in self._devices:
            device = self._devices[victim]
            return device.pid if device.poll() is None else 0
        path, wanted = self.home.run(NAME) / "lock", b"flwr-serverapp"
        if victim == SUPERLINK:
            path, wanted = self.home.link_file, b"flower-superlink"
        elif victim != SERVER_APP:
            raise ValueError(victim)
        try:
            text = path.read_text()
            pid = int(json.loads(text)["pid"] if victim == SUPERLINK else text)
            return pid if wanted in Path(f"/proc/{pid}/cmdline").read_bytes() else 0
        except (OSError, ValueError, KeyError):
            return 0

    def _rested(self, name: str) -> bool:
        """A little pause before each restart, as supervisors have it."""
        now_s = time.monotonic()
        since_s = self._started_s.setdefault(name, now_s)
        if now_s - since_s < _RESTART_S:
            return False
        del self._started_s[name]
        return True

    def _count(self, kind: str) -> None:
        self.restarts[kind] = self.restarts.get(kind, 0) + 1


@contextlib.contextmanager
def _superlink(home: Home) -> Iterator[None]:
    """``python -m server up``, which starts a SuperLink that died again by itself."""
    words = ["-m", "server", "up", "--home", str(home.root), "--page-port", str(free_port())]
    process = _spawn([*words, "--port", str(free_port())], home.root / "up.log")
    try:
        deadline_s = time.monotonic() + 120
        while "Ctrl-C" not in (home.root / "up.log").read_text():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise TimeoutError(f"no SuperLink: {(home.root / 'up.log').read_text()[-1000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        end_processes([pid for pid in [process.pid] if process.poll() is None], grace_s=1.0)
        end_processes(marked_processes(home.root), grace_s=3.0)
        process.wait()


def _new_rounds(home: Home, seen: Timeline) -> list[dict]:
    """Records of rounds that the ledger holds and ``seen`` does not; they are added to it."""
    records = [record for record in read_records(home.run(NAME) / LEDGER_FILE) if record.get("event") == "round"]
    new = records[len(seen.records) :]
    seen.records += new
    return new


def _contributors(home: Home, number: int) -> list[str]:
    """Devices whose update is in a committed round; empty when its checkpoint is gone."""
    for path in (home.run(NAME) / "checkpoints").glob(f"{number:010}-*.safetensors"):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            continue
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        devices = json.loads(header["__metadata__"]["sevenfold"])["meta"]["devices"]
        return sorted(d["name"] for d in devices if (d["last_round"], d["last_outcome"]) == (number, "folded"))
    return []


def _address(home: Home) -> str:
    """The port stays the same when the SuperLink is started again."""
    return f"127.0.0.1:{json.loads(home.link_file.read_text())['port']}"


def _spawn(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words], cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip


def free_port() -> int:
    """One that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
