"""What a student learns from: stored draws, or a model beside it, in the student's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import StageRun
from pipeline.distillation.aligned_signal import AlignedLoss, AlignedSource, TextTokens, aligned_objective
from pipeline.distillation.fast_layers import hasten_teacher
from pipeline.distillation.from_config import training_device, uses_bf16
from pipeline.distillation.hidden_losses import HiddenTerm, hidden_term, projected
from pipeline.distillation.objectives import LossSettings, Objective, signal_objective
from pipeline.distillation.remapped_signals import TrimmedOnlineSource, TrimmedStoredSource
from pipeline.distillation.signals import OnlineSource, SignalSource, StoredSource
from pipeline.distillation.stored_targets import StoredTargets
from pipeline.distillation.student_start import load_float32
from pipeline.distillation.student_text import StudentText, read_sequences
from pipeline.distillation.teachers import eos_ids, load_checkpoint, read_source

Source = SignalSource | AlignedSource


def open_source(run: StageRun, text: StudentText, student: Any) -> Source:
    """Stored draws of the teacher, or a model that runs beside the student.

    Raises:
        UserError: Shards are missing or damaged, or the model cannot be loaded.
    """
    if run.config.distill.signal == "stored" and run.config.submodel.learns_from == "teacher":
        stored = StoredTargets.open(run.layout.targets / "train")
        if text.trimming is None:
            return StoredSource(stored)
        return TrimmedStoredSource(stored, text.trimming.first_pieces, text.trimming.source)
    return open_model(run, text, student)


def open_model(run: StageRun, text: StudentText, student: Any) -> Source:
    """The model that ``submodel.learns_from`` names, beside the student."""
    name = run.config.submodel.learns_from
    if name == "teacher":
        model = load_checkpoint(read_source(run.layout.teacher))
    else:
        model = load_float32(run.layout.student(name)).to(training_device())
    source = _opened(run, text, student, model)
    # Other tokenizers give sequences of another length each time; compiled layers are compiled for each.
    hasten_teacher(model, run.config.distill.compile and run.config.distill.loss != "aligned")
    return source


def objective_of(source: Source, loss: LossSettings | AlignedLoss, hidden: HiddenTerm | None = None) -> Objective:
    """Over ids, or over words where vocabularies differ."""
    if isinstance(source, AlignedSource) and isinstance(loss, AlignedLoss):
        return aligned_objective(source, loss)
    if isinstance(source, AlignedSource) or isinstance(loss, AlignedLoss):
        raise ValueError("an aligned source and an aligned loss go together")
    return signal_objective(source, loss, hidden)


@contextmanager
def hidden_loss_beside(run: StageRun, student: Any, source: Source) -> Iterator[HiddenTerm | None]:
    """The hidden-state loss beside the other, with what it adds to the student meanwhile; None without one."""
    weight, pairs = run.config.distill.hidden_weight, run.config.distill.hidden_layers
    if not weight:
        yield None
        return
    if not isinstance(source, OnlineSource):
        raise UserError("distill.hidden_weight", weight, "0 where no teacher runs beside the student on its own tokens")
    term = hidden_term(student, source.teacher, weight, pairs)
    with projected(student, term, run.config.seed):
        yield term


def _opened(run: StageRun, text: StudentText, student: Any, model: Any) -> Source:
    """What the model beside the student says, in the student's vocabulary."""
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

    mine, theirs = (
        TextTokens(
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            eos_ids(model.config)[0],
            len(model.get_output_embeddings().weight),
        )
        for model, folder in ((student, student_tokenizer), (teacher, teacher_tokenizer))
    )
    return AlignedSource.open(teacher, mine, theirs, bf16)
