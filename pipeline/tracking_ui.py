"""MLflow's page on this machine: start it, print the link that opens the charts, end all of it.

``python -m pipeline.tracking_ui`` is what ``make ui`` calls. MLflow runs as a process of its own, so
nothing here imports it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.formats.errors import SevenfoldError, UserError

EXPERIMENT = "sevenfold"
HOST, PORT = "127.0.0.1", 5000


def serve_ui(store: Path, port: int = PORT, *, start_timeout_s: float = 180.0) -> None:
    """Serve MLflow's page on this machine alone until Ctrl-C; print the link when it answers.

    Args:
        store: Directory of ``mlflow.db``.
        port: To listen on.
        start_timeout_s: The server imports for 5 to 15 CPU seconds.

    Raises:
        UserError: Nothing was registered yet, or the port is taken.
        SevenfoldError: The server ended, or did not answer in time.
    """
    if not (store / "mlflow.db").exists():
        raise UserError("store", str(store), "a directory with mlflow.db", "register a family first: make demo")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError("port", port, "a free port", f"type: make ui PORT={port + 1}") from None
    print("Starting MLflow ...", flush=True)
    server = subprocess.Popen(_server_command(store, port), start_new_session=True, env=os.environ | _ENVIRONMENT)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _wait_until_healthy(server, port, start_timeout_s)
        print(f"MLflow: {chart_url(_experiment_id(port), port)}\nCtrl-C ends it.", flush=True)
        server.wait()
    except KeyboardInterrupt:
        print("MLflow ended.", flush=True)
    finally:
        _end_group(server)


def chart_url(experiment_id: str, port: int = PORT) -> str:
    """Return the link that opens an experiment's charts without a click."""
    return f"http://{HOST}:{port}/#/experiments/{experiment_id}/runs?compareRunsMode=CHART"


def store_uri(store: Path) -> str:
    """Return the address of the database in a store: never MLflow's default, which follows the working directory."""
    return f"sqlite:///{store.resolve() / 'mlflow.db'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking_ui", description="The family's runs in MLflow.")
    parser.add_argument("--store", type=Path, default=Path(), help="directory of mlflow.db (default: this one)")
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args(arguments)
    try:
        serve_ui(options.store, options.port)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except SevenfoldError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Saves a process of 240 MB that only GenAI jobs need.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


def _server_command(store: Path, port: int) -> list[str]:
    artifacts = (store.resolve() / "mlruns").as_uri()
    where = ["--backend-store-uri", store_uri(store), "--artifacts-destination", artifacts]
    quiet = ["--uvicorn-opts", "--log-level warning"]
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *where,
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
        *quiet,
    ]


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SevenfoldError(f"mlflow server ended with exit code {server.returncode}; its messages are above")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise SevenfoldError(f"mlflow server did not answer on port {port} within {timeout_s:.0f} s")


def _experiment_id(port: int) -> str:
    address = f"http://{HOST}:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT}"
    with urllib.request.urlopen(address, timeout=30) as response:
        return str(json.load(response)["experiment"]["experiment_id"])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end_group(server: subprocess.Popen[bytes], patience_s: float = 8.0) -> None:
    """End the server and its workers: the parent alone does not take them along."""
    for stop in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, stop)
        except ProcessLookupError:
            break
        try:
            server.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


if __name__ == "__main__":
    sys.exit(main())
