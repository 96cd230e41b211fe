"""Starting a federation on the SuperLink and watching its ledger until it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import ConfigError, UserError
from edge_runtime.formats.files import write_atomically
from edge_runtime.formats.manifest import FOREIGN_CONTAINERS, Manifest
from server.config import FederationConfig
from server.home import Home
from server.ledger import LEDGER_FILE, read_records
from server.processes import end_processes, is_running
from server.superlink import PROJECT, LinkError, SuperLink, find_superlink, last_lines, run_status, stop_run, submit_run
from server.view import GATES_FILE, read_federation

CHAMPION, REFUSED, FAILED = "champion", "refused", "failed"
_POLL_S, _STATUS_S = 0.3, 5.0
_FINISHED = "finished:"


@dataclass(slots=True)
class Gate:
    """``python -m pipeline stage=gate``, one candidate after the other, beside the rounds.

    Attributes:
        waiting: Rounds whose candidates were not judged yet.
        verdict: Of the last one judged: champion, refused or failed; None: none was.
    """

    directory: Path
    waiting: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    verdict: str | None = None

    def step(self) -> bool:
        """Note a verdict that is there, start on the next candidate; False when there is nothing left to do."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            self.verdict = {0: CHAMPION, 3: REFUSED}.get(code, FAILED)
            self._note(self.waiting.pop(0), self.verdict)
            self.process = None
        if self.waiting:
            self.process = self._start(self.waiting[0])
        return self.process is not None

    def stop(self) -> None:
        """End the one that runs; its candidate stays without a verdict."""
        if self.process is not None:
            end_processes([self.process.pid], grace_s=5.0)
            self.process.wait()

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        candidate = self.directory / "candidates" / f"{number:06d}"
        command = [sys.executable, "-m", "pipeline", "stage=gate", f"candidate='{candidate}'"]
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=PROJECT, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def log(self) -> Path:
        """What the gate printed."""
        return self.directory / "gate.log"

    def _note(self, number: int, verdict: str) -> None:
        with (self.directory / GATES_FILE).open("a") as file:
            file.write(json.dumps({"round": number, "verdict": verdict, "time": time.time()}) + "\n")


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a federation's files stood before a run.

    Attributes:
        ledger_bytes: Length of the ledger.
        pid: The ServerApp that ran it last.
    """

    ledger_bytes: int
    pid: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How following ended: ``reason`` is empty when every round was committed."""

    reason: str
    verdict: str | None


def check_package(config: FederationConfig, manifest: Manifest) -> list[str]:
    """Notes about a federation over this package.

    Raises:
        ConfigError: Settings that the package rules out, one line each.
    """
    faults, notes = [], []
    if config.local.sequence_tokens > manifest.decoder.context_tokens:
        faults.append(
            UserError(
                "local.sequence_tokens", config.local.sequence_tokens,
                f"at most {manifest.decoder.context_tokens} (the package's context)", "lower it",
            )
        )  # fmt: skip
    for name, container in manifest.containers.items():
        if name in FOREIGN_CONTAINERS:
            continue
        missing = sorted(set(config.adapter.targets) - set(container.adapters.targets))
        largest = container.adapters.max_rank
        if missing:
            allowed = ", ".join(container.adapters.targets) or "none"
            faults.append(
                UserError("adapter.targets", missing, f"{allowed} ({name} takes no others)", "change adapter.targets")
            )
        if largest is not None and config.adapter.ranks[-1] > largest:
            notes.append(f"adapter.ranks: {config.adapter.ranks[-1]} is more than {name} can load ({largest})")
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(map(str, faults))))
    return notes


def start_federation(home: Home, config: FederationConfig) -> int:
    """Write ``config.json`` and start the ServerApp; returns Flower's number of the run.

    Raises:
        UserError: No SuperLink is up.
        LinkError: It refuses.
    """
    find_superlink(home)
    text = config.model_copy(update={"package": config.package.absolute()}).model_dump_json(indent=1)
    write_atomically(home.run(config.name) / "config.json", text.encode() + b"\n")
    return submit_run(home, config.name)


def follow(
    home: Home,
    config: FederationConfig,
    run: int,
    mark: Mark,
    show: Callable[[Mapping[str, Any]], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Pass on every ledger record until the run ends, and judge candidates meanwhile.

    Args:
        home: Whose SuperLink runs it.
        config: Of the federation.
        run: Flower's number.
        mark: Taken before the run was started.
        show: Called with each new record.
        sleep: Waits so many seconds.

    Raises:
        KeyboardInterrupt: After the run was stopped.
    """
    directory = home.run(config.name)
    gate = Gate(directory, _unjudged(directory) if config.gate else [])
    try:
        reason = _until_end(home, config, run, mark, show, gate, sleep)
        if reason:
            stop_run(home, run)
        while reason == "" and gate.step():
            sleep(_POLL_S)
        return Outcome(reason, gate.verdict)
    except BaseException:
        stop_run(home, run)
        raise
    finally:
        gate.stop()


def take_mark(directory: Path) -> Mark:
    """To tell what a run adds from what was there."""
    path = directory / LEDGER_FILE
    return Mark(path.stat().st_size if path.exists() else 0, _app_pid(directory))


def _until_end(
    home: Home,
    config: FederationConfig,
    run: int,
    mark: Mark,
    show: Callable[[Mapping[str, Any]], None],
    gate: Gate,
    sleep: Callable[[float], None],
) -> str:
    """Why the run ended early, or "" when it did not."""
    directory, offset = home.run(config.name), mark.ledger_bytes
    link, asked_s = find_superlink(home), time.monotonic()
    while True:
        pid = _app_pid(directory)
        died = pid not in ("", mark.pid) and not is_running(
            int(pid)
        )  # before the ledger is read: its last line comes first
        records, offset = _read_new(directory / LEDGER_FILE, offset)
        for record in records:
            show(record)
            if record.get("event") == "candidate" and config.gate:
                gate.waiting.append(record["round"])
            if record.get("event") == "end":
                return ""
            if record.get("event") == "failed":
                return str(record.get("reason"))
        gate.step()
        if died:
            return f"its ServerApp (process {pid}) died; the end of {home.log}: {last_lines(home.log)}"
        if pid in ("", mark.pid) and time.monotonic() - asked_s > _STATUS_S:
            if reason := _why_not_started(home, run, link):
                return reason
            asked_s = time.monotonic()
        sleep(_POLL_S)


def _why_not_started(home: Home, run: int, link: SuperLink) -> str:
    """What keeps the ServerApp from starting; "" while Flower is at it."""
    try:
        if find_superlink(home) != link:
            return "the SuperLink was started anew"
        status = run_status(home, run)
    except (LinkError, UserError) as error:
        return f"the SuperLink does not answer ({error})"
    if not status.startswith(_FINISHED):
        return ""
    return f"Flower says {status}; the end of {home.log}: {last_lines(home.log)}"


def _read_new(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Whole records behind ``offset``, and where they end."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return [], 0
    if size <= offset:
        return [], min(size, offset)  # shorter: a line that a crash cut was dropped
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read(size - offset).rpartition(b"\n")[0]
    records = []
    for line in whole.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, offset + (len(whole) + 1 if whole else 0)


def _app_pid(directory: Path) -> str:
    """The process that holds, or last held, this federation's lock; "" when none is noted."""
    try:
        pid = (directory / "lock").read_text(errors="replace")[:20]
    except OSError:
        return ""
    return pid if pid.isdigit() else ""


def _unjudged(directory: Path) -> list[int]:
    """Candidates of earlier runs that no gate has seen."""
    judged = {record.get("round") for record in read_records(directory / GATES_FILE)}
    return [index for index, _ in read_federation(directory).candidates if index not in judged]
