"""Held-out loss against bytes on the wire, of federated LoRA methods, on one GPU (or, with --tiny, any CPU)."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.federated_trial import plan, report
from benchmarks.federated_trial.adapters import Adapter, Lora, core_between
from benchmarks.federated_trial.methods import Method, Run
from benchmarks.federated_trial.model import Base, Shape, decoder_block, head_losses
from benchmarks.federated_trial.pretraining import pretrained_base, read_base, write_base
from benchmarks.federated_trial.rounds import Record, Setting, adam_step, train_group
from benchmarks.federated_trial.text import Federation, encode_text, read_federation

_GROUP = 12
_AVERAGES = (6,)
_PRETRAINING_STEPS = 1500
_WINDOWS = 8


def main() -> int:
    """Pretrain, run a stage's groups until the time is up, write records and tables."""
    options = _options()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    print(f"torch {torch.__version__} on {_device_name(device)}", flush=True)
    setting, steps = _setting(options, device)
    public = encode_text((options.data / "wikitext2_valid.txt").read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.base:
        base = read_base(options.base, device)
    else:
        base, loss = pretrained_base(setting.shape, public, steps, 0, device)
        print(f"base: {steps} steps, loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
        write_base(base, options.out / "base.safetensors")
    earlier = report.read_records(options.records) if options.records else []
    known = {record.run for record in earlier}
    planned = [run for run in plan.STAGES["tiny" if options.tiny else options.stage]() if run not in known]
    records = _run_all(planned, setting, base, options, began, earlier)
    table = report.tables(records)
    (options.out / "tables.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def _run_all(
    planned: list[Run],
    setting: Setting,
    base: Base,
    options: argparse.Namespace,
    began: float,
    earlier: list[Record],
) -> list[Record]:
    """Earlier records and those of every group that the time allows."""
    records = list(earlier)
    device, shape = base.embedding.device, setting.shape
    windows = 1 if options.tiny else _WINDOWS
    names = dict.fromkeys(run.federation for run in planned)
    federations = {n: read_federation(n, options.data, shape.context, windows).to(device) for n in names}
    adapters: dict[tuple[int, str], Adapter] = {}
    for group in plan.grouped(planned, options.group):
        left_s = options.limit_s - (time.monotonic() - began)
        key = group[0].method.core_rank, group[0].method.core_bases
        adapter = adapters.setdefault(key, _adapter(group[0].method, shape, base))
        finished = _run_group(group, setting, adapter, base, federations[group[0].federation], left_s, options.group)
        if finished is None:
            print(f"out of time: {_label(group)}", flush=True)
            continue
        records += finished
        report.write_records(records, options.out / "records.json")
    return records


def _run_group(
    group: list[Run],
    setting: Setting,
    adapter: Adapter,
    base: Base,
    federation: Federation,
    left_s: float,
    size: int,
) -> list[Record] | None:
    """The group's records, or None when it would not end in time; filled up with copies, so that shapes stay equal."""
    filled = group + [group[-1]] * (size - len(group))
    began = time.monotonic()
    rounds = max(run.method.rounds for run in group)
    finished: list[Record] = []
    first_s = spent_s = 0.0
    for done, records in enumerate(train_group(filled, setting, adapter, base, federation), 1):
        spent_s, finished = time.monotonic() - began, records
        if done == 1:
            first_s = spent_s  # compiling included: later rounds say how long a round takes
        elif done < rounds and spent_s + (rounds - done) * (spent_s - first_s) / (done - 1) > left_s:
            return None
    print(f"{spent_s:6.1f} s (first round {first_s:.1f}) {_label(group)}", flush=True)
    return finished[: len(group)]


def _adapter(method: Method, shape: Shape, base: Base) -> Adapter:
    if not method.core_rank:
        return Lora(shape)
    generator = torch.Generator().manual_seed(99)
    core = core_between(shape, method.core_rank, base.linears if method.core_bases == "base" else None, generator)
    device = base.embedding.device
    return replace(core, lefts=[t.to(device) for t in core.lefts], rights=[t.to(device) for t in core.rights])


def _setting(options: argparse.Namespace, device: torch.device) -> tuple[Setting, int]:
    if options.tiny:
        return Setting(
            Shape(hidden=32, layers=1, heads=2, inner=64, context=32), cohort=3, batch=2, averages=_AVERAGES
        ), 3
    if device.type == "cpu":
        return Setting(Shape(), averages=_AVERAGES), _PRETRAINING_STEPS
    if not options.compile:
        return Setting(Shape(), dtype=torch.float16, averages=_AVERAGES), _PRETRAINING_STEPS
    setting = Setting(
        Shape(),
        dtype=torch.float16,
        block=torch.compile(decoder_block, dynamic=False),
        head=torch.compile(head_losses, dynamic=False),
        update=torch.compile(adam_step, dynamic=False),
        averages=_AVERAGES,
    )
    return setting, _PRETRAINING_STEPS


def _label(group: list[Run]) -> str:
    names = ", ".join(dict.fromkeys(run.method.name for run in group))
    return f"{group[0].federation} {group[0].local_steps} steps: {len(group)} runs: {names}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=sorted(plan.STAGES), default="explore")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the texts lie")
    parser.add_argument("--base", type=Path, help="a base.safetensors of an earlier stage; trained anew without")
    parser.add_argument("--records", type=Path, help="records.json of the same stage and base: runs in it are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/federated_trial"))
    parser.add_argument("--limit-s", type=float, default=500.0, help="start nothing that would not end by then")
    parser.add_argument("--group", type=int, default=_GROUP, help="runs in one batch")
    parser.add_argument("--tiny", action="store_true", help="a check in seconds, at sizes that mean nothing")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
