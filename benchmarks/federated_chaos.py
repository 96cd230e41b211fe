"""A federation that is disturbed: what happens to its rounds, to its adapter, and to stock Flower beside it.

1. Fifty rounds on a real SuperLink (TLS, registered keys) with five devices, while ServerApp, SuperLink and devices
   are killed with signal 9 and devices send NaN, flip signs or are late. A supervisor types the commands again.
   Afterwards the same federation is run undisturbed on the LocalGrid, with the devices of each round that counted.
2. Flower's FedAvg.start with flower-supernode under the same kinds of events, each by itself.
3. Accuracy of twenty devices of which some lie, by what the server does about it.

    python benchmarks/federated_chaos.py [--rounds 50] [--seed 1] [--parts timeline,stock,attacks] [--seeds 1]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is loaded, here and in every process started here
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.federated_faults.attacks import CLIENTS, attack_table
from benchmarks.federated_faults.device import LATE, PACKAGE, open_base
from benchmarks.federated_faults.digits import TARGET, TOKENS, deal, load_images, train_base, turn
from benchmarks.federated_faults.events import Schedule, conduct_in, draw_conduct, draw_kills
from benchmarks.federated_faults.local import run_undisturbed
from benchmarks.federated_faults.stock import stock_table
from benchmarks.federated_faults.timeline import Timeline, prepare_home, run_disturbed
from benchmarks.machine import heading
from server.operation import terminable

DEVICES = tuple(f"device-{index}" for index in range(1, 6))
DEADLINE_S = 8  # a device that was killed is back by then; one that is late is not
SETTINGS = """\
name: chaos
package: {package}
rounds: {rounds}
gate: false
adapter: {{targets: [{target}]}}
local: {{steps: 10, batch_sequences: 16, sequence_tokens: {tokens}}}
cohort: {{size: 5, over_selection: 1.0, quorum: 3, patience_s: 120, shortest_deadline_s: {deadline_s},
          longest_deadline_s: {deadline_s}}}
evaluation: {{every: 10}}
"""


def main() -> int:
    """Print the tables of the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", default="timeline,stock,attacks")
    parser.add_argument("--seeds", type=int, default=1, help="of the third part")
    parser.add_argument("--attack-rounds", type=int, default=40)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the federation's home and logs here")
    options = parser.parse_args()
    parts = options.parts.split(",")
    with terminable(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        root = options.keep or Path(name)
        os.environ["SEVENFOLD_CONFIG_DIR"] = str(root / "keys")  # this benchmark signs its own package
        logging.disable(logging.WARNING)  # refusals and lost devices are the point here, and counted
        if "timeline" in parts:
            print(heading(f"{options.rounds} rounds of five devices under kills, lies and delays"))
            print(timeline(root, options.rounds, options.seed), flush=True)
        if "stock" in parts:
            print(heading("stock Flower under the same kinds of events, three devices"))
            print(stock_table(root / "stock"), flush=True)
        if "attacks" in parts:
            rounds, seeds = options.attack_rounds, options.seeds
            print(heading(f"accuracy of {CLIENTS} devices of which some lie, {rounds} rounds, mean of {seeds} seed(s)"))
            print(attack_table(seeds, rounds, os.cpu_count() or 1))
    return 0


def timeline(root: Path, rounds: int, seed: int) -> str:
    """Run the first part; its tables and verdicts."""
    from server.config import load_federation
    from server.home import open_home

    trained, tested = (turn(rows) for rows in load_images(seed))
    text = dict(zip(DEVICES, deal(trained, len(DEVICES), seed), strict=True))
    schedule, kills = draw_conduct(rounds, DEVICES, seed), draw_kills(rounds, DEVICES, seed)
    home = open_home(root / "home", create=True)
    prepare_home(home, train_base(load_images(seed)[0], seed), text, schedule, DEADLINE_S + 2.0)
    settings = root / "chaos.yaml"
    values = {"package": home.root / PACKAGE, "rounds": rounds, "target": TARGET, "tokens": TOKENS}
    settings.write_text(SETTINGS.format(deadline_s=DEADLINE_S, **values))
    seen = run_disturbed(home, settings, rounds, kills, DEVICES)

    config, (manifest, trainer) = load_federation(str(settings)), open_base(home.root / PACKAGE)
    known = all(len(seen.contributors[record["round"]]) == record["folded"] for record in seen.records)
    same = run_undisturbed(
        config, manifest, trainer, text, root / "same",
        lambda name, number: conduct_in(schedule, name, number), seen.contributors,
    )  # fmt: skip
    peaceful = run_undisturbed(config, manifest, trainer, text, root / "peaceful")
    accuracy = {
        label: trainer.accuracy(tested, federation.state.factors(averaged=True), federation.layout.scale)
        for label, federation in (("same", same), ("peaceful", peaceful))
    }
    digests = {"chaos": seen.records[-1]["adapter_sha256"], "same": same.record["adapter_sha256"]}
    numbers = [record["round"] for record in seen.records]
    lines = [
        _event_table(seen, schedule),
        "",
        f"- {len(numbers)} rounds, each committed exactly once and in order: {numbers == list(range(1, rounds + 1))}; "
        f"median {seen.usual_s:.2f} s from commit to commit, {max(seen.committed_s.values()):.0f} s in all.",
        f"- Started again: {_counts(seen.restarts)}; the SuperLink by `up` itself.",
        f"- Adapter after the last round {digests['chaos'][:16]}, undisturbed with the same devices in each round "
        f"{digests['same'][:16]}: {'bit-identical' if digests['chaos'] == digests['same'] else 'DIFFERENT'}"
        f"{'' if known else ' (the devices of a round were not all known)'}.",
        f"- Held-out loss {_loss(seen.records[-1])}, with the same devices undisturbed {_loss(same.record)}, with all "
        f"devices honest and in time {_loss(peaceful.record)}; accuracy on new images {100 * accuracy['same']:.1f} % "
        f"and {100 * accuracy['peaceful']:.1f} %.",
        "",
    ]
    return "\n".join(lines)


def _event_table(seen: Timeline, schedule: Schedule) -> str:
    rows: list[tuple[float, str]] = []
    for blow in seen.blows:
        what = f"kill -9 {' and '.join(blow.kill.victims)}"
        folded = len(seen.contributors.get(blow.number, []))
        rows.append((blow.at_s, f"{what} | {blow.number} | {blow.recovered_s:.1f} | {folded} of 5"))
    for record in seen.records:
        number = record["round"]
        for name, mine in schedule.items():
            if number in mine:
                took_s = seen.committed_s[number] - seen.committed_s.get(number - 1, 0.0)
                fate = "in the round" if name in seen.contributors[number] else f"left out ({_fate(record)})"
                what = f"{name} {'is late' if mine[number] == LATE else f'sends {mine[number]}'}: {fate}"
                rows.append((seen.committed_s[number], f"{what} | {number} | {took_s:.1f} | {record['folded']} of 5"))
    head = "| s | event | round | s to the next commit | devices in it |\n|---|---|---|---|---|"
    return "\n".join([head, *(f"| {at_s:.0f} | {row} |" for at_s, row in sorted(rows))])


def _fate(record: dict) -> str:
    refused = Counter(record["refused"])
    words = [f"refused: {reason}" for reason in refused] + (["after the deadline"] if record["lost"] else [])
    return ", ".join(words) or "declined"


def _loss(record: dict) -> str:
    loss = record["held_out_loss"]
    return "unknown" if loss is None else f"{loss:.4f}"


def _counts(restarts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count} times" for kind, count in sorted(restarts.items())) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
