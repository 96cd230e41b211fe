"""teacher: a checkpoint that later stages can load, with its tokenizer."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
from pipeline.settings_training import CheckpointTeacher, FromScratchTeacher

if TYPE_CHECKING:
    from pipeline.data.packing import Packed
    from pipeline.distillation.correction import LoraSettings

_HELD_OUT_SEQUENCES = 64


def run(run: StageRun) -> None:
    """Write tokenizer.json, teacher.json and, for a teacher that is trained here, the checkpoint."""
    teacher = run.config.teacher
    if isinstance(teacher, FromScratchTeacher):
        _train(run, teacher)
    elif teacher.correction_steps:
        _correct(run, teacher)
    else:
        _refer(run, teacher)


def _refer(run: StageRun, teacher: CheckpointTeacher) -> None:
    path = resolve_checkpoint(teacher)
    save_tokenizer(path, run.output)
    source = write_source(run.output, path, teacher)
    write_json(run.layout.metrics("teacher"), {"origin": source.origin})


def _correct(run: StageRun, teacher: CheckpointTeacher) -> None:
    """The checkpoint fine-tuned on the cleaned text becomes this stage's own, in the type that it was loaded in."""
    from pipeline.distillation.batches import Sequences
    from pipeline.distillation.checkpoint_files import copy_tokenizer
    from pipeline.distillation.checkpoints import discard_checkpoint
    from pipeline.distillation.correction import correct_teacher
    from pipeline.distillation.from_config import train_plan
    from pipeline.distillation.parallel import join_processes, wait_for_all
    from pipeline.distillation.teachers import load_checkpoint, source_of

    config, path, processes = run.config, resolve_checkpoint(teacher), join_processes()
    if processes.index == 0:
        copy_tokenizer(path, run.output)
        save_tokenizer(path, run.output)
    wait_for_all(processes)
    source = source_of(path, teacher)
    model = load_checkpoint(source)
    plan = train_plan(
        config, teacher.correction_steps, teacher.correction_batch_sequences, teacher.correction_learning_rate
    )
    packed = _packed(run, model.config, "train", plan.steps * plan.batch_sequences)
    held_out = _packed(run, model.config, "held_out", _HELD_OUT_SEQUENCES).tokens
    before = _perplexity(model, held_out)
    loaded_as = model.dtype
    model, history = correct_teacher(
        model, Sequences(packed.tokens, packed.counts), plan, run.checkpoint,
        lora=_adapter(teacher, config.seed), chunk_tokens=config.distill.chunk_tokens,
        observe=run.watch("teacher correction"),
    )  # fmt: skip
    for parameter in model.parameters():  # only these: angles of the rotary embedding stay fp32, as when loaded
        parameter.data = parameter.data.to(loaded_as)
    metrics = {
        "origin": f"{source.origin}, corrected",
        "held_out_perplexity": {"before": before, "after": _perplexity(model, held_out)},
        "corpus_tokens": packed.tokens.size,
        "trained_tokens": plan.steps * plan.batch_sequences * config.distill.sequence_tokens,
        "history": history,
    }
    if processes.index == 0:
        model.save_pretrained(run.output)
        write_json(run.output / "teacher.json", asdict(replace(source, path=".", origin=str(metrics["origin"]))))
        write_json(run.layout.metrics("teacher"), metrics)
        discard_checkpoint(run.checkpoint)


def _packed(run: StageRun, model_config: Any, side: str, most: int) -> Packed:
    """The cleaned text in the words of the tokenizer in the output; of conversations the answers count."""
    from tokenizers import Tokenizer

    from pipeline.distillation.teachers import eos_ids

    template = run.output / "chat_template.jinja"
    return pack_rows(
        Tokenizer.from_file(str(run.output / "tokenizer.json")),
        shuffled_rows(run.layout.corpus / f"{side}.jsonl", run.config.seed),
        template=template.read_text(encoding="utf-8") if template.exists() else None,
        eos_id=eos_ids(model_config)[0],
        bos_id=model_config.bos_token_id,
        sequence_tokens=run.config.distill.sequence_tokens,
        max_sequences=most,
    )


def _perplexity(model: Any, sequences: NDArray[np.int32]) -> float:
    from pipeline.distillation.recording import model_logits
    from pipeline.distillation.scoring import perplexity

    return round(perplexity(model_logits(model, sequences), sequences), 4)


def _adapter(teacher: CheckpointTeacher, seed: int) -> LoraSettings | None:
    from pipeline.distillation.correction import PROJECTIONS, LoraSettings

    rank = teacher.correction_rank
    return None if rank is None else LoraSettings(rank, 2 * rank, PROJECTIONS, seed=seed)


def _train(run: StageRun, teacher: FromScratchTeacher) -> None:
    from pipeline.distillation.batches import Sequences
    from pipeline.distillation.checkpoints import discard_checkpoint
    from pipeline.distillation.from_config import train_plan, training_device
    from pipeline.distillation.objectives import text_objective
    from pipeline.distillation.parallel import join_processes
    from pipeline.distillation.trainer import train

    config, corpus = run.config, run.layout.corpus / "train.jsonl"
    tokenizer = train_tokenizer(map(row_text, shuffled_rows(corpus, config.seed)), teacher.vocab_size)
    model = build_teacher(teacher, config.seed).to(training_device())
    packed = pack_rows(
        tokenizer, shuffled_rows(corpus, config.seed), template=QUESTION_TEMPLATE, eos_id=model.config.eos_token_id,
        sequence_tokens=config.distill.sequence_tokens, max_sequences=None,
    )  # fmt: skip
    plan = train_plan(config, teacher.steps, teacher.batch_sequences, teacher.learning_rate)
    sequences = Sequences(packed.tokens, packed.counts)
    history = train(
        model, text_objective(config.distill.chunk_tokens), sequences, plan, run.checkpoint, "teacher",
        observe=run.watch("teacher"),
    )  # fmt: skip
    if join_processes().index:
        return
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
