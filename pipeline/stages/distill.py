"""distill: a student cut out of the teacher and trained on the stored signal.

The same shape trained from scratch on the same tokens is the baseline; it is measured, not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import StageRun, write_json
from pipeline.distillation.scoring import kl_from_draws, perplexity


def run(run: StageRun) -> None:
    """Write the student as an ordinary Hugging Face checkpoint."""
    import torch
    from safetensors.torch import load_file

    from pipeline.distillation import losses
    from pipeline.distillation.pruning import Importance, prune, random_student, student_shape
    from pipeline.distillation.signals import StoredSource
    from pipeline.distillation.teachers import load_checkpoint, read_source
    from pipeline.distillation.trainer import discard_checkpoint, train, train_plan

    config, targets = run.config, run.layout.targets
    source = read_source(run.layout.teacher)
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
    from pipeline.distillation.recording import model_logits

    sequences = np.load(targets / "held_out.npy")
    draws, log_p = (np.load(targets / f"held_out_{name}.npy") for name in ("draws", "log_p"))
    return {
        "perplexity": round(perplexity(model_logits(model, sequences), sequences), 4),
        "kl_to_teacher": round(kl_from_draws(model_logits(model, sequences), draws, log_p), 6),
    }
