"""Flower's SuperLink as a process of ours: started with TLS and registered keys, asked through Flower's own command.

flwr is never imported here. Telemetry, update checks and installation of dependencies at run time are off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import SevenfoldError, UserError
from edge_runtime.formats.files import write_atomically
from server.home import Home
from server.processes import MARKER, end_processes, is_running, marked_processes

HOST = "127.0.0.1"  # the SuperLink's Control API knows no passwords: it is reachable from this machine alone
USUAL_PORT = 9443
READY_S = 120.0
COMMAND_S = 120.0
CONNECTION = "sevenfold"
PROJECT = Path(__file__).resolve().parent.parent
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
}
_APP = """\
[project]
name = "sevenfold"
version = "{version}"
description = "Settings only: the apps are modules of the installed sevenfold package"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "sevenfold"
fab-include = ["LICENSE"]

[tool.flwr.app.components]
serverapp = "server.server_app:app"
clientapp = "edge_runtime.federated.client_app:app"

[tool.flwr.app.config]
home = ""
federation = ""
"""


class LinkError(SevenfoldError):
    """The SuperLink does not start, does not answer, or refuses."""


@dataclass(frozen=True, slots=True)
class SuperLink:
    """A running SuperLink.

    Attributes:
        address: ``host:port`` for devices on this machine.
        pid: Of its process, which leads a process group.
        process: The same, where this process started it.
    """

    address: str
    pid: int
    process: subprocess.Popen[bytes] | None = field(default=None, compare=False)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return not is_running(self.pid) if self.process is None else self.process.poll() is not None


@contextlib.contextmanager
def running_superlink(home: Home, port: int | None = None, *, ready_s: float = READY_S) -> Iterator[SuperLink]:
    """Start the SuperLink of a home, and end it and all its helpers at exit.

    What an earlier one left running after it was killed is ended first; its database goes on being used.

    Args:
        home: With certificates.
        port: None: the last one, or the usual one, or any that is free.
        ready_s: How long it may take to answer.

    Raises:
        UserError: Another ``up`` serves this home, or the port is taken.
        LinkError: It ended, or did not answer in time; the message quotes its log.
    """
    with _locked(home):
        end_processes(marked_processes(home.root), grace_s=5.0)
        chosen = _choose_port(home, port)
        process = _spawn(home, chosen)
        try:
            write_atomically(home.link_file, json.dumps({"pid": process.pid, "port": chosen}).encode("ascii"))
            _write_connection(home, chosen)
            _wait_until_ready(home, chosen, process, ready_s)
            yield SuperLink(f"{HOST}:{chosen}", process.pid, process)
        finally:
            _end(home, process)


def find_superlink(home: Home) -> SuperLink:
    """The SuperLink that serves this home now.

    Raises:
        UserError: None does.
    """
    noted = _noted(home)
    link = SuperLink(f"{HOST}:{noted.get('port', 0)}", noted.get("pid", 0))
    if not link.pid or link.ended or not _answers(home, noted["port"]):
        raise UserError("--home", str(home.root), "a home whose SuperLink is up", "start it: python -m server up")
    return link


def register_node(home: Home, name: str, node_key: str) -> int:
    """Let the owner of an OpenSSH EC public key connect; returns the node's number.

    Raises:
        LinkError: Refused; for instance the key is registered already.
    """
    file = home.flower / f"{name}.pub"
    write_atomically(file, (node_key.strip() + "\n").encode("ascii"))
    try:
        answer = ask(home, "supernode", "register", str(file), CONNECTION, "--name", name)
        return int(answer["node-id"])
    finally:
        file.unlink(missing_ok=True)


def unregister_node(home: Home, node: int) -> None:
    """Refuse a node from now on.

    Raises:
        LinkError: There is no such node.
    """
    ask(home, "supernode", "unregister", str(node), CONNECTION)


def list_nodes(home: Home) -> dict[int, str]:
    """Every node that was not unregistered, and its state: registered, online or offline."""
    nodes = ask(home, "supernode", "list", CONNECTION)["nodes"]
    return {int(node["node-id"]): str(node["status"]) for node in nodes if node["status"] not in _GONE}


def submit_run(home: Home, federation: str) -> int:
    """Start the ServerApp for a federation; returns Flower's number of the run."""
    _write_app(home)
    config = f"home='{home.root}' federation='{federation}'"
    return int(ask(home, "run", str(home.app), CONNECTION, "--run-config", config)["run-id"])


def run_status(home: Home, run: int) -> str:
    """``pending``, ``starting``, ``running``, or ``finished:`` and how."""
    runs = ask(home, "list", CONNECTION, "--run-id", str(run))["runs"]
    return str(runs[0]["status"])


def stop_run(home: Home, run: int) -> None:
    """End a run; one that has ended already is no fault."""
    with contextlib.suppress(LinkError):
        ask(home, "stop", str(run), CONNECTION)


def ask(home: Home, *words: str) -> dict[str, Any]:
    """Run Flower's command and return its JSON.

    Raises:
        LinkError: It failed; the message is Flower's.
    """
    done = subprocess.run(
        [str(_program("flwr")), *words, "--format", "json"],
        cwd=home.root, env=_environment(home), capture_output=True, text=True, check=False, timeout=COMMAND_S,
    )  # fmt: skip
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {}
    if done.returncode or not answer.get("success"):
        said = answer.get("error-message") or done.stderr or done.stdout
        raise LinkError(f"flwr {' '.join(words[:2])}: {' '.join(str(said).split())[-400:]}")
    return dict(answer)


_GONE = ("unregistered", "deleted")


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[None]:
    """One ``up`` a home; the lock ends with the process that holds it, however that ends."""
    with (home.root / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError("--home", str(home.root), "a home that no other `up` serves", "end that one") from error
        yield


def _choose_port(home: Home, port: int | None) -> int:
    if port is not None:
        if not _is_free(port):
            raise UserError("--port", port, "a free port", "leave --port out to have one picked")
        return port
    for candidate in (_noted(home).get("port", 0), USUAL_PORT):
        if candidate and _is_free(candidate):
            return candidate
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _spawn(home: Home, port: int) -> subprocess.Popen[bytes]:
    command = [
        str(_program("flower-superlink")),
        *("--host", HOST, "--port", str(port), "--database", str(home.database)),
        *("--ssl-ca-certfile", str(home.ca_certificate)),
        *("--ssl-certfile", str(home.root / "server.crt"), "--ssl-keyfile", str(home.root / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    ]  # fmt: skip
    with home.log.open("ab") as log:
        return subprocess.Popen(
            command, cwd=home.root, env=_environment(home, marked=True), stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _environment(home: Home, *, marked: bool = False) -> dict[str, str]:
    """The caller's, with Flower quiet and at home here, and this interpreter's programs and modules first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    modules = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **_QUIET, "PATH": path, "PYTHONPATH": modules, "FLWR_HOME": str(home.flower)}
    environment.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")
    if marked:
        environment[MARKER] = str(home.root)
    return environment


def _program(name: str) -> Path:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(name, "not installed", "the server extra", "make setup, or pip install '.[server]'")
    return path


def _write_connection(home: Home, port: int) -> None:
    lines = (
        "[superlink]", f'default = "{CONNECTION}"', "", f"[superlink.{CONNECTION}]",
        f'address = "{HOST}:{port}"', f'root-certificates = "{home.ca_certificate}"', "",
    )  # fmt: skip
    write_atomically(home.flower / "config.toml", "\n".join(lines).encode())


def _write_app(home: Home) -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("sevenfold")
    except PackageNotFoundError:  # run from a checkout
        installed = "0.0.0"
    write_atomically(home.app / "pyproject.toml", _APP.format(version=installed).encode())
    write_atomically(home.app / "LICENSE", b"Apache-2.0; see the installed sevenfold package.\n")


def _wait_until_ready(home: Home, port: int, process: subprocess.Popen[bytes], ready_s: float) -> None:
    deadline = time.monotonic() + ready_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LinkError(f"the SuperLink ended at once ({process.returncode}): {last_lines(home.log)}")
        if _answers(home, port):
            return
        time.sleep(0.1)
    raise LinkError(f"the SuperLink did not answer within {ready_s:g} s: {last_lines(home.log)}")


def _answers(home: Home, port: int) -> bool:
    context = ssl.create_default_context(cafile=str(home.ca_certificate))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"https://{HOST}:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(home: Home, process: subprocess.Popen[bytes]) -> None:
    """First the SuperLink, which ends its helpers; then whatever of them is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    end_processes([*marked_processes(home.root), process.pid], grace_s=3.0)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


def _noted(home: Home) -> Mapping[str, int]:
    try:
        noted = json.loads(home.link_file.read_bytes()[:1000])
        return {key: int(noted[key]) for key in ("pid", "port")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def last_lines(log: Path, count: int = 5) -> str:
    """The end of a log, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines: Sequence[str] = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "(no log)"
    return " / ".join(line.strip() for line in lines[-count:])
