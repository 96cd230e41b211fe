"""The plan of a run: what runs and why, and what it needs of disk, memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import PROJECT, Layout, located, require_disk
from pipeline.flow import SHIP, Stage, why_run
from pipeline.settings import CheckpointTeacher, Config, DataConfig

_PROCESS_BYTES = 900_000_000  # torch, transformers and onnxruntime loaded
_PROCESS_S = 8.0
_TRAINING_EFFICIENCY = 0.35  # of a plain matrix product, seen on two cores at a few million parameters
_STATE_BYTES = 36  # a parameter in three training states: the two that are kept, and the one being written
_CONTAINERS_A_WEIGHT = 12  # bytes a parameter of codes, exports, evaluation copies and packages together


@dataclass(frozen=True, slots=True)
class Needs:
    """What one execution needs, roughly."""

    disk_bytes: float
    memory_bytes: float
    flops: float
    fixed_s: float


def print_plan(chosen: Sequence[tuple[Stage, Config]], layout: Layout, *, with_dvc: bool) -> None:
    """Print one line an execution and the totals; nothing is run or written."""
    changed = _dvc_changes() if with_dvc else None
    speed = _measured_flops()
    table = Table(title="plan")
    for column in ("stage", "runs", "why", "disk", "memory", "time"):
        table.add_column(column, justify="right" if column in ("disk", "memory", "time") else "left")
    disk = memory = seconds = 0.0
    for stage, config in chosen:
        label = f"{stage.name} {config.submodel.name}" if stage.per_submodel else stage.name
        reason = _dvc_reason(stage, config, changed) if changed is not None else why_run(stage, config, layout)
        if reason is None:
            table.add_row(label, "no", "current", "", "", "")
            continue
        needs = estimate(stage, config)
        needed_s = needs.flops / speed + needs.fixed_s
        disk, memory, seconds = disk + needs.disk_bytes, max(memory, needs.memory_bytes), seconds + needed_s
        table.add_row(label, "yes", reason, _size(needs.disk_bytes), _size(needs.memory_bytes), _time(needed_s))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"output {layout.root}, {_size(disk)} of disk, {_size(memory)} of memory, about {_time(seconds)}",
        soft_wrap=True,
    )


def require_sources(config: Config) -> None:
    """Refuse a run whose teacher, text or legacy runtime is not there, before anything is done.

    Raises:
        UserError: One of them is missing; the message names it.
    """
    from pipeline.data.sources import document_files
    from pipeline.distillation.teachers import resolve_checkpoint
    from pipeline.export.assembly import require_legacy_python

    if isinstance(config.teacher, CheckpointTeacher) and config.teacher.kind == "local":
        resolve_checkpoint(config.teacher)
    if isinstance(config.data, DataConfig) and config.data.path is not None:
        document_files(config.data.path)
    require_legacy_python(config)


def require_resources(chosen: Sequence[tuple[Stage, Config]], layout: Layout) -> None:
    """Refuse a run that the free disk cannot hold.

    Raises:
        UserError: Too little is free.
    """
    needed = sum(estimate(stage, config).disk_bytes for stage, config in chosen)
    require_disk(layout.root, int(needed))


def estimate(stage: Stage, config: Config) -> Needs:
    """Disk, peak memory and arithmetic of one execution, from sizes alone."""
    params = _teacher_params(config)
    student = params * _student_share(config)
    distill, teacher = config.distill, config.teacher
    trained = distill.steps * distill.batch_sequences * distill.sequence_tokens
    if stage.name == "clean":
        return Needs(30e6, 0.3e9, 0, 15)
    if stage.name == "teacher":
        if isinstance(teacher, CheckpointTeacher):
            return _correction(teacher, params, distill.sequence_tokens)
        tokens = teacher.steps * teacher.batch_sequences * distill.sequence_tokens
        return Needs(params * 16, _PROCESS_BYTES + params * 24, 6.0 * params * tokens, _PROCESS_S)
    loaded = params * {"fp32": 4.0, "bf16": 2.0, "int8": 1.1, "int4": 0.6}[getattr(teacher, "load", "fp32")]
    if stage.name == "targets":
        stored = distill.target_tokens * (4 + 4.0 * distill.draws)
        return Needs(stored, _PROCESS_BYTES + loaded, 2.0 * params * distill.target_tokens, _PROCESS_S)
    if stage.name == "distill":
        runs = 2 if distill.from_scratch_baseline else 1
        flops = runs * 6.0 * student * trained + (2.0 * params * trained if distill.signal == "online" else 0)
        return Needs(student * 16, _PROCESS_BYTES + loaded + student * 20, flops, _PROCESS_S)
    if stage.name in SHIP:
        scored = 2.0 * student * config.runtime.evaluation_sequences * distill.sequence_tokens
        return Needs(student * _CONTAINERS_A_WEIGHT / len(SHIP), _PROCESS_BYTES + student * 12, scored, _PROCESS_S / 2)
    return Needs(50e6, 0.5e9, 0, _PROCESS_S)


def _correction(teacher: CheckpointTeacher, params: float, sequence_tokens: int) -> Needs:
    """A checkpoint that is only referred to needs nothing; one that is corrected becomes another one."""
    if not teacher.correction_steps:
        return Needs(20e6, _PROCESS_BYTES, 0, _PROCESS_S)
    weights = params * (4 if teacher.load == "fp32" else 2)
    tokens = teacher.correction_steps * teacher.correction_batch_sequences * sequence_tokens
    if teacher.correction_rank is not None:
        return Needs(weights * 1.1, _PROCESS_BYTES + weights * 1.5, 4.0 * params * tokens, _PROCESS_S)
    return Needs(weights + params * _STATE_BYTES, _PROCESS_BYTES + params * 24, 6.0 * params * tokens, _PROCESS_S)


def _teacher_params(config: Config) -> float:
    """Parameters of the teacher, from its sizes; 7.6e9 for one not yet downloaded."""
    teacher = config.teacher
    if isinstance(teacher, CheckpointTeacher):
        if teacher.path is None or not located(teacher.path).is_dir():
            return 7.6e9
        return sum(file.stat().st_size for file in located(teacher.path).glob("*.safetensors")) / 2
    head = teacher.hidden_size // teacher.num_heads
    attention = 2 * teacher.hidden_size * head * (teacher.num_heads + teacher.num_kv_heads)
    layer = attention + 3 * teacher.hidden_size * teacher.intermediate_size
    return float(teacher.vocab_size * teacher.hidden_size + teacher.num_layers * layer)


def _student_share(config: Config) -> float:
    ratios = config.submodel
    return ratios.width * (1 + 2 * ratios.depth * max(ratios.ffn, ratios.heads)) / 3


def _measured_flops() -> float:
    """Speed of a matrix product here, times what training reaches of it."""
    import numpy as np

    a = np.ones((768, 768), np.float32)
    a @ a
    start_s = time.perf_counter()
    for _ in range(10):
        a @ a
    return 10 * 2 * 768**3 / (time.perf_counter() - start_s) * _TRAINING_EFFICIENCY


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


def _size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.1f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )
