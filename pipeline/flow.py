"""The stages in order: what each reads, writes and depends on, and one way to run them.

dvc.yaml says the same for DVC; tests compare the two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import (
    PROJECT,
    Layout,
    Observer,
    StageRun,
    atomic_directory,
    content_digest,
    external_lines,
    fingerprint,
    partial_directory,
    recorded_fingerprint,
    room_on_disk,
    sole_writer,
    unwatched,
    write_record,
)
from pipeline.progress import CONSOLE
from pipeline.settings import Config
from pipeline.torchrun import TRAINING_STAGES, follow_first, is_first, process_count


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        sections: Parts of the configuration, or single settings, that its result depends on.
        code: Source files and folders that its result depends on, besides its own module.
        inputs: Outputs of earlier stages, by stage name.
        folder: Its output below the layout's root; ``{}`` stands for the submodel.
    """

    name: str
    sections: tuple[str, ...]
    code: tuple[str, ...]
    inputs: tuple[str, ...]
    folder: str

    @property
    def per_submodel(self) -> bool:
        """Whether it runs once for each submodel."""
        return "{}" in self.folder

    def output(self, layout: Layout, submodel: str) -> Path:
        """Where its finished output is."""
        return layout.root / self.folder.format(submodel)


_TRAINING = tuple(
    f"distill.{key}"
    for key in (
        "sequence_tokens",
        "weight_decay",
        "warmup_ratio",
        "precision",
        "checkpoint_every_steps",
        "chunk_tokens",
        "micro_sequences",
        "compile",
        "recompute",
        "sharding",
    )
)
_SIGNAL = tuple(
    f"distill.{key}"
    for key in ("sequence_tokens", "target_tokens", "draws", "importance_sequences", "precision", "compile", "signal")
)
_FORMATS = "edge_runtime/formats"
REFERENCE = "assets/reference_teacher"
_MODELS = ("pipeline/distillation", _FORMATS)
_STUDENT_LOGITS = "pipeline/distillation/recording.py"
_PACKING = tuple(f"pipeline/data/{name}.py" for name in ("packing", "encoding", "chat_template"))
STAGES = {
    stage.name: stage
    for stage in (
        Stage("clean", ("data",), ("pipeline/data",), (), "artifacts/corpus"),
        Stage(
            "teacher",
            ("teacher", *_TRAINING, "seed", "threads"),
            (*_MODELS, "pipeline/data", REFERENCE),
            ("clean",),
            "artifacts/teacher",
        ),
        Stage(
            "targets",
            (*_SIGNAL, "runtime.evaluation_sequences", "seed", "threads"),
            (*_MODELS, "pipeline/data"),
            ("clean", "teacher"),
            "artifacts/targets",
        ),
        Stage(
            "distill",
            ("submodel", "distill", "seed", "threads"),
            (*_MODELS, *_PACKING, "pipeline/evaluation/long_context.py"),
            ("clean", "teacher", "targets"),
            "artifacts/students/{}",
        ),
        Stage(
            "quantize",
            ("quantize", "export", *_TRAINING, "seed", "threads"),
            ("pipeline/quantization", "pipeline/export", *_MODELS),
            ("targets", "distill"),
            "artifacts/weights/{}",
        ),
        Stage(
            "export",
            ("export", "runtime", "submodel"),
            (
                _STUDENT_LOGITS,
                "pipeline/export",
                "pipeline/quantization",
                "pipeline/distillation/teachers.py",
                "pipeline/distillation/checkpoint_files.py",
                "edge_runtime",
            ),
            ("teacher", "targets", "distill", "quantize"),
            "artifacts/exports/{}",
        ),
        Stage(
            "evaluate",
            ("export", "runtime", "gate", "submodel", "distill.sequence_tokens", "distill.precision", "seed"),
            (
                *_PACKING,
                "pipeline/distillation",
                "pipeline/export",
                "pipeline/evaluation",
                "pipeline/quantization",
                "edge_runtime",
            ),
            ("clean", "teacher", "targets", "distill", "quantize", "export"),
            "artifacts/evaluations/{}",
        ),
        Stage(
            "package",
            ("export", "runtime", "submodel", "data.source"),
            ("pipeline/report", "pipeline/export/assembly.py", _FORMATS),
            ("export", "evaluate"),
            "artifacts/packages/{}",
        ),
        Stage(
            "report",
            ("family", "runtime", "data.source"),
            ("pipeline/report", "pipeline/stages/package.py", f"{_FORMATS}/decoder.py"),
            ("evaluate", "package"),
            "artifacts/report",
        ),
        Stage(
            "register",
            ("track",),
            ("pipeline/tracking.py", "pipeline/tracking_ui.py"),
            ("package", "report"),
            "artifacts/register",
        ),
    )
}
SHIP = ("quantize", "export", "evaluate", "package")  # one process a submodel: imports cost seconds each
GATE = "gate"  # judges a federation's candidate whenever there is one; no step of a run, and nothing of DVC's
ADAPTER = "adapter"  # the library of adapters; called by people
_CURRENT = "current"
_TORCHLESS = ("clean", "report", "register")


def stage_names() -> list[str]:
    """What ``stage=`` takes."""
    return [*STAGES, "ship", GATE, ADAPTER]


def planned(configs: dict[str, Config]) -> Iterator[tuple[Stage, Config]]:
    """Every execution of a whole run, in order."""
    first = next(iter(configs.values()))
    for stage in STAGES.values():
        if stage.name in SHIP[1:]:
            continue
        if stage.name == SHIP[0]:
            yield from ((STAGES[name], config) for config in configs.values() for name in SHIP)
        elif stage.per_submodel:
            yield from ((stage, config) for config in configs.values())
        else:
            yield stage, first


def stage_fingerprint(stage: Stage, config: Config, layout: Layout) -> str:
    """Digest of everything the stage's result depends on."""
    values = {section: _setting(config.model_dump(mode="json"), section) for section in stage.sections}
    code = [PROJECT / f"pipeline/stages/{stage.name}.py", *(PROJECT / path for path in stage.code)]
    inputs = _input_digests(stage, config, layout)
    return fingerprint(stage.name, values, _external(stage, config), code=code, inputs=inputs)


def why_run(stage: Stage, config: Config, layout: Layout) -> str | None:
    """Why the stage would run now, or None when its output is current."""
    output = stage.output(layout, config.submodel.name)
    if not output.is_dir() or not all(path.exists() for path in _reports(stage, config, layout)):
        return "no finished output"
    recorded = recorded_fingerprint(layout, output)
    if recorded is None:
        return "output changed by something else"
    if recorded != stage_fingerprint(stage, config, layout):
        return "settings, code or inputs changed"
    return None


def execute(stage: Stage, config: Config, layout: Layout, *, force: bool = False) -> bool:
    """Run a stage unless its output is current (``force`` runs it even then).

    Of several processes the first holds the lock, decides, and owns the output; the others compute along.

    Returns:
        Whether it ran.

    Raises:
        UserError: An earlier stage has not run, or another process writes this output.
    """
    submodel = config.submodel.name if stage.per_submodel else None
    label = f"{stage.name} {submodel}" if submodel else stage.name
    if not is_first():
        return _follow(stage, config, layout, label)
    with sole_writer(layout, stage.name, submodel):
        for name in stage.inputs:
            _require_input(STAGES[name], stage, config, layout)
        if not force and why_run(stage, config, layout) is None:
            follow_first(label, _CURRENT)
            CONSOLE.print(f"{label}: current, skipped")
            return False
        digest = follow_first(label, stage_fingerprint(stage, config, layout))
        prepare_process(stage, config)
        CONSOLE.print(f"{label} ...")
        start_s = time.monotonic()
        checkpoint = layout.checkpoint(stage.name, digest)
        place = stage.output(layout, config.submodel.name)
        with atomic_directory(place) as output, _watched(stage, config, digest) as watch, room_on_disk(place):
            _run_stage(stage, StageRun(config, layout, output, checkpoint, watch))
        write_record(layout, stage.output(layout, config.submodel.name), digest, round(time.monotonic() - start_s, 2))
    return True


def prepare_process(stage: Stage, config: Config) -> None:
    """Fix thread counts and determinism before torch is loaded; keep libraries quiet and at home."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DISABLE_TELEMETRY", "1")
    if config.teacher.kind != "hub":
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    # Threads that spin at barriers lose most of their speed beside a busy process (benchmarks/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if stage.name in _TORCHLESS:
        return
    import torch
    from transformers.utils import logging

    from pipeline.distillation.fast_layers import use_deterministic_kernels

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    use_deterministic_kernels()


def _follow(stage: Stage, config: Config, layout: Layout, label: str) -> bool:
    """What the first process of several decided, done with it; nothing is written or shown."""
    digest = follow_first(label)
    if digest == _CURRENT:
        return False
    CONSOLE.quiet = True
    prepare_process(stage, config)
    output = partial_directory(stage.output(layout, config.submodel.name))
    _run_stage(stage, StageRun(config, layout, output, layout.checkpoint(stage.name, digest)))
    return True


def _run_stage(stage: Stage, run: StageRun) -> None:
    if process_count() > 1:
        from pipeline.distillation.parallel import join_processes

        join_processes()  # before anything is loaded: each takes its own GPU
    import_module(f"pipeline.stages.{stage.name}").run(run)


@contextmanager
def _watched(stage: Stage, config: Config, digest: str) -> Iterator[Callable[[str], Observer | None]]:
    """Trainings in MLflow while they go on, where the settings say so."""
    if not (config.track.live and stage.name in TRAINING_STAGES):
        yield unwatched
        return
    from pipeline.tracking_training import training_runs

    with training_runs(PROJECT / config.track.store, digest[:16]) as watch:
        yield watch


def _setting(values: Any, path: str) -> Any:
    """``distill.steps`` out of a nested configuration; a path that this variant lacks is None."""
    for key in path.split("."):
        values = values.get(key)
    return values


def _reports(stage: Stage, config: Config, layout: Layout) -> list[Path]:
    """What a stage writes outside its output folder, for git to keep."""
    if stage.name == "report":
        return [layout.reports / "family.json", layout.reports / "index.html"]
    if stage.name == "register":
        return []
    return [layout.metrics(stage.name, config.submodel.name if stage.per_submodel else None)]


def _require_input(needed: Stage, stage: Stage, config: Config, layout: Layout) -> None:
    names = config.family if needed.per_submodel and not stage.per_submodel else [config.submodel.name]
    for name in names:
        if not needed.output(layout, name).is_dir():
            raise UserError(
                "stage", stage.name, f"after {needed.name} ({needed.output(layout, name)} is missing)",
                f"run python -m pipeline stage={needed.name}" + (f" submodel={name}" if needed.per_submodel else ""),
            )  # fmt: skip


def _input_digests(stage: Stage, config: Config, layout: Layout) -> list[str]:
    digests = []
    for needed in (STAGES[name] for name in stage.inputs):
        names = config.family if needed.per_submodel and not stage.per_submodel else [config.submodel.name]
        digests += [content_digest(layout, needed.output(layout, name)) for name in names]
    return [*digests, *(content_digest(layout, path) for path in _larger_students(stage, config, layout))]


def _larger_students(stage: Stage, config: Config, layout: Layout) -> list[Path]:
    """Students that this one is cut from or learns from, as far as they are there."""
    if stage.name != "distill":
        return []
    names = sorted({config.submodel.cut_from, config.submodel.learns_from} - {"teacher"})
    return [path for path in map(layout.student, names) if path.is_dir()]


def _external(stage: Stage, config: Config) -> list[str]:
    """Files outside the project that a stage reads, as name, size and time of change."""
    roots: dict[str, Sequence[Path | None]] = {
        "clean": [config.data.path],
        "teacher": [getattr(config.teacher, "path", None)],
        "distill": [config.submodel.checkpoint],
        "evaluate": [*config.runtime.task_files, config.runtime.harness_path],
    }
    return [line for root in roots.get(stage.name, []) for line in external_lines(root)]
