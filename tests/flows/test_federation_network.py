"""Devices behind 10 Mbit/s, 100 ms and 2 % loss, in a network namespace of their own: rounds take longer, no more."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifacts import PROJECT
from server.config import load_federation
from server.following import start_federation
from server.gateway import serve_gateway
from server.processes import end_processes
from tests.flows.federation_link import open_superlink, read_ledger, wait_for
from tests.flows.fleet import NAMES, environment, make_package, settings, write_texts
from tests.flows.slow_wire import SERVER, Wire, missing, slow_wire

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("federation_devices")]
ROUNDS = 3
CONNECT = """
import socket, sys, time
times = []
for _ in range(5):
    started = time.monotonic()
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60).close()
    times.append(time.monotonic() - started)
print(min(times))
"""


def test_three_rounds_over_a_slow_long_and_lossy_wire(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    package = make_package(tmp_path)
    write_texts(tmp_path / "texts")
    config = load_federation("default", [*settings("slow", package)[1:], f"rounds={ROUNDS}", "evaluation.every=0"])
    with (
        slow_wire(Wire()) as (namespace, how),
        open_superlink(tmp_path, NAMES, [SERVER]) as (home, link),
        serve_gateway(home, link, SERVER, 0) as address,
    ):
        there = ["ip", "netns", "exec", namespace, sys.executable]
        done = subprocess.run(
            [*there, "-c", CONNECT, *address.split(":")], capture_output=True, text=True, check=True, timeout=300
        )
        assert float(done.stdout) >= 0.1, f"a connection takes a round trip of twice 50 ms ({how})"
        with _clients(there, tmp_path, package, address):
            start_federation(home, config)
            wait_for(lambda: read_ledger(home, config.name, "end"), f"the end of the last round ({how})", 300)
        rounds = read_ledger(home, config.name, "round")
    assert [(record["round"], record["folded"], record["lost"]) for record in rounds] == [
        (number, 3, 0) for number in range(1, ROUNDS + 1)
    ]
    assert all(record["seconds"]["wait"] > 0.2 for record in rounds)


@contextlib.contextmanager
def _clients(there: list[str], folder: Path, package: Path, address: str) -> Iterator[None]:
    running = []
    try:
        for name in NAMES:
            words = ["--name", name, "--state", folder / name / "state", "--package", package, "--trainer", "onnx"]
            words += ["--data", folder / "texts" / name, "--superlink", address, "--threads", "1"]
            words += ["--root-certificate", folder / "home" / "ca.crt", "--lease", folder / name / "lease"]
            words += ["--memory-bytes", "0", "--heat", "200", "--battery", "0"]
            command = [*there, "-m", "edge_runtime", "client", *map(str, words)]
            with (folder / f"{name}.log").open("w") as log:
                running.append(
                    subprocess.Popen(
                        command, cwd=PROJECT, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        yield
    finally:
        end_processes([process.pid for process in running if process.poll() is None], grace_s=20.0)
        for process in running:
            process.wait()
