"""Stock Flower: FedAvg.start and flower-supernode under the same kinds of events, and the same supervisor.

What ends is started again at once, on the same database, as for ours; a run that failed is submitted again. No TLS and
no keys, which would only be more work for it. Its clients train nothing: they add one to what they got.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.federated_faults.timeline import free_port
from server.processes import MARKER, end_processes, marked_processes

NODES, VALUES, ROUNDS = 3, 1000, 6
LATE_ROUND, NAN_ROUND, DEAD_ROUND, KILL_ROUND = 2, 4, 5, 2
LATE_S, LONGEST_S = 10.0, 240.0
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
}  # fmt: skip
_APP = """[project]
name = "stock"
version = "1.0.0"
description = "stock"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "stock"
[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"
[tool.flwr.app.config]
out = ""
faults = 0
"""
_MODULE = """import sys
sys.path.insert(0, {project!r})
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from benchmarks.federated_faults import stock
server = ServerApp()
client = ClientApp()
@server.main()
def main(grid, context):
    stock.serve(grid, context.run_config)
@client.train()
def train(message, context):
    return stock.answer(message, context)
"""
_PROJECT = Path(__file__).resolve().parent.parent.parent


def stock_table(root: Path) -> str:
    """Start everything, disturb it, and say what happened."""
    rows: list[tuple[str, str, str]] = []
    with _Stock(root) as stock:
        _first_run(stock, rows)
        run, rounds = stock.submit(faults=False)
        stock.wait(lambda: len(rounds()) >= KILL_ROUND, "two rounds")
        rows.append(_fail(stock, run, rounds, "ServerApp", stock.kill_server_app))
        run, rounds = stock.submit(faults=False)
        stock.wait(lambda: len(rounds()) >= KILL_ROUND, "two rounds")
        rows.append(_fail(stock, run, rounds, "SuperLink", stock.kill_superlink))
    head = "| event | what happened | s to the next round |\n|---|---|---|"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows), ""])


def serve(grid: object, config: Mapping[str, object]) -> None:
    """The ServerApp: FedAvg as it comes; a line in a file after each round."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    def note(number: int, arrays: ArrayRecord) -> None:
        finite = all(bool(np.isfinite(array.numpy()).all()) for array in arrays.values())
        with Path(str(config["out"])).open("a") as file:
            file.write(json.dumps({"round": number, "time": time.time(), "finite": finite}) + "\n")

    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=NODES, min_available_nodes=NODES,
        min_evaluate_nodes=0,
    )  # fmt: skip
    strategy.start(
        grid, ArrayRecord({"adapter": Array(np.zeros(VALUES, np.float32))}), num_rounds=ROUNDS,
        train_config=ConfigRecord({"faults": config["faults"]}), evaluate_fn=note,
    )  # fmt: skip


def answer(message, context):
    """A client: one more than it got; late or not a number where the first run wants it."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    config, node = message.content["config"], int(context.node_config["index"])
    number = int(config["server-round"]) if config["faults"] else 0
    values = message.content["arrays"]["adapter"].numpy() + np.float32(1)
    if node == 0 and number == LATE_ROUND:
        time.sleep(LATE_S)
    if node == 1 and number == NAN_ROUND:
        values[0] = np.nan
    content = {"arrays": ArrayRecord({"adapter": Array(values)}), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


def _first_run(stock: _Stock, rows: list[tuple[str, str, str]]) -> None:
    """A late device, a NaN, a device killed in the middle of a round."""
    _, rounds = stock.submit(faults=True)
    stock.wait(lambda: len(rounds()) >= DEAD_ROUND - 1, f"{DEAD_ROUND - 1} rounds")
    killed_s = time.time()
    stock.kill_node(2)
    stock.start_node(2)
    stock.wait(lambda: len(rounds()) >= ROUNDS, f"{ROUNDS} rounds")
    times = {record["round"]: record["time"] for record in rounds(0)}
    took = {number: times[number] - times[number - 1] for number in range(1, ROUNDS + 1)}
    usual_s = statistics.median([took[1], took[NAN_ROUND], took[3]])
    rows.append(("none", "a round of FedAvg.start", f"{usual_s:.1f}"))
    rows.append((f"a device is {LATE_S:.0f} s late", "waited for (up to an hour unless told otherwise)",
                 f"{took[LATE_ROUND]:.1f}"))  # fmt: skip
    broken = [record["round"] for record in rounds() if not record["finite"]]
    lasting = f"not finite from round {broken[0]} to the last one, {broken[-1]}" if broken else "stayed finite"
    rows.append((f"a device sends NaN in round {NAN_ROUND}", f"global model {lasting}", f"{took[NAN_ROUND]:.1f}"))
    after_s = min((at_s for at_s in times.values() if at_s > killed_s), default=float("nan")) - killed_s
    longest_s = max(after_s, took[DEAD_ROUND], took[ROUNDS])
    rows.append(("kill -9 of a SuperNode, started again at once", "its reply waits for the node to be taken for gone",
                 f"{longest_s:.1f}"))  # fmt: skip


def _fail(
    stock: _Stock, run: int, rounds: Callable[[], list[dict]], what: str, kill: Callable[[], None]
) -> tuple[str, str, str]:
    """Kill, see what becomes of the run, submit it again: the row of the table."""
    done, killed_s = len(rounds()), time.time()
    kill()
    status = "running"
    while not status.startswith("finished") and time.time() - killed_s < LONGEST_S:
        status = stock.status(run)
        time.sleep(0.5)
    told_s = time.time() - killed_s
    _, again = stock.submit(faults=False)
    stock.wait(lambda: len(again()) >= 1, "a round of the new run")
    fate = f"run {status} after {told_s:.0f} s; submitted again it begins at round {again()[0]['round']}, {done} lost"
    return f"kill -9 of the {what} after round {done}", fate, f"{again()[0]['time'] - killed_s:.1f}"


class _Stock:
    """A SuperLink, its SuperNodes and what was submitted; all ended at exit by their ids."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.runs = root, free_port(), 0
        self.app = root / "app"
        self.app.mkdir(parents=True)
        (self.app / "pyproject.toml").write_text(_APP)
        (self.app / "LICENSE").write_text("Apache-2.0\n")
        (self.app / "stock_app.py").write_text(_MODULE.format(project=str(_PROJECT)))
        (root / "config.toml").write_text(
            f'[superlink]\ndefault = "stock"\n[superlink.stock]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self.environment = {**os.environ, **_QUIET, "FLWR_HOME": str(root), "PATH": path}
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Stock:
        self.start_superlink()
        for index in range(NODES):
            self.start_node(index)
        return self

    def __exit__(self, *_: object) -> None:
        end_processes([*marked_processes(self.root)], grace_s=3.0)
        for index in list(self.nodes):
            self.kill_node(index)
        self.link.wait()

    def start_superlink(self) -> None:
        words = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        self.link = self._spawn([*words, "--database", str(self.root / "state.db")], {MARKER: str(self.root)})

        def healthy() -> bool:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1),
            ):
                return True
            return False

        self.wait(healthy, "the SuperLink")

    def start_node(self, index: int) -> None:
        words = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1"]
        self.nodes[index] = self._spawn([*words, "--port", str(free_port()), "--node-config", f"index={index}"], {})

    def submit(self, *, faults: bool) -> tuple[int, Callable[..., list[dict]]]:
        """Flower's number of a new run, and what gives its finished rounds (from the given number on)."""
        self.runs += 1
        out = self.root / f"run-{self.runs}.jsonl"
        answer = self._flwr("run", str(self.app), "stock", "--run-config", f'out="{out}" faults={int(faults)}')

        def rounds(first: int = 1) -> list[dict]:
            lines = out.read_text().splitlines() if out.exists() else []
            return [record for record in map(json.loads, lines) if record["round"] >= first]

        return int(answer["run-id"]), rounds

    def status(self, run: int) -> str:
        with contextlib.suppress(RuntimeError):
            return str(self._flwr("list", "stock", "--run-id", str(run))["runs"][0]["status"])
        return "unknown"

    def kill_node(self, index: int) -> None:
        """The SuperNode and the process it keeps for its ClientApps, which share a process group."""
        process = self.nodes.pop(index)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_server_app(self) -> None:
        for pid in marked_processes(self.root):
            with contextlib.suppress(OSError):
                if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def kill_superlink(self) -> None:
        """Signal 9 to it; its helpers are ended, and it is started again on the same database."""
        self.link.kill()
        self.link.wait()
        end_processes(marked_processes(self.root), grace_s=3.0)
        self.start_superlink()

    def wait(self, happened: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + LONGEST_S
        while not happened():
            if time.monotonic() > end_s:
                raise TimeoutError(f"stock Flower: no {what}; {(self.root / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def _flwr(self, *words: str) -> dict:
        done = subprocess.run(
            ["flwr", *words, "--format", "json"], env=self.environment, cwd=self.root, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        try:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success"):
            raise RuntimeError(f"flwr {words[0]}: {done.stdout[-500:]}{done.stderr[-500:]}")
        return dict(answer)

    def _spawn(self, words: list[str], extra: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.root / "log").open("ab") as log:
            return subprocess.Popen(
                words, env={**self.environment, **extra}, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
