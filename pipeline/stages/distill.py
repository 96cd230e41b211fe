"""distill: a student, cut out of its teacher or of a larger student, learns what the teacher says.

The same shape trained from scratch on the same tokens is the baseline; it is measured, not kept. A submodel that is the
teacher itself is taken over, and nothing is learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import StageRun, tree_digest, write_json
from pipeline.distillation.scoring import HeldOut, perplexity

if TYPE_CHECKING:
    from pipeline.distillation.student_text import StudentText


def run(run: StageRun) -> None:
    """Write the student as an ordinary Hugging Face checkpoint."""
    from pipeline.distillation.parallel import join_processes

    if not run.config.submodel.whole:
        _learn(run)
    elif join_processes().index == 0:
        from pipeline.distillation.teachers import read_source
        from pipeline.distillation.whole import take_whole

        taken = take_whole(Path(read_source(run.layout.teacher).path), run.output)
        write_json(run.layout.metrics("distill", run.submodel), taken)


def _learn(run: StageRun) -> None:
    from pipeline.distillation.checkpoints import discard_checkpoint
    from pipeline.distillation.from_config import loss_settings, train_plan
    from pipeline.distillation.long_phase import learn_long_context, require_context
    from pipeline.distillation.objectives import text_objective
    from pipeline.distillation.parallel import join_processes
    from pipeline.distillation.pruning import random_student
    from pipeline.distillation.student_signal import hidden_loss_beside, objective_of, open_source
    from pipeline.distillation.student_start import start_student
    from pipeline.distillation.student_text import prepare_text
    from pipeline.distillation.trainer import train

    config, distill = run.config, run.config.distill
    text = prepare_text(config, run.layout, run.output)
    sequences, held_out = text.sequences(), HeldOut.open(text.folder)
    student, label = start_student(run, text), f"distill {run.submodel}"
    require_context(student, text, distill.context)
    metrics: dict[str, Any] = {"pruned": measure(student, held_out)}
    baseline = random_student(student, shape_of(student.config), config.seed) if distill.from_scratch_baseline else None
    plan = train_plan(config, distill.steps, distill.batch_sequences, distill.learning_rate)
    source, loss = open_source(run, text, student), loss_settings(config)
    with hidden_loss_beside(run, student, source) as hidden:
        metrics["history"] = train(
            student, objective_of(source, loss, hidden), sequences, plan, run.checkpoint / "student", label,
            identity=f"{tree_digest(run.layout.teacher)} {loss}{hidden or ''}",
            prepare=getattr(source, "prepare", None), observe=run.watch(label),
        )  # fmt: skip
    if distill.on_policy_steps:
        metrics["on_policy_history"] = _learn_on_policy(run, student, text)
    if distill.context.changes:
        metrics["long_context"] = learn_long_context(run, student, text, held_out.tokens)
    metrics |= measure(student, held_out) | kept_shares(text, held_out)
    metrics |= {
        "params": sum(parameter.numel() for parameter in student.parameters()),
        "trained_tokens": plan.steps * plan.batch_sequences * distill.sequence_tokens,
    }
    if baseline is not None:
        baseline.to(student.device)
        train(
            baseline, text_objective(distill.chunk_tokens), sequences, plan, run.checkpoint / "baseline",
            f"{label}, from scratch", observe=run.watch(f"{label}, from scratch"),
        )  # fmt: skip
        metrics["from_scratch"] = measure(baseline, held_out)
    if join_processes().index == 0:
        student.save_pretrained(run.output)
        write_json(run.layout.metrics("distill", run.submodel), metrics)
        discard_checkpoint(run.checkpoint)


def measure(model: Any, held_out: HeldOut) -> dict[str, float | None]:
    """Held-out perplexity, bits a byte of the text, and KL to the teacher, of a transformers model."""
    from pipeline.distillation.recording import model_logits

    found = perplexity(model_logits(model, held_out.tokens), held_out.tokens)
    kl = held_out.kl(model_logits(model, held_out.tokens))
    return {
        "perplexity": round(found, 4),
        "bits_per_byte": round(held_out.bits_per_byte(found), 4),
        "kl_to_teacher": None if kl is None else round(kl, 6),
    }


def kept_shares(text: StudentText, held_out: HeldOut) -> dict[str, float | None]:
    """What a vocabulary leaves: of the teacher's held-out draws, and of the training text's tokens."""
    kept, trimming = held_out.kept_share, text.trimming
    shares = {"kept_share": None if kept is None else round(kept, 6)}
    return shares if trimming is None else {**shares, "vocab_coverage": round(trimming.coverage, 6)}


def shape_of(config: Any) -> Any:
    """A model's sizes, as pruning counts them."""
    from pipeline.distillation.pruning import StudentShape

    return StudentShape(
        config.hidden_size, config.intermediate_size, config.num_key_value_heads, config.num_hidden_layers
    )


def _learn_on_policy(run: StageRun, student: Any, text: StudentText) -> Any:
    """The last phase: the student writes, the teacher judges every token (generalised JSD)."""
    from pipeline.distillation.divergences import LossKind
    from pipeline.distillation.from_config import loss_settings, train_plan, uses_bf16
    from pipeline.distillation.objectives import LossSettings
    from pipeline.distillation.on_policy import Sampling, on_policy_objective
    from pipeline.distillation.student_signal import objective_of, open_model
    from pipeline.distillation.teachers import eos_ids
    from pipeline.distillation.trainer import train

    config, distill, label = run.config, run.config.distill, f"distill {run.submodel}, on-policy"
    sampling = Sampling(
        distill.on_policy_ratio, distill.on_policy_prompt_tokens, distill.on_policy_tokens, 1.0,
        tuple(eos_ids(student.config)), config.seed, uses_bf16(config),
    )  # fmt: skip
    loss = loss_settings(config)
    if isinstance(loss, LossSettings):
        loss = LossSettings(LossKind.JSD, beta=distill.beta, chunk_tokens=distill.chunk_tokens)
    return train(
        student, on_policy_objective(objective_of(open_model(run, text, student), loss), sampling), text.sequences(),
        train_plan(config, distill.on_policy_steps, distill.batch_sequences, distill.learning_rate / 10),
        run.checkpoint / "on_policy", label,
        identity=f"{tree_digest(run.layout.teacher)} {sampling} {loss}", observe=run.watch(label),
    )  # fmt: skip
