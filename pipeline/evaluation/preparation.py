"""The exam of one submodel, from its run's held-out text and the user's files; and what its teacher answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.artifacts import StageRun, content_digest, external_lines, located, read_json, write_atomic
from pipeline.data.packing import shuffled_rows
from pipeline.evaluation.documentation_tasks import documentation_tasks, read_documents
from pipeline.evaluation.exam import Exam, sit
from pipeline.evaluation.harness import HarnessTasks
from pipeline.evaluation.questions import Questions, join_questions
from pipeline.evaluation.readers import TorchReader
from pipeline.evaluation.task_files import TaskFile, file_questions, read_task_file, worked_tasks
from pipeline.export.assembly import EXPORT_FILE
from pipeline.settings import RuntimeConfig


def make_exam(run: StageRun) -> Exam:
    """Everything that is asked of a submodel, in its own tokens.

    Raises:
        UserError: A task file is no such file, or the tokenizer has too few words for needles.
    """
    layout, runtime, name = run.layout, run.config.runtime, run.submodel
    tokenizer = Tokenizer.from_file(str(layout.tokenizer(name) / "tokenizer.json"))
    exported, length = read_json(layout.exports(name) / EXPORT_FILE), run.config.export.context_tokens
    start_id = exported["eos"][0] if exported["bos"] is None else exported["bos"]
    documents = read_documents(
        tokenizer, shuffled_rows(layout.corpus / "held_out.jsonl", run.config.seed), start_id=start_id,
        most_tokens=runtime.task_tokens, sequence_tokens=min(length, run.config.distill.sequence_tokens),
    )  # fmt: skip
    made = documentation_tasks(
        runtime.tasks, documents, tokenizer, train=np.load(layout.sequences(name) / "train.npy", mmap_mode="r"),
        sequence_tokens=length, seed=run.config.seed,
    )  # fmt: skip
    exam = _file_exam(task_files(runtime), tokenizer, start_id, tuple(exported["eos"]), length, runtime)
    return replace(exam, questions=join_questions(made, exam.questions))


def task_files(runtime: RuntimeConfig) -> list[TaskFile]:
    """The user's tasks, checked.

    Raises:
        UserError: A file or one of its lines is wrong.
    """
    return [read_task_file(located(path)) for path in runtime.task_files]


def teacher_answers(run: StageRun, exam: Exam) -> Mapping[str, NDArray[np.bool_]]:
    """What the teacher has right (N,), by task: where its ids are the submodel's of all tasks, else of the files alone.

    It answers once for all submodels; what it said is kept outside the stages' outputs.
    """
    layout = run.layout
    if layout.sequences(run.submodel) != layout.targets:
        files = task_files(run.config.runtime)
        tokenizer = Tokenizer.from_file(str(layout.teacher / "tokenizer.json"))
        start_id, ends = _teacher_ids(run)
        exam = _file_exam(files, tokenizer, start_id, ends, run.config.export.context_tokens, run.config.runtime)
    if not exam.questions.tasks and not exam.worked and exam.harness is None:
        return {}
    digests = [content_digest(layout, path) for path in (layout.teacher, layout.targets)]
    path = layout.root / ".cache" / "answers" / f"{_digest(exam, digests)}.npz"
    if not path.is_file():
        _ask_teacher(run, exam, path)
    with np.load(path, allow_pickle=False) as kept:
        return {name: kept[name] for name in kept.files}


def _file_exam(
    files: list[TaskFile], tokenizer: Tokenizer, start_id: int, ends: tuple[int, ...], length: int,
    runtime: RuntimeConfig,
) -> Exam:  # fmt: skip
    questions = file_questions(files, tokenizer, start_id=start_id, most_tokens=length)
    room = max(1, length - runtime.answer_tokens)
    worked = worked_tasks(files, tokenizer, start_id=start_id, most_tokens=room)
    harness = None
    if runtime.harness_tasks:
        folder = None if runtime.harness_path is None else located(runtime.harness_path)
        harness = HarnessTasks(tuple(runtime.harness_tasks), folder, start_id, ends, length)
    return Exam(questions, worked, tokenizer, ends, runtime.answer_tokens, harness)


def _teacher_ids(run: StageRun) -> tuple[int, tuple[int, ...]]:
    """(the token before every text, those that end one)."""
    from pipeline.distillation.checkpoint_files import read_config
    from pipeline.distillation.teachers import eos_ids, read_source

    config = read_config(Path(read_source(run.layout.teacher).path))
    ends = tuple(eos_ids(config))
    return (config.bos_token_id if isinstance(config.bos_token_id, int) else ends[0]), ends


def _ask_teacher(run: StageRun, exam: Exam, path: Path) -> None:
    from pipeline.distillation.from_config import uses_bf16
    from pipeline.distillation.teachers import load_checkpoint, read_source

    teacher = load_checkpoint(read_source(run.layout.teacher))
    answers = sit(exam, TorchReader(teacher, bf16=uses_bf16(run.config)))
    content = BytesIO()
    correct: dict[str, Any] = {name: answer.correct for name, answer in answers.items()}
    np.savez(content, allow_pickle=False, **correct)
    write_atomic(path, content.getvalue())


def _digest(exam: Exam, digests: list[str]) -> str:
    """Of everything that the teacher's answers depend on."""
    files = external_lines(None if exam.harness is None else exam.harness.folder)
    settings = (exam.ends, exam.answer_tokens, exam.harness, files)
    digest = hashlib.sha256(" ".join([*digests, repr(settings)]).encode())
    questions: Questions = exam.questions
    for sequence in questions.sequences:
        digest.update(sequence.tobytes() + b"|")
    for task in questions.tasks:
        digest.update(f"{task.name} {task.exact}".encode())
        for array in (task.answers, task.first_choice, task.sequence, task.position, task.token):
            digest.update(array.tobytes() + b"|")
    for worked in exam.worked:
        digest.update(repr((worked.name, worked.answers, worked.patterns)).encode())
        for prompt in worked.prompts:
            digest.update(prompt.tobytes() + b"|")
    return digest.hexdigest()[:32]
