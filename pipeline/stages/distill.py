"""distill: a student cut out of the teacher and trained on the stored signal.

The same shape trained from scratch on the same tokens is the baseline; it is measured, not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import StageRun, write_json
from pipeline.config import Config
from pipeline.distillation.scoring import kl_from_draws, perplexity
from pipeline.stages.teacher import load_source


def run(run: StageRun) -> None:
    """Write the student as an ordinary Hugging Face checkpoint."""
    import torch
    from safetensors.torch import load_file

    from pipeline.distillation import losses
    from pipeline.distillation.pruning import Importance, prune, random_student, student_shape
    from pipeline.distillation.signals import StoredSource
    from pipeline.distillation.teachers import load_checkpoint
    from pipeline.distillation.trainer import discard_checkpoint, train

    config, targets = run.config, run.layout.targets
    source = load_source(run.layout)
    teacher = load_checkpoint(source, load=None if source.load in ("fp32", "bf16") else "bf16")
    shape = student_shape(teacher.config, config.submodel)
    student = prune(teacher, Importance(**load_file(targets / "importance.safetensors")), shape)
    stored = StoredSource.open(targets / "train_draws.npy")
    sequences = np.load(targets / "train.npy")
    plan = train_plan(config, config.distill.steps, config.distill.batch_sequences, config.distill.learning_rate)

    def teacher_loss(logits: torch.Tensor, rows: NDArray[np.int64], tokens: torch.Tensor) -> torch.Tensor:
        return losses.forward_kl(logits, stored.signal(rows, tokens))

    def text_loss(logits: torch.Tensor, rows: NDArray[np.int64], tokens: torch.Tensor) -> torch.Tensor:
        return losses.next_token_loss(logits, tokens)

    label = f"distill {run.submodel}"
    metrics: dict[str, Any] = {"pruned": measure(student, targets)}
    baseline = random_student(teacher, shape, config.seed) if config.distill.from_scratch_baseline else None
    del teacher
    metrics["history"] = train(student, sequences, teacher_loss, plan, run.checkpoint / "student", label)
    metrics |= measure(student, targets) | {
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "trained_tokens": plan.steps * plan.batch_sequences * config.distill.sequence_tokens,
    }
    student.save_pretrained(run.output)
    if baseline is not None:
        train(baseline, sequences, text_loss, plan, run.checkpoint / "baseline", f"{label}, from scratch")
        metrics["from_scratch"] = measure(baseline, targets)
    write_json(run.layout.metrics("distill", run.submodel), metrics)
    discard_checkpoint(run.checkpoint)


def measure(model: Any, targets: Path) -> dict[str, float]:
    """Held-out perplexity and KL to the teacher of a transformers model."""
    sequences = np.load(targets / "held_out.npy")
    draws, log_p = (np.load(targets / f"held_out_{name}.npy") for name in ("draws", "log_p"))
    return {
        "perplexity": round(perplexity(model_logits(model, sequences), sequences), 4),
        "kl_to_teacher": round(kl_from_draws(model_logits(model, sequences), draws, log_p), 6),
    }


def model_logits(model: Any, sequences: NDArray[np.int32]) -> Iterator[NDArray[np.float32]]:
    """(T, V) float32 logits, one sequence after another."""
    from pipeline.distillation.recording import teacher_logits

    for row in sequences:
        yield teacher_logits(model, row[None], bf16=False)[0].numpy()


def train_plan(config: Config, steps: int, batch_sequences: int, learning_rate: float) -> Any:
    """The trainer's plan from the configuration."""
    from pipeline.distillation.trainer import TrainPlan

    distill = config.distill
    return TrainPlan(
        steps, batch_sequences, learning_rate, distill.weight_decay, distill.warmup_ratio, uses_bf16(config),
        config.seed, distill.checkpoint_every_steps,
    )  # fmt: skip


def uses_bf16(config: Config) -> bool:
    """Whether matrices are multiplied in bfloat16 on this machine."""
    from pipeline.distillation.trainer import computes_bf16

    return {"auto": computes_bf16(), "bf16": True, "fp32": False}[config.distill.precision]
