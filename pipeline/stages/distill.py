"""distill: a student, cut out of its teacher or of a larger student, learns what the teacher says.

The same shape trained from scratch on the same tokens is the baseline; it is measured, not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import StageRun, located, tree_digest, write_json
from pipeline.distillation.scoring import kl_from_draws, perplexity

if TYPE_CHECKING:
    from pipeline.distillation.batches import Sequences
    from pipeline.distillation.hidden_losses import HiddenTerm
    from pipeline.distillation.signals import SignalSource

_IMPORTANCE_BATCH = 4


def run(run: StageRun) -> None:
    """Write the student as an ordinary Hugging Face checkpoint."""
    from pipeline.distillation.batches import Sequences
    from pipeline.distillation.from_config import loss_settings, train_plan
    from pipeline.distillation.objectives import signal_objective, text_objective
    from pipeline.distillation.parallel import join_processes
    from pipeline.distillation.pruning import random_student
    from pipeline.distillation.trainer import discard_checkpoint, train

    config, distill, targets = run.config, run.config.distill, run.layout.targets
    sequences = Sequences(
        np.load(targets / "train.npy", mmap_mode="r"), np.load(targets / "train_counts.npy", mmap_mode="r")
    )
    student, label = _initial_student(run, sequences), f"distill {run.submodel}"
    metrics: dict[str, Any] = {"pruned": measure(student, targets)}
    baseline = random_student(student, shape_of(student.config), config.seed) if distill.from_scratch_baseline else None
    plan = train_plan(config, distill.steps, distill.batch_sequences, distill.learning_rate)
    source, loss = _signal_source(run), loss_settings(config)
    with _hidden_term(run, student, source) as hidden:
        metrics["history"] = train(
            student, signal_objective(source, loss, hidden), sequences, plan, run.checkpoint / "student", label,
            identity=f"{tree_digest(run.layout.teacher)} {loss}{hidden or ''}",
            prepare=getattr(source, "prepare", None),
        )  # fmt: skip
    if distill.on_policy_steps:
        metrics["on_policy_history"] = _learn_on_policy(run, student, sequences)
    metrics |= measure(student, targets) | {
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "trained_tokens": plan.steps * plan.batch_sequences * distill.sequence_tokens,
    }
    if baseline is not None:
        baseline.to(student.device)
        train(
            baseline,
            text_objective(distill.chunk_tokens),
            sequences,
            plan,
            run.checkpoint / "baseline",
            f"{label}, from scratch",
        )
        metrics["from_scratch"] = measure(baseline, targets)
    if join_processes().index == 0:
        student.save_pretrained(run.output)
        write_json(run.layout.metrics("distill", run.submodel), metrics)
        discard_checkpoint(run.checkpoint)


def measure(model: Any, targets: Path) -> dict[str, float]:
    """Held-out perplexity and KL to the teacher of a transformers model."""
    from pipeline.distillation.recording import model_logits

    sequences = np.load(targets / "held_out.npy")
    draws, log_p = (np.load(targets / f"held_out_{name}.npy") for name in ("draws", "log_p"))
    return {
        "perplexity": round(perplexity(model_logits(model, sequences), sequences), 4),
        "kl_to_teacher": round(kl_from_draws(model_logits(model, sequences), draws, log_p), 6),
    }


def shape_of(config: Any) -> Any:
    """A model's sizes, as pruning counts them."""
    from pipeline.distillation.pruning import StudentShape

    return StudentShape(
        config.hidden_size, config.intermediate_size, config.num_key_value_heads, config.num_hidden_layers
    )


def _initial_student(run: StageRun, sequences: Sequences) -> Any:
    """The student before training, on the device that trains it."""
    from pipeline.distillation.from_config import training_device

    checkpoint = run.config.submodel.checkpoint
    student = _cut(run, sequences) if checkpoint is None else _take(run, located(checkpoint))
    return student.to(training_device())


def _take(run: StageRun, checkpoint: Path) -> Any:
    """An existing small checkpoint with the teacher's tokenizer."""
    from pipeline.distillation.initial_student import inspect_student, load_initial_student, require_loss
    from pipeline.distillation.teachers import read_source

    found = inspect_student(checkpoint, Path(read_source(run.layout.teacher).path))
    require_loss(found, aligned=False)
    return load_initial_student(found)


def _cut(run: StageRun, sequences: Sequences) -> Any:
    """Pruned block by block on disk: a 7B is never held in memory for it."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from pipeline.distillation.importance import Importance
    from pipeline.distillation.parallel import join_processes, wait_for_all
    from pipeline.distillation.pruning import prune_checkpoint, student_shape
    from pipeline.distillation.teachers import read_source

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
        importance = _measured(run, cut, sequences)
    pruned, processes = run.checkpoint / "pruned", join_processes()
    if processes.index == 0:
        prune_checkpoint(cut, pruned, importance, shape)
    wait_for_all(processes)
    return _load(pruned)


def _measured(run: StageRun, cut: Path, sequences: Sequences) -> Any:
    """Importance within a student: what matters is no longer what mattered in the teacher."""
    import torch

    from pipeline.distillation.from_config import training_device
    from pipeline.distillation.importance import measure_importance

    count = min(len(sequences), run.config.distill.importance_sequences)
    batches = (
        torch.from_numpy(np.asarray(sequences.tokens[start : min(start + _IMPORTANCE_BATCH, count)], np.int64))
        for start in range(0, count, _IMPORTANCE_BATCH)
    )
    return measure_importance(_load(cut).to(training_device()), batches)


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()


def _signal_source(run: StageRun) -> SignalSource:
    """Stored draws of the teacher, or a model that runs beside the student."""
    from pipeline.distillation.signals import StoredSource
    from pipeline.distillation.stored_targets import StoredTargets

    if run.config.distill.signal == "stored" and run.config.submodel.learns_from == "teacher":
        return StoredSource(StoredTargets.open(run.layout.targets / "train"))
    return _online(run)


@contextmanager
def _hidden_term(run: StageRun, student: Any, source: SignalSource) -> Iterator[HiddenTerm | None]:
    """The hidden-state loss beside the other, with what it adds to the student meanwhile; None without one."""
    from pipeline.distillation.hidden_losses import hidden_term, projected
    from pipeline.distillation.signals import OnlineSource

    weight, pairs = run.config.distill.hidden_weight, run.config.distill.hidden_layers
    if not weight:
        yield None
        return
    if not isinstance(source, OnlineSource):
        raise UserError("distill.hidden_weight", weight, "0 where no teacher runs beside the student on its own tokens")
    term = hidden_term(student, source.teacher, weight, pairs)
    with projected(student, term, run.config.seed):
        yield term


def _online(run: StageRun) -> SignalSource:
    from pipeline.distillation.from_config import training_device, uses_bf16
    from pipeline.distillation.signals import OnlineSource
    from pipeline.distillation.teachers import load_checkpoint, read_source

    name = run.config.submodel.learns_from
    if name == "teacher":
        model = load_checkpoint(read_source(run.layout.teacher))
    else:
        model = _load(run.layout.student(name)).to(training_device())
    return OnlineSource.open(model, uses_bf16(run.config))


def _learn_on_policy(run: StageRun, student: Any, sequences: Sequences) -> Any:
    """The last phase: the student writes, the teacher judges every token (generalised JSD)."""
    from pipeline.distillation.divergences import LossKind
    from pipeline.distillation.from_config import train_plan, uses_bf16
    from pipeline.distillation.objectives import LossSettings, signal_objective
    from pipeline.distillation.on_policy import Sampling, on_policy_objective
    from pipeline.distillation.teachers import eos_ids
    from pipeline.distillation.trainer import train

    config, distill = run.config, run.config.distill
    sampling = Sampling(
        distill.on_policy_ratio, distill.on_policy_prompt_tokens, distill.on_policy_tokens, 1.0,
        tuple(eos_ids(student.config)), config.seed, uses_bf16(config),
    )  # fmt: skip
    loss = LossSettings(LossKind.JSD, beta=distill.beta, chunk_tokens=distill.chunk_tokens)
    return train(
        student, on_policy_objective(signal_objective(_online(run), loss), sampling), sequences,
        train_plan(config, distill.on_policy_steps, distill.batch_sequences, distill.learning_rate / 10),
        run.checkpoint / "on_policy", f"distill {run.submodel}, on-policy",
        identity=f"{tree_digest(run.layout.teacher)} {sampling} {loss}",
    )  # fmt: skip
