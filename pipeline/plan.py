"""The plan of a run: what runs and why, from what each student is cut, and what it all needs of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import PROJECT, Layout, located, require_disk
from pipeline.config import family_chain
from pipeline.devices import FORWARD_SHARE, H100_PEAK_FLOPS, TRAINING_SHARE, Machine, look_at_machine, seconds
from pipeline.distillation.chain import describe_chain
from pipeline.flow import SHIP, Stage, why_run
from pipeline.model_bytes import RATIOS, least_weights_bytes
from pipeline.needs import WITHOUT_QAD, Needs, estimate
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher, DataConfig
from pipeline.sizes import FamilySizes, family_sizes

_WORTH_A_GPU_S = 3600  # below, a GPU waits for its next launch, and no rate of large models says anything
_FILE_COLUMNS = 160  # into a file or a pipe nothing is wrapped
_ADVICE = {
    "teacher.load": "teacher.load=int4, or distill.signal=stored so that it runs once",
    RATIOS: "smaller submodels (submodel.width, ffn, heads, depth)",
    "distill.micro_sequences, or distill.recompute=true": "distill.micro_sequences=1, then distill.recompute=true",
    "distill.chunk_tokens": "a lower distill.chunk_tokens",
    "distill.sequence_tokens": "a lower distill.sequence_tokens",
    "quantize.sensitivity_tokens=0": "quantize.sensitivity_tokens=0",
    WITHOUT_QAD: WITHOUT_QAD,
    "submodel.learns_from": "submodel.learns_from=teacher with distill.signal=stored",
}
Chosen = Sequence[tuple[Stage, Config]]


def print_plan(
    chosen: Chosen, configs: Mapping[str, Config], layout: Layout, *, with_dvc: bool, machine: Machine | None = None
) -> None:
    """Print the executions, the chain, the totals and what this machine cannot hold; nothing is run or written.

    Args:
        chosen: The executions, in order.
        configs: The whole family.
        layout: Where the run writes.
        with_dvc: DVC decides what runs again.
        machine: To count with; None: this one.

    Raises:
        UserError: The chain is none, or the teacher's sizes cannot be known.
    """
    family = require_chain(configs)
    changed = _dvc_changes() if with_dvc else None
    machine = machine or look_at_machine(next(iter(configs.values())))
    running: list[tuple[str, Needs]] = []
    table = Table(title="plan")
    columns = ("disk", "meanwhile", "memory", *(("GPU",) if machine.gpu else ()), "time")
    for column in ("stage", "runs", "why", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for stage, config in chosen:
        label = f"{stage.name} {config.submodel.name}" if stage.per_submodel else stage.name
        reason = _dvc_reason(stage, config, changed) if changed is not None else why_run(stage, config, layout)
        if reason is None:
            table.add_row(label, "no", "current")
            continue
        needs = estimate(stage, config, family, bf16=machine.bf16)
        running.append((label, needs))
        table.add_row(label, "yes", reason, *_cells(needs, machine))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_COLUMNS)
    console.print(table)
    for line in [
        *_chain_lines(configs, family),
        *_totals(running, machine, layout),
        *_warnings(running, machine, layout),
    ]:
        console.print(line, soft_wrap=True, markup=False)


def require_chain(configs: Mapping[str, Config]) -> FamilySizes:
    """Sizes of every model of a run.

    Raises:
        UserError: A student is larger than what it is cut from, sizes cannot be known, or codes cannot be as small as
            ``quantize.weight_ratio_max`` wants them.
    """
    family = family_sizes(configs, family_chain(dict(configs)))
    for name, config in configs.items():
        allowed, sizes = config.quantize.weight_ratio_max, family.submodels[name]
        least = least_weights_bytes(sizes, config) / (2 * sizes.params)
        if allowed is not None and least > allowed:
            raise UserError(
                "quantize.weight_ratio_max", allowed, f"at least {least:.4f}, what 4 bits take of {name}",
                "raise it, or choose null",
            )  # fmt: skip
    return family


def require_sources(config: Config) -> None:
    """Refuse a run whose teacher, text, tasks or legacy runtime are not there, before anything is done.

    Raises:
        UserError: One of them is missing; the message names it.
    """
    from pipeline.data.sources import document_files
    from pipeline.distillation.teachers import resolve_checkpoint
    from pipeline.export.assembly import require_legacy_python

    if config.runtime.task_files:
        from pipeline.evaluation.preparation import task_files

        task_files(config.runtime)
    if config.runtime.harness_tasks:
        from pipeline.evaluation.harness import require_harness

        require_harness()
    if isinstance(config.teacher, CheckpointTeacher) and config.teacher.kind == "local":
        resolve_checkpoint(config.teacher)
    if isinstance(config.data, DataConfig) and config.data.path is not None:
        document_files(config.data.path)
    require_legacy_python(config)


def require_checkpoints(configs: Iterable[Config]) -> None:
    """Refuse checkpoints that submodels cannot start from, before anything is done.

    Whether a tokenizer is the teacher's is known now where the teacher is a folder, else when it is distilled.

    Raises:
        UserError: One of them cannot be used; the message names it.
    """
    for config in configs:
        if config.submodel.checkpoint is None:
            continue
        from pipeline.distillation.checkpoint_files import read_config
        from pipeline.distillation.student_text import require_checkpoint
        from pipeline.distillation.teachers import resolve_checkpoint

        path = located(config.submodel.checkpoint)
        if isinstance(config.teacher, CheckpointTeacher) and config.teacher.kind == "local":
            aligned = config.distill.loss == "aligned"
            require_checkpoint(path, resolve_checkpoint(config.teacher), config.submodel, aligned=aligned)
        else:
            read_config(path, "submodel.checkpoint")


def require_resources(chosen: Chosen, configs: Mapping[str, Config], layout: Layout) -> None:
    """Refuse a run that the free disk cannot hold.

    Raises:
        UserError: Too little is free, or a student is larger than what it is cut from.
    """
    family = None if all(stage.name == "clean" for stage, _ in chosen) else require_chain(configs)
    require_disk(
        layout.root, int(_disk_bytes([estimate(stage, config, family, bf16=True) for stage, config in chosen]))
    )


def _disk_bytes(needs: Sequence[Needs]) -> float:
    """Most that is on the disk at once: all that stays, and what the greediest stage needs besides."""
    return sum(each.disk_bytes for each in needs) + max((each.scratch_bytes for each in needs), default=0.0)


def _memory_bytes(needs: Needs, machine: Machine) -> float:
    return needs.host_bytes + (0.0 if machine.gpu else sum(needs.device_bytes.values()))


def _gpu_flops(machine: Machine) -> float | None:
    """Of the GPU; one that is not known is taken for an H100, and the plan says so."""
    return (machine.gpu_flops or H100_PEAK_FLOPS) if machine.gpu else None


def _cells(needs: Needs, machine: Machine) -> list[str]:
    device = sum(needs.device_bytes.values())
    return [
        _size(needs.disk_bytes), _size(needs.scratch_bytes) if needs.scratch_bytes else "",
        _size(_memory_bytes(needs, machine)), *([_size(device) if device else ""] if machine.gpu else []),
        _time(seconds(needs, machine, _gpu_flops(machine))),
    ]  # fmt: skip


def _chain_lines(configs: Mapping[str, Config], family: FamilySizes) -> Iterator[str]:
    first = next(iter(configs.values()))
    yield f"teacher: {_described(family.teacher)}"
    for line in describe_chain(family_chain(dict(configs)), stored=first.distill.signal == "stored"):
        yield f"{line} ({_described(family.submodels[line.partition(':')[0]])})"


def _described(sizes: Any) -> str:
    return (
        f"{_count(sizes.params)} parameters, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, "
        f"FFN {sizes.intermediate_size}, {sizes.num_key_value_heads} KV heads, vocabulary {sizes.vocab_size}"
    )


def _totals(running: Sequence[tuple[str, Needs]], machine: Machine, layout: Layout) -> Iterator[str]:
    needs = [each for _, each in running]
    memory = max((_memory_bytes(each, machine) for each in needs), default=0.0)
    disk = f"{_size(_disk_bytes(needs))} of disk at most, {_size(sum(each.disk_bytes for each in needs))} of it to stay"
    yield f"output {layout.root}, {disk}, {_size(memory)} of memory at most"
    own_s = sum(seconds(each, machine, _gpu_flops(machine)) for each in needs)
    rates = (
        f"an estimate from rates measured on an H100 (benchmarks/README.md), scaled by operations a token: "
        f"{TRAINING_SHARE:.0%} of its peak in training, {FORWARD_SHARE:.0%} in the teacher's forward pass"
    )
    cpu = f"this CPU ({machine.cpu}, a product at {machine.cpu_flops / 1e9:.0f} GFLOP/s just now)"
    if machine.gpu is None:
        yield f"about {_time(own_s)} on {cpu}; there is no GPU"
        if own_s > _WORTH_A_GPU_S:
            h100_s = sum(seconds(each, machine, H100_PEAK_FLOPS) for each in needs)
            yield f"at least {_time(h100_s)} with one H100 beside it: {rates}"
        return
    peak = (
        "its peak is not known here: as an H100"
        if machine.gpu_flops is None
        else (f"{machine.gpu_flops / 1e12:.0f} TFLOP/s")
    )
    yield f"at least {_time(own_s)} on one {machine.gpu} ({peak}): {rates}; the rest on {cpu}"
    if not machine.bf16:
        yield "distill.precision=fp32: these rates are those of bf16; it takes several times as long"


def _warnings(running: Sequence[tuple[str, Needs]], machine: Machine, layout: Layout) -> Iterator[str]:
    """What this machine cannot hold, with the setting that helps most."""
    for label, needs in running:
        device = sum(needs.device_bytes.values())
        helps = _ADVICE[max(needs.device_bytes, key=lambda name: needs.device_bytes[name])] if device else ""
        if machine.gpu and device > machine.gpu_bytes:
            yield f"warning: {label} needs up to {_size(device)} of the GPU's {_size(machine.gpu_bytes)}: try {helps}"
        if (memory := _memory_bytes(needs, machine)) > machine.memory_bytes:
            where = helps if device and not machine.gpu else "a machine with more memory"
            total = _size(machine.memory_bytes)
            yield f"warning: {label} needs up to {_size(memory)} of this machine's {total} of memory: try {where}"
    existing = next(path for path in [layout.root, *layout.root.parents] if path.exists())
    free, needed = shutil.disk_usage(existing).free, _disk_bytes([needs for _, needs in running])
    if needed > free:
        label, greediest = max(running, key=lambda each: each[1].disk_bytes + each[1].scratch_bytes)
        if greediest.scratch_bytes > greediest.disk_bytes:
            where = "a higher distill.checkpoint_every_steps"
        else:
            where = "fewer distill.target_tokens" if label == "targets" else "fewer export.containers"
        where += ", or fewer submodels at a time (submodel=NAME)"
        yield f"warning: {_size(needed)} of disk are needed, {_size(free)} are free, most for {label}: try {where}"


def _dvc_changes() -> dict[str, Any]:
    """``dvc status --json``: stage name to what changed.

    Raises:
        UserError: DVC is missing, or cannot read the project.
    """
    dvc = Path(sys.executable).parent / "dvc"
    try:
        done = subprocess.run(
            [dvc, "status", "--json"], cwd=PROJECT, capture_output=True, text=True, check=False,
            env={**os.environ, "DVC_NO_ANALYTICS": "1"},
        )  # fmt: skip
        if done.returncode == 0:
            changes: dict[str, Any] = json.loads(done.stdout)
            return changes
        message = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    except (OSError, ValueError) as error:
        message = str(error)
    raise UserError("dvc status", message, "an answer from DVC", "make setup, or pip install '.[pipeline]'")


def _dvc_reason(stage: Stage, config: Config, changes: dict[str, Any]) -> str | None:
    group = "ship" if stage.name in SHIP else stage.name
    name = f"{group}@{config.submodel.name}" if stage.per_submodel else group
    if name not in changes:
        return None
    kinds = []
    for change in changes[name]:
        if isinstance(change, str):
            kinds.append(change)
        else:
            kinds += [f"{kind}: {', '.join(map(str, what))}" for kind, what in change.items() if isinstance(what, dict)]
    return "; ".join(kinds)[:80] or "changed"


def _count(value: float) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _time(needed_s: float) -> str:
    for unit, unit_s, from_s in (("days", 86_400, 172_800), ("h", 3600, 5400), ("min", 60, 90)):
        if needed_s > from_s:
            return f"{needed_s / unit_s:.1f} {unit}"
    return f"{needed_s:.0f} s"
