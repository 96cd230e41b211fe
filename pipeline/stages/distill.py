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
from pipeline.distillation.scoring import HeldOut, perplexity

if TYPE_CHECKING:
    from pipeline.distillation.aligned_signal import AlignedLoss, AlignedSource
    from pipeline.distillation.hidden_losses import HiddenTerm
    from pipeline.distillation.objectives import LossSettings, Objective
    from pipeline.distillation.signals import SignalSource
    from pipeline.distillation.student_text import StudentText

_IMPORTANCE_BATCH = 4


def run(run: StageRun) -> None:
    """Write the student as an ordinary Hugging Face checkpoint."""
    from pipeline.distillation.from_config import loss_settings, train_plan
    from pipeline.distillation.objectives import text_objective
    from pipeline.distillation.parallel import join_processes
    from pipeline.distillation.pruning import random_student
    from pipeline.distillation.student_text import prepare_text
    from pipeline.distillation.trainer import discard_checkpoint, train

    config, distill = run.config, run.config.distill
    text = prepare_text(config, run.layout, run.output)
    sequences, held_out = text.sequences(), HeldOut.open(text.folder)
    student, label = _initial_student(run, text), f"distill {run.submodel}"
    metrics: dict[str, Any] = {"pruned": measure(student, held_out)}
    baseline = random_student(student, shape_of(student.config), config.seed) if distill.from_scratch_baseline else None
    plan = train_plan(config, distill.steps, distill.batch_sequences, distill.learning_rate)
    source, loss = _signal_source(run, text, student), loss_settings(config)
    with _hidden_term(run, student, source) as hidden:
        metrics["history"] = train(
            student, _objective(source, loss, hidden), sequences, plan, run.checkpoint / "student", label,
            identity=f"{tree_digest(run.layout.teacher)} {loss}{hidden or ''}",
            prepare=getattr(source, "prepare", None),
        )  # fmt: skip
    if distill.on_policy_steps:
        metrics["on_policy_history"] = _learn_on_policy(run, student, text)
    metrics |= measure(student, held_out) | kept_shares(text, held_out)
    metrics |= {
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


def _initial_student(run: StageRun, text: StudentText) -> Any:
    """The student before training, on the device that trains it."""
    from pipeline.distillation.from_config import training_device

    checkpoint = run.config.submodel.checkpoint
    student = _cut(run, text) if checkpoint is None else _take(run, located(checkpoint), text)
    return student.to(training_device())


def _take(run: StageRun, checkpoint: Path, text: StudentText) -> Any:
    """An existing small checkpoint, with the teacher's tokenizer (whole or trimmed) or its own."""
    from pipeline.distillation.initial_student import inspect_student, keep_rows, load_initial_student
    from pipeline.distillation.teachers import read_source

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
        importance = _measured(run, cut)
    pruned, processes = run.checkpoint / "pruned", join_processes()
    trimming = text.trimming if submodel.trims else None  # one that is inherited is done already
    if processes.index == 0:
        vocabulary = None if trimming is None else trimming.vocabulary
        prune_checkpoint(cut, pruned, importance, shape, vocabulary=vocabulary)
    wait_for_all(processes)
    return _load(pruned)


def _measured(run: StageRun, cut: Path) -> Any:
    """Importance within a student: what matters is no longer what mattered in the teacher."""
    import torch

    from pipeline.distillation.from_config import training_device
    from pipeline.distillation.importance import measure_importance
    from pipeline.distillation.student_text import read_sequences

    sequences = read_sequences(run.layout.sequences(run.config.submodel.cut_from))
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


def _signal_source(run: StageRun, text: StudentText, student: Any) -> SignalSource | AlignedSource:
    """Stored draws of the teacher, or a model that runs beside the student."""
    from pipeline.distillation.remapped_signals import TrimmedStoredSource
    from pipeline.distillation.signals import StoredSource
    from pipeline.distillation.stored_targets import StoredTargets

    if run.config.distill.signal == "stored" and run.config.submodel.learns_from == "teacher":
        stored = StoredTargets.open(run.layout.targets / "train")
        if text.trimming is None:
            return StoredSource(stored)
        return TrimmedStoredSource(stored, text.trimming.first_pieces, text.trimming.source)
    return _online(run, text, student)


@contextmanager
def _hidden_term(run: StageRun, student: Any, source: SignalSource | AlignedSource) -> Iterator[HiddenTerm | None]:
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


def _online(run: StageRun, text: StudentText, student: Any) -> SignalSource | AlignedSource:
    from pipeline.distillation.fast_layers import hasten_teacher
    from pipeline.distillation.from_config import training_device
    from pipeline.distillation.teachers import load_checkpoint, read_source

    name = run.config.submodel.learns_from
    if name == "teacher":
        model = load_checkpoint(read_source(run.layout.teacher))
    else:
        model = _load(run.layout.student(name)).to(training_device())
    source = _opened(run, text, student, model)
    # Other tokenizers give sequences of another length each time; compiled layers are compiled for each.
    hasten_teacher(model, run.config.distill.compile and run.config.distill.loss != "aligned")
    return source


def _opened(run: StageRun, text: StudentText, student: Any, model: Any) -> SignalSource | AlignedSource:
    """What the model beside the student says, in the student's vocabulary."""
    from pipeline.distillation.from_config import uses_bf16
    from pipeline.distillation.remapped_signals import TrimmedOnlineSource
    from pipeline.distillation.signals import OnlineSource
    from pipeline.distillation.student_text import read_sequences

    layout, name, bf16 = run.layout, run.config.submodel.learns_from, uses_bf16(run.config)
    if run.config.distill.loss == "aligned":
        tokenizer = layout.teacher if name == "teacher" else layout.tokenizer(name)
        return _aligned(student, text.tokenizer, model, tokenizer, bf16)
    has_all_tokens = name == "teacher" or layout.sequences(name) == layout.targets
    if text.trimming is None or not has_all_tokens:  # both have all, or the same ones
        return OnlineSource.open(model, bf16)
    kept_ids, tokens = text.trimming.vocabulary.kept_ids, read_sequences(layout.targets).tokens
    return TrimmedOnlineSource.open(model, kept_ids, tokens, text.trimming.source, bf16)


def _aligned(student: Any, student_tokenizer: Path, teacher: Any, teacher_tokenizer: Path, bf16: bool) -> AlignedSource:
    from tokenizers import Tokenizer

    from pipeline.distillation.aligned_signal import AlignedSource, TextTokens
    from pipeline.distillation.teachers import eos_ids

    mine, theirs = (
        TextTokens(
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            eos_ids(model.config)[0],
            len(model.get_output_embeddings().weight),
        )
        for model, folder in ((student, student_tokenizer), (teacher, teacher_tokenizer))
    )
    return AlignedSource.open(teacher, mine, theirs, bf16)


def _objective(
    source: SignalSource | AlignedSource, loss: LossSettings | AlignedLoss, hidden: HiddenTerm | None = None
) -> Objective:
    """Over ids, or over words where vocabularies differ."""
    from pipeline.distillation.aligned_signal import AlignedLoss, AlignedSource, aligned_objective
    from pipeline.distillation.objectives import signal_objective

    if isinstance(source, AlignedSource) and isinstance(loss, AlignedLoss):
        return aligned_objective(source, loss)
    return signal_objective(source, loss, hidden)  # type: ignore[arg-type]


def _learn_on_policy(run: StageRun, student: Any, text: StudentText) -> Any:
    """The last phase: the student writes, the teacher judges every token (generalised JSD)."""
    from pipeline.distillation.divergences import LossKind
    from pipeline.distillation.from_config import loss_settings, train_plan, uses_bf16
    from pipeline.distillation.objectives import LossSettings
    from pipeline.distillation.on_policy import Sampling, on_policy_objective
    from pipeline.distillation.teachers import eos_ids
    from pipeline.distillation.trainer import train

    config, distill = run.config, run.config.distill
    sampling = Sampling(
        distill.on_policy_ratio, distill.on_policy_prompt_tokens, distill.on_policy_tokens, 1.0,
        tuple(eos_ids(student.config)), config.seed, uses_bf16(config),
    )  # fmt: skip
    loss = loss_settings(config)
    if isinstance(loss, LossSettings):
        loss = LossSettings(LossKind.JSD, beta=distill.beta, chunk_tokens=distill.chunk_tokens)
    return train(
        student, on_policy_objective(_objective(_online(run, text, student), loss), sampling), text.sequences(),
        train_plan(config, distill.on_policy_steps, distill.batch_sequences, distill.learning_rate / 10),
        run.checkpoint / "on_policy", f"distill {run.submodel}, on-policy",
        identity=f"{tree_digest(run.layout.teacher)} {sampling} {loss}",
    )  # fmt: skip
