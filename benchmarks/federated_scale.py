"""CPU of the server for a round of 10, 100 and 1,000 clients on the LocalGrid, and its peak memory.

Each case is a process of its own and runs what ``python -m server simulate`` runs: greeting, plans, gates, folding,
checkpoint, ledger, candidate, held-out loss on every device after every round. The devices compute in the same
process; the CPU time of their functions is taken apart. Building and reading Flower's records, which a device would
do on its own machine, counts as the server's here.

    python benchmarks/federated_scale.py [--clients 10 100 1000] [--rounds 3]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is loaded: idle BLAS threads would count as CPU
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import heading

CLIENTS = (10, 100, 1000)


def main() -> int:
    """Print one table; ``--case`` runs one case in this process and prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", type=int, metavar="CLIENTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.rounds)))
        return 0
    print(heading(f"rounds of simulated clients on the LocalGrid, {options.rounds} rounds, held-out loss in each"))
    print("| clients a round | CPU s a round, server | ms a client | CPU s a round, devices | wall s a round "
          "| kB up + down a client | peak RSS, MB | after start-up |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for clients in options.clients:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--case",
            str(clients),
            "--rounds",
            str(options.rounds),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(row(clients, json.loads(done.stdout.splitlines()[-1])), flush=True)
    return 0


def row(clients: int, figures: dict[str, float]) -> str:
    """One line of the table."""
    server = figures["cpu_s"] - figures["devices_s"]
    cells = (
        f"{clients:,}", f"{server:.2f}", f"{1000 * server / clients:.2f}", f"{figures['devices_s']:.2f}",
        f"{figures['wall_s']:.2f}", f"{figures['bytes'] / clients / 1000:.1f}", f"{figures['peak_mb']:.0f}",
        f"{figures['peak_mb'] - figures['start_mb']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def measure(clients: int, rounds: int) -> dict[str, float]:
    """Seconds, bytes and MB of one federation; seconds and bytes are those of a round after the first."""
    from server.config import load_federation
    from server.fleet import DriftingDevice, simulate

    logging.disable(logging.WARNING)
    config = load_federation(
        "default",
        [
            "name=scale", "package=none", f"rounds={rounds + 1}", f"cohort.size={clients}", "cohort.over_selection=1",
            f"cohort.quorum={clients}", "local.steps=2", "gate=false", "cohort.shortest_deadline_s=3600",
        ],
    )  # fmt: skip
    spent, marks = [0.0], []

    def timed(index: int, layout: object, seed: int) -> Callable[[object], object]:
        device = DriftingDevice(index, layout, seed)

        def answer(envelope: object) -> object:
            started_s = time.process_time()
            try:
                return device(envelope)
            finally:
                spent[0] += time.process_time() - started_s

        return answer

    def report(record: dict[str, object]) -> None:
        if record["folded"] != clients:
            raise RuntimeError(f"{record['folded']} of {clients} updates were folded")
        marks.append((time.process_time(), spent[0], time.monotonic(), record["bytes_up"] + record["bytes_down"]))

    start_mb = memory_mb("VmRSS")
    with tempfile.TemporaryDirectory() as directory:
        simulate(config, clients, Path(directory), timed, report)
    first, last = marks[0], marks[-1]
    cpu_s, devices_s, wall_s = ((last[place] - first[place]) / rounds for place in range(3))
    sent = sum(mark[3] for mark in marks[1:]) / rounds
    return {
        "cpu_s": cpu_s, "devices_s": devices_s, "wall_s": wall_s, "bytes": sent,
        "start_mb": start_mb, "peak_mb": memory_mb("VmHWM"),
    }  # fmt: skip


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    sys.exit(main())
