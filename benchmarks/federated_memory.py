"""Peak memory of the federation's server against clients a round: ours, and Flower's own FedAvg.start.

Every case is a process of its own on the in-process Grid, with replies of 2 MB that are made when they are pulled.
Ours is the whole round loop: greeting, plans, gates, folding, checkpoints, ledger, candidate. In its last round every
device has forgotten the factors, so that each is sent both groups: the largest broadcast there is.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import heading

CLIENTS = (10, 100, 1000)
MODULES, FEATURES, RANK = 16, 4096, 32  # 2.1 M values a group: 2.16 MB in int8 with scales
REPLY_BYTES = 2_162_688
ROUNDS = 3
STOCK_BYTES_A_REPLY = (
    3  # of memory for each byte of the replies, as first measured; what it needs decides whether it runs
)


def main() -> int:
    """Print one table; ``--case`` runs one case in this process and prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--case", nargs=2, metavar=("METHOD", "CLIENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        method, clients = options.case
        print(json.dumps({"ours": _ours, "stock": _stock}[method](int(clients))))
        return 0
    print(heading(f"peak RSS of the server's process, MB, {ROUNDS} rounds, replies of {REPLY_BYTES / 1e6:.2f} MB"))
    method = "{} peak | of it after start-up | CPU s a round"
    print(f"| clients a round | {method.format('ours:')} | {method.format('FedAvg.start:')} |")
    print("|---|---|---|---|---|---|---|")
    for clients in options.clients:
        print("|".join(["", f" {clients} ", *_cells("ours", clients), *_cells("stock", clients), ""]), flush=True)
    return 0


def _cells(method: str, clients: int) -> list[str]:
    needed = clients * REPLY_BYTES * STOCK_BYTES_A_REPLY + 2**30
    if method == "stock" and needed > _available_bytes():
        return [f" not run: needs {needed / 2**30:.0f} GiB ", " ", " "]
    command = [sys.executable, str(Path(__file__).resolve()), "--case", method, str(clients)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    grown = figures["peak"] - figures["start"]
    return [f" {figures['peak']:.0f} ", f" {grown:.0f} ", f" {figures['cpu_s']:.2f} "]


def _ours(clients: int) -> dict[str, float]:
    from edge_runtime.formats.layout import AdapterLayout, Module
    from server.config import load_federation
    from server.federation import open_federation
    from server.local_grid import LocalGrid
    from server.rounds import run_federation
    from server.server_app import FlowerTransport

    names = sorted(f"model.layers.{index}.self_attn.q_proj" for index in range(MODULES))
    layout = AdapterLayout("0" * 64, tuple(Module(name, FEATURES, FEATURES) for name in names), (RANK,), 64.0)
    overrides = (
        f"cohort.size={clients}", "cohort.over_selection=1", f"cohort.quorum={clients}", f"rounds={ROUNDS}",
        "phases.schedule=alternating", "phases.warmup_rounds=1", "codec.up=int8", "codec.down=int8",
        "evaluation.every=0", "gate=false", f"adapter.ranks=[{RANK}]", "adapter.alpha=64",
        "cohort.shortest_deadline_s=86400", "cohort.longest_deadline_s=86400",
    )  # fmt: skip
    config = load_federation("demo", overrides)
    grid = LocalGrid({node: _device(node, layout) for node in range(1, clients + 1)})
    with tempfile.TemporaryDirectory() as directory:
        transport = FlowerTransport(grid)
        federation = open_federation(config, layout, Path(directory), transport, clock=time.time, sleep=time.sleep)

        def forget(record: object) -> None:
            if federation.number == ROUNDS - 1:
                for device in federation.devices.values():
                    device.held = {}

        start, began_s = _rss_mb("VmRSS"), time.process_time()
        run_federation(federation, forget)
        if federation.record["folded"] != clients:
            raise RuntimeError(f"{federation.record['folded']} of {clients} updates were folded")
    return {"start": start, "peak": _rss_mb("VmHWM"), "cpu_s": (time.process_time() - began_s) / ROUNDS}


def _device(node: int, layout):
    """A device that trains nothing: every reply is the same small update."""
    from edge_runtime.formats.codec import encode
    from edge_runtime.formats.envelope import seal, sha256, unseal
    from edge_runtime.formats.messages import Plan, Profile, Update
    from server.server_app import from_record, to_record

    name = f"device-{node:05d}"

    def update(plan: Plan):
        groups = plan.phase.groups
        if groups not in _PAYLOADS:
            delta = np.random.default_rng(0).normal(scale=1e-3, size=layout.size(groups, RANK)).astype(np.float32)
            _PAYLOADS[groups] = encode(delta, layout.segment_sizes(groups, RANK), plan.codec)
            if len(_PAYLOADS[groups]) != REPLY_BYTES:
                raise RuntimeError(f"replies of {len(_PAYLOADS[groups])} bytes")
        payload = _PAYLOADS[groups]
        known = (plan.plan_id, layout.digest, layout.base_digest, plan.round, plan.phase, RANK, plan.codec)
        return seal(Update(*known, 1, plan.steps, 100, 3.5, 3.4, 1.0, 0.1, sha256(payload)), payload)

    def respond(record):
        envelope = from_record(record)
        if envelope.kind == "hello":
            known = (name, sha256(name.encode()), layout.base_digest, layout.digest, RANK)
            return to_record(seal(Profile(*known, "none", (16, 32, 64, 128, 256, 512), 100, 0.1)))
        return to_record(update(unseal(envelope, Plan)))

    return respond


_PAYLOADS: dict[tuple[str, ...], bytes] = {}


def _stock(clients: int) -> dict[str, float]:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from server.local_grid import LocalGrid

    logging.getLogger("flwr").setLevel(logging.ERROR)
    arrays = {f"layer.{index}": np.zeros(REPLY_BYTES // 4 // MODULES, np.float32) for index in range(MODULES)}

    def respond(record):
        values = {name: Array(values + np.float32(1e-3)) for name, values in arrays.items()}
        return RecordDict({"arrays": ArrayRecord(values), "metrics": MetricRecord({"num-examples": 1})})

    grid = LocalGrid(dict.fromkeys(range(1, clients + 1), respond))
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=clients)
    initial = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    start, began_s = _rss_mb("VmRSS"), time.process_time()
    result = strategy.start(grid, initial, num_rounds=ROUNDS)
    if abs(float(result.arrays["layer.0"].numpy()[0]) - 1e-3) > 1e-6:
        raise RuntimeError("FedAvg.start did not average the replies")
    return {"start": start, "peak": _rss_mb("VmHWM"), "cpu_s": (time.process_time() - began_s) / ROUNDS}


def _rss_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    sys.exit(main())
