"""teacher: a checkpoint that later stages can load, with its tokenizer."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.artifacts import StageRun, write_json
from pipeline.data.packing import pack_rows, row_text, shuffled_rows, train_tokenizer
from pipeline.distillation.teachers import (
    QUESTION_TEMPLATE,
    TeacherSource,
    build_teacher,
    resolve_checkpoint,
    save_tokenizer,
    write_source,
)
from pipeline.settings import CheckpointTeacher, FromScratchTeacher


def run(run: StageRun) -> None:
    """Write tokenizer.json, teacher.json and, for a teacher trained here, the checkpoint."""
    if isinstance(run.config.teacher, FromScratchTeacher):
        _train(run, run.config.teacher)
    else:
        _refer(run, run.config.teacher)


def _refer(run: StageRun, teacher: CheckpointTeacher) -> None:
    path = resolve_checkpoint(teacher)
    save_tokenizer(path, run.output)
    source = write_source(run.output, path, teacher)
    write_json(run.layout.metrics("teacher"), {"origin": source.origin})


def _train(run: StageRun, teacher: FromScratchTeacher) -> None:
    from pipeline.distillation.batches import Sequences
    from pipeline.distillation.from_config import train_plan, training_device
    from pipeline.distillation.objectives import text_objective
    from pipeline.distillation.trainer import discard_checkpoint, train

    config, corpus = run.config, run.layout.corpus / "train.jsonl"
    tokenizer = train_tokenizer(map(row_text, shuffled_rows(corpus, config.seed)), teacher.vocab_size)
    model = build_teacher(teacher, config.seed).to(training_device())
    packed = pack_rows(
        tokenizer, shuffled_rows(corpus, config.seed), template=QUESTION_TEMPLATE, eos_id=model.config.eos_token_id,
        sequence_tokens=config.distill.sequence_tokens, max_sequences=None,
    )  # fmt: skip
    plan = train_plan(config, teacher.steps, teacher.batch_sequences, teacher.learning_rate)
    sequences = Sequences(packed.tokens, packed.counts)
    history = train(model, text_objective(config.distill.chunk_tokens), sequences, plan, run.checkpoint, "teacher")
    model.save_pretrained(run.output)
    tokenizer.save(str(run.output / "tokenizer.json"))
    (run.output / "chat_template.jinja").write_text(QUESTION_TEMPLATE, encoding="utf-8")
    write_json(run.output / "teacher.json", asdict(TeacherSource(".", "fp32", None, "trained from scratch")))
    metrics = {
        "origin": "trained from scratch",
        "corpus_tokens": packed.tokens.size,
        "trained_tokens": teacher.steps * teacher.batch_sequences * config.distill.sequence_tokens,
        "history": history,
    }
    write_json(run.layout.metrics("teacher"), metrics)
    discard_checkpoint(run.checkpoint)
