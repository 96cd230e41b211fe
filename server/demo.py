"""``make federate``: a whole federation on this machine, from keys to a champion adapter that changes what is written.

SuperLink and three clients are processes of their own, with TLS and registered keys, as they would be on four
machines. Each client owns the documentation of other Python modules. Everything started here is ended here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from edge_runtime.formats.errors import SevenfoldError, UserError
from server import registry
from server.certificates import ensure_certificates
from server.config import FederationConfig, load_federation
from server.federation import read_manifest
from server.home import Home, open_home
from server.operation import apply_registry, has_rounds, resume, run, terminable
from server.page import serve_in_background
from server.processes import MARKER, end_processes
from server.superlink import PROJECT, SuperLink, last_lines, list_nodes, running_superlink
from server.view import read_federation

NAME = "demo"
TRAINERS = {"client-1": "onnx", "client-2": "tflite", "client-3": "onnx"}
PROMPT, TEXT_TOKENS = "The following", 24
CONNECTED_S = 120.0


class DemoError(SevenfoldError):
    """Something that the demo started did not do its part; the message quotes its log."""


def run_demo(path: Path, page_port: int) -> int:
    """Run or resume the federation ``demo``; the exit code of its last step.

    Args:
        path: The federation home, made if needed.
        page_port: Of the fleet page; any free one when it is taken.

    Raises:
        UserError: There is no package or corpus yet, or an ``up`` serves this home.
    """
    config = load_federation(NAME)
    config = config.model_copy(update={"package": PROJECT / config.package})
    corpus = PROJECT / "artifacts" / "corpus" / "train.jsonl"
    for needed in (config.package / "manifest.json", corpus):
        if not needed.is_file():
            raise UserError("demo", str(needed), "a finished `python -m pipeline`", "type make demo first")
    if not any(path.startswith("onnx/train_") for path in read_manifest(config).files):
        raise UserError("demo", str(config.package), "a package with training files", "make demo makes it anew")
    home = open_home(path, create=True)
    _deal_text(home, corpus)
    _enrol_clients(home)
    ensure_certificates(home, [], datetime.now(UTC))
    with terminable(), _fleet_page(home, page_port) as page, running_superlink(home) as link:
        apply_registry(home)
        print(f"fleet page  {page}", flush=True)
        _forget_earlier(home)
        with _clients(home, config, link) as clients:
            _wait_until_connected(home, clients)
            print("devices     3 connected, each with text of its own", flush=True)
            code = _rounds(home, config)
    champion = PROJECT / "artifacts" / "adapters" / config.package.name / "champion"
    if code == 3 and champion.exists():
        print("the champion of an earlier federation stays: this adapter is not measurably better")
        code = 0
    if code in (0, 3):
        _show_texts(home, config, champion)
    return code


def _deal_text(home: Home, corpus: Path) -> None:
    """The documentation of different modules for each client."""
    data = home.root / NAME / "data"
    if not data.is_dir():
        _python("-m", "pipeline.data.shards", "--out", str(data), "--clients", "3", "--corpus", str(corpus))


def _enrol_clients(home: Home) -> None:
    """What a person does once for each device: keys there, enrolment here."""
    known = {device.name for device in registry.enrolled(home)}
    for name in TRAINERS:
        if name not in known:
            state = home.root / NAME / name
            _python("-m", "edge_runtime", "client", "keys", "--name", name, "--state", str(state))
            registry.enrol(home, state / "device.json")


@contextlib.contextmanager
def _fleet_page(home: Home, port: int) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(serve_in_background(home, port))
        except UserError:
            address = stack.enter_context(serve_in_background(home, 0))
        yield address


@contextlib.contextmanager
def _clients(home: Home, config: FederationConfig, link: SuperLink) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Three devices, ended by their ids at exit; after a kill, the next SuperLink of this home ends them."""
    clients: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, trainer in TRAINERS.items():
            folder = home.root / NAME
            words = ["-m", "edge_runtime", "client", "--name", name, "--state", str(folder / name)]
            words += ["--package", str(config.package), "--data", str(folder / "data" / name)]
            words += ["--superlink", link.address, "--root-certificate", str(home.ca_certificate)]
            words += ["--trainer", trainer, "--threads", "1"]
            with _log(home, name).open("wb") as log:
                clients[name] = subprocess.Popen(
                    [sys.executable, *words], cwd=PROJECT, env=_environment() | {MARKER: str(home.root)},
                    stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
        yield clients
    finally:
        end_processes([client.pid for client in clients.values() if client.poll() is None], grace_s=10.0)
        for client in clients.values():
            client.wait()


def _wait_until_connected(home: Home, clients: dict[str, subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + CONNECTED_S
    while time.monotonic() < deadline:
        for name, client in clients.items():
            if client.poll() is not None:
                raise DemoError(f"{name} ended ({client.returncode}): {last_lines(_log(home, name))}")
        if sum(state == "online" for state in list_nodes(home).values()) >= len(clients):
            return
        time.sleep(0.5)
    raise DemoError(f"not every client connected within {CONNECTED_S:g} s; see {home.root / NAME}")


def _forget_earlier(home: Home) -> None:
    """Devices that start afresh carry no rounding residual of a federation that has ended."""
    if not _is_unfinished(home):
        for name in TRAINERS:
            shutil.rmtree(home.root / NAME / name / "federations" / NAME, ignore_errors=True)


def _is_unfinished(home: Home) -> bool:
    return has_rounds(home.run(NAME)) and read_federation(home.run(NAME)).state != "ended"


def _rounds(home: Home, config: FederationConfig) -> int:
    """Go on with what was cut off, or start from the beginning."""
    if _is_unfinished(home):
        done = read_federation(home.run(NAME)).round
        print(f"going on after round {done}, where the last run was cut off", flush=True)
        return resume(home, NAME, [])
    return run(home, config, fresh=True)


def _show_texts(home: Home, config: FederationConfig, champion: Path) -> None:
    """One prompt through both runtimes, without and with the new adapter."""
    round_number = read_federation(home.run(NAME)).round
    adapter = home.run(NAME) / "candidates" / f"{round_number:06d}"
    if champion.exists():
        adapter = champion
    print(f"\n{PROMPT!r} goes on")
    for container in ("onnx", "tflite"):
        for label, words in (("before", []), ("after", ["--adapter", str(adapter)])):
            print(f"  {container:6} {label:6} {_generate(config.package, container, words)!r}", flush=True)
    shown = {path: os.path.relpath(path) for path in (config.package, adapter)}
    print(
        f"\nnext  {_shown_python()} -m edge_runtime generate --package {shown[config.package]} "
        f'--adapter {shown[adapter]} --prompt "{PROMPT}"'
    )
    print("      make federate once more starts afresh; the same text and seed give the same adapter, bit for bit")


def _generate(package: Path, container: str, words: Sequence[str]) -> str:
    command = ["-m", "edge_runtime", "generate", "--package", str(package), "--container", container, *words]
    command += ["--prompt", PROMPT, "--max-tokens", str(TEXT_TOKENS), "--temperature", "0", "--threads", "1", "--json"]
    return str(json.loads(_python(*command))["text"])


def _python(*words: str) -> str:
    """Run this interpreter to its end; its stdout.

    Raises:
        DemoError: It failed; the message is the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, *words], cwd=PROJECT, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DemoError(f"python {' '.join(words[:3])}: {' '.join((done.stderr or done.stdout).split())[-400:]}")
    return done.stdout


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _log(home: Home, name: str) -> Path:
    return home.root / NAME / f"{name}.log"


def _shown_python() -> str:
    """The interpreter as it is typed from here."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative
