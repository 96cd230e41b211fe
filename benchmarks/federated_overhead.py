"""Seconds of a federated round beyond training: our round loop and SuperNode beside Flower's FedAvg and SuperNodes.

Four devices on this machine that do not train at all, an adapter of rank 16 on q, k, v, o of a 7B, a real SuperLink on
loopback, no masks, no TLS on either side. Ours runs the real ServerApp (plans, gates, folding, checkpoint, ledger) and
the real resident SuperNode; only the training step is left out: a device answers with a fixed update.

    python benchmarks/federated_overhead.py [--rounds 3] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

HERE = Path(__file__).resolve()
DEVICES = 4
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}
APP = """[project]
name = "bench"
version = "1.0.0"
description = "bench"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "bench_app:server"
clientapp = "bench_app:client"
[tool.flwr.app.config]
case = ""
out = ""
rounds = 3
layers = 32
"""
MODULE = """import sys
sys.path.insert(0, {benchmarks!r})
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
import federated_overhead as bench
server = ServerApp()
client = ClientApp()
@server.main()
def main(grid, context):
    bench.serve(grid, context.run_config)
@client.train()
def train(message, context):
    return bench.answer_stock(message)
"""
CONFIG = """[superlink]
default = "bench"
[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--small", action="store_true", help="one layer instead of 32, to try the script")
    options.add_argument("--cases", default="ours int8,ours int4,stock packed,stock")
    options.add_argument("--device", nargs=3, metavar=("PORT", "LAYERS", "DIR"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.device:
        run_device(int(chosen.device[0]), int(chosen.device[1]), Path(chosen.device[2]))
        return
    layers = 1 if chosen.small else 32
    from machine import heading

    print(heading("seconds of a federated round beyond training, 4 devices, a 7B's rank-16 adapter"))
    results = {case: run_case(case, chosen.rounds, layers) for case in chosen.cases.split(",")}
    print("| | rounds (s) | median | MB up + down a round | of stock |\n|---|---|---|---|---|")
    stock = statistics.median(results["stock"]["seconds"]) if "stock" in results else float("nan")
    for case, result in results.items():
        rounds, median = result["seconds"], statistics.median(result["seconds"])
        print(
            f"| {case} | {' '.join(f'{s:.1f}' for s in rounds)} | {median:.1f} | {result['mb']:.1f} "
            f"| {median / stock:.2f} |"
        )
    for case, result in results.items():
        if parts := result.get("parts"):
            print(
                f"\n{case}, where the time goes: " + ", ".join(f"{name} {value:.2f} s" for name, value in parts.items())
            )


def run_case(case: str, rounds: int, layers: int) -> dict[str, object]:
    """One SuperLink, four SuperNodes, one run; their processes end with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        root, port, processes = Path(name), free_port(), []
        environment = {**os.environ, **QUIET, "FLWR_HOME": name, "PYTHONPATH": str(HERE.parent.parent)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
        (root / "config.toml").write_text(CONFIG.format(port=port))
        app = root / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP)
        (app / "LICENSE").write_text("Apache-2.0\n")
        (app / "bench_app.py").write_text(MODULE.format(benchmarks=str(HERE.parent)))

        def start(*command: str) -> None:
            with (root / "log").open("ab") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, cwd=name, stdout=log, stderr=log, start_new_session=True)
                )

        try:
            start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
            wait_for(f"http://127.0.0.1:{port}/health", root / "log")
            for index in range(DEVICES):
                if case.startswith("ours"):
                    device = ("--device", str(port), str(layers), str(root / f"device-{index}"))
                    start(sys.executable, str(HERE), *device)
                else:
                    start(
                        *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
                        *("--host", "127.0.0.1", "--port", str(free_port())),
                    )
            out = root / "out.json"
            settings = f'case="{case}" out="{out}" rounds={rounds} layers={layers}'
            submitted = subprocess.run(
                ["flwr", "run", str(app), "bench", "--run-config", settings],
                env=environment, cwd=name, check=False, capture_output=True, text=True,
            )  # fmt: skip
            if submitted.returncode:
                raise SystemExit(f"{submitted.stdout}{submitted.stderr}")
            end_s = time.monotonic() + 1200
            while not out.exists():
                if time.monotonic() > end_s:
                    raise SystemExit(f"{case}: no result; {(root / 'log').read_text()[-3000:]}")
                time.sleep(0.5)
            return json.loads(out.read_text())
        finally:
            for process in reversed(processes):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def serve(grid: object, config: dict[str, object]) -> None:
    """The ServerApp of either side; writes what it measured."""
    case, out, rounds, layers = (config[key] for key in ("case", "out", "rounds", "layers"))
    wait_for_nodes(grid)
    result = serve_ours(grid, case, rounds, layers, Path(out).parent) if case.startswith("ours") else None
    result = result or serve_stock(grid, rounds, layers, packed="packed" in case)
    temporary = Path(f"{out}.part")
    temporary.write_text(json.dumps(result))
    temporary.rename(out)


def serve_ours(grid, case: str, rounds: int, layers: int, root: Path) -> dict[str, object]:
    from server.config import load_federation
    from server.federation import open_federation
    from server.rounds import run_federation
    from server.server_app import FlowerTransport

    codec = case.split()[1]
    config = load_federation(
        "default",
        [
            "name=bench", "package=none", f"rounds={rounds + 2}", f"codec.up={codec}", f"codec.down={codec}",
            "adapter.ranks=[16]", "adapter.alpha=32", "adapter.targets=[q_proj,k_proj,v_proj,o_proj]",
            "evaluation.every=0",
            f"cohort.size={DEVICES}", f"cohort.quorum={DEVICES}", "cohort.over_selection=1", "local.sequence_tokens=64",
        ],
    )  # fmt: skip
    records: list[dict] = []
    federation = open_federation(
        config, adapter_layout(layers), root / "federation", FlowerTransport(grid), clock=time.time, sleep=time.sleep
    )
    marks = [time.time()]

    def report(record):
        marks.append(time.time())
        records.append(dict(record))

    run_federation(federation, report)
    seconds = [after - before for before, after in pairwise(marks)][2:]  # both factors have been trained once
    kept = records[2:]
    parts = {name: statistics.median(record["seconds"][name] for record in kept) for name in kept[0]["seconds"]}
    parts["rest"] = statistics.median(seconds) - sum(parts.values())
    mb = statistics.median((record["bytes_up"] + record["bytes_down"]) / 1e6 for record in kept)
    return {"seconds": seconds, "mb": mb, "parts": parts}


def serve_stock(grid, rounds: int, layers: int, packed: bool) -> dict[str, object]:
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    arrays = {
        f"{module.name}.{part}": np.zeros(shape, np.float32)
        for module in adapter_layout(layers).modules
        for part, shape in (("lora_A", (16, module.in_features)), ("lora_B", (module.out_features, 16)))
    }
    if packed:
        arrays = {"adapter": np.concatenate([array.ravel() for array in arrays.values()])}
    marks: list[float] = []
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=DEVICES, min_available_nodes=DEVICES, min_evaluate_nodes=0)
    strategy.start(
        grid, ArrayRecord({name: _array(value) for name, value in arrays.items()}), num_rounds=rounds,
        evaluate_fn=lambda number, arrays: marks.append(time.time()),
    )  # fmt: skip
    size = sum(array.nbytes for array in arrays.values())
    return {"seconds": [after - before for before, after in pairwise(marks)], "mb": 2 * DEVICES * size / 1e6}


def answer_stock(message):
    """A stock client: what it got, as its update."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    reply = ArrayRecord({name: _array(value) for name, value in arrays.items()})
    return Message(RecordDict({"arrays": reply, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


def run_device(port: int, layers: int, directory: Path) -> None:
    """Our resident SuperNode over a device that answers with a fixed update."""
    from edge_runtime.federated.state import open_state
    from edge_runtime.federated.stopping import Stop
    from edge_runtime.federated.supernode import Link, serve_superlink

    with open_state(directory, print) as state:
        link, device = Link(f"127.0.0.1:{port}", None), Untrained(layers, directory.name)
        serve_superlink(link, _ec_key(), state, device, Stop(), print)


class Untrained:
    """Everything a device does in a round but the training."""

    def __init__(self, layers: int, name: str) -> None:
        self.layout, self.name, self.held = adapter_layout(layers), name, {}
        self.delta = (
            np.random.default_rng(0).standard_normal(self.layout.size(("a", "b"), 16)).astype(np.float32) * 1e-3
        )

    def __call__(self, envelope):
        from edge_runtime.formats.broadcast import to_factors, unpack_parts
        from edge_runtime.formats.codec import encode
        from edge_runtime.formats.envelope import check_payload, seal, sha256, unseal
        from edge_runtime.formats.messages import Plan, Profile, Update

        layout = self.layout
        if envelope.kind == "hello":
            known = (self.name, sha256(self.name.encode()), layout.base_digest, layout.digest, 16, "none")
            return seal(Profile(*known, (64,), 100, 0.01))
        plan = unseal(envelope, Plan)
        payload = check_payload(envelope, plan.payload_sha256)
        self.held = unpack_parts(layout, plan.parts, payload, plan.rank, plan.seed, self.held)
        to_factors(layout, self.held, plan.rank)
        sizes = layout.segment_sizes(plan.phase.groups, plan.rank)
        raw = encode(self.delta[: sum(sizes)], sizes, plan.codec)
        head = (plan.plan_id, layout.digest, layout.base_digest, plan.round, plan.phase, plan.rank, plan.codec)
        return seal(Update(*head, 1, plan.steps, 1, 1.0, 1.0, 1.0, 0.01, sha256(raw)), raw)


def adapter_layout(layers: int):
    from edge_runtime.formats.layout import AdapterLayout, Module

    names = sorted(f"model.layers.{layer}.self_attn.{p}_proj" for layer in range(layers) for p in "qkvo")
    return AdapterLayout("0" * 64, tuple(Module(name, 4096, 4096) for name in names), (16,), 32.0)


def wait_for_nodes(grid) -> None:
    while len(list(grid.get_node_ids())) < DEVICES:
        time.sleep(0.2)


def wait_for(url: str, log: Path) -> None:
    end_s = time.monotonic() + 120
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the SuperLink did not start: {log.read_text()[-2000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _array(value):
    from flwr.app import Array

    return Array(value)


def _ec_key():
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


if __name__ == "__main__":
    main()
