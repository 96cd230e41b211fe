"""A student's first weights: cut out of its teacher or a larger student, or an existing small checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import StageRun, located
from pipeline.distillation.from_config import training_device
from pipeline.distillation.importance import Importance, measure_importance
from pipeline.distillation.initial_student import inspect_student, keep_rows, load_initial_student
from pipeline.distillation.parallel import join_processes, wait_for_all
from pipeline.distillation.pruning import prune_checkpoint, student_shape
from pipeline.distillation.student_text import StudentText, read_sequences
from pipeline.distillation.teachers import read_source

_IMPORTANCE_BATCH = 4


def start_student(run: StageRun, text: StudentText) -> Any:
    """The student before training, on the device that trains it.

    Raises:
        UserError: What it is cut from does not exist yet, or cannot be cut to this shape.
    """
    checkpoint = run.config.submodel.checkpoint
    student = _cut(run, text) if checkpoint is None else _take(run, located(checkpoint), text)
    return student.to(training_device())


def load_float32(path: Path) -> Any:
    """A model of this run in fp32 on the CPU, for inference until it is trained."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()


def _take(run: StageRun, checkpoint: Path, text: StudentText) -> Any:
    """An existing small checkpoint, with the teacher's tokenizer (whole or trimmed) or its own."""
    found = inspect_student(checkpoint, Path(read_source(run.layout.teacher).path))
    if text.trimming is None:
        return load_initial_student(found)
    vocabulary = text.trimming.vocabulary
    student = load_initial_student(found, len(vocabulary.new_ids))
    keep_rows(student, vocabulary)
    return student


def _cut(run: StageRun, text: StudentText) -> Any:
    """Pruned block by block on disk: a 7B is never held in memory for it."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    submodel, teacher = run.config.submodel, Path(read_source(run.layout.teacher).path)
    cut = teacher if submodel.cut_from == "teacher" else run.layout.student(submodel.cut_from)
    if not (cut / "config.json").is_file():
        raise UserError(
            "submodel.cut_from", submodel.cut_from, "a submodel that is distilled before this one",
            f"run stage=distill submodel={submodel.cut_from}, or name the teacher",
        )  # fmt: skip
    sizes = [AutoConfig.from_pretrained(path, local_files_only=True) for path in (teacher, cut)]
    shape = student_shape(sizes[0], submodel, sizes[1])
    if cut == teacher:
        importance = Importance(**load_file(run.layout.targets / "importance.safetensors"))
    else:
        importance = _measured(run, cut)
    pruned, processes = run.checkpoint / "pruned", join_processes()
    trimming = text.trimming if submodel.trims else None  # one that is inherited is done already
    if processes.index == 0:
        vocabulary = None if trimming is None else trimming.vocabulary
        prune_checkpoint(cut, pruned, importance, shape, vocabulary=vocabulary)
    wait_for_all(processes)
    return load_float32(pruned)


def _measured(run: StageRun, cut: Path) -> Any:
    """Importance within a student: what matters is no longer what mattered in the teacher."""
    sequences = read_sequences(run.layout.sequences(run.config.submodel.cut_from))
    count = min(len(sequences), run.config.distill.importance_sequences)
    batches = (
        torch.from_numpy(np.asarray(sequences.tokens[start : min(start + _IMPORTANCE_BATCH, count)], np.int64))
        for start in range(0, count, _IMPORTANCE_BATCH)
    )
    return measure_importance(load_float32(cut).to(training_device()), batches)
