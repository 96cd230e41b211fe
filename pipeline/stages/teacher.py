"""teacher: a checkpoint that later stages can load, with its tokenizer."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.artifacts import StageRun, write_json
from pipeline.data.packing import pack_sequences, read_texts, shuffle_texts, train_tokenizer
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
    from pipeline.distillation.losses import next_token_loss
    from pipeline.distillation.trainer import discard_checkpoint, train, train_plan

    config = run.config
    texts = shuffle_texts(list(read_texts(run.layout.corpus / "train.jsonl")), config.seed)
    tokenizer = train_tokenizer(texts, teacher.vocab_size)
    model = build_teacher(teacher, config.seed)
    sequences = pack_sequences(tokenizer, texts, model.config.eos_token_id, config.distill.sequence_tokens)
    plan = train_plan(config, teacher.steps, teacher.batch_sequences, teacher.learning_rate)
    history = train(
        model, sequences, lambda logits, _rows, tokens: next_token_loss(logits, tokens), plan, run.checkpoint, "teacher"
    )
    model.save_pretrained(run.output)
    tokenizer.save(str(run.output / "tokenizer.json"))
    (run.output / "chat_template.jinja").write_text(QUESTION_TEMPLATE, encoding="utf-8")
    write_json(run.output / "teacher.json", asdict(TeacherSource(".", "fp32", None, "trained from scratch")))
    metrics = {
        "origin": "trained from scratch",
        "corpus_tokens": sequences.size,
        "trained_tokens": teacher.steps * teacher.batch_sequences * config.distill.sequence_tokens,
        "history": history,
    }
    write_json(run.layout.metrics("teacher"), metrics)
    discard_checkpoint(run.checkpoint)
