"""Flower's own SuperNode as a child process, for those who run Flower's tools; it asks the resident by its socket."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from edge_runtime.federated.stopping import Stop
from edge_runtime.formats.errors import BackendError

_COMMAND = "flower-supernode"
_END_WITHIN_S = 5.0
_LOOK_EVERY_S = 0.2


def run_stock_supernode(
    address: str, root_certificate: Path | None, key: Path, resident: Path, stop: Stop, log: Callable[[str], None]
) -> None:
    """Run it until told to stop, then end it and all that it started.

    Args:
        address: Of the SuperLink.
        root_certificate: None: no TLS, and therefore no key.
        key: EC P-384, OpenSSH.
        resident: The resident's socket.
        stop: Ends it.
        log: Takes one line an event.

    Raises:
        BackendError: It is not installed, or it ended by itself.
    """
    program = shutil.which(_COMMAND, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise BackendError(f"{_COMMAND} is not installed; type: pip install 'flwr==1.41.*'")
    command = [program, "--superlink", address, "--port", str(_free_port())]
    command += ["--node-config", f'socket="{resident}"']
    if root_certificate is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(root_certificate), "--auth-supernode-private-key", str(key)]
    process = subprocess.Popen(command, env=_environment(resident.parent), start_new_session=True)
    log(f"{_COMMAND} runs as process {process.pid}")
    try:
        while not stop():
            if process.poll() is not None:
                raise BackendError(f"{_COMMAND} ended with code {process.returncode}; its last lines say why")
            stop.wait(_LOOK_EVERY_S)
    finally:
        _end_group(process)


def _environment(home: Path) -> dict[str, str]:
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_HOME": str(home / "flwr"),
        "PYTHONUNBUFFERED": "1",
        # It starts flower-superexec and flwr-clientapp by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return dict(os.environ) | quiet


def _free_port() -> int:
    """A port for the SuperNode's own API, which it will not choose itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_END_WITHIN_S)
            if number is signal.SIGTERM:
                continue  # its children may outlive it; the second signal is for them
