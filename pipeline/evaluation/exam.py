"""Everything that a submodel is asked, and what the answers say: the student in fp, its files, its teacher.

The result is what ``reports/family.json`` holds under ``recovery``, and why a gate refuses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.evaluation.questions import Answers, Numbers, Questions, Task, answer
from pipeline.evaluation.readers import Reader, Writer
from pipeline.evaluation.recovery import Bounds, Recovery, compare
from pipeline.evaluation.task_files import WorkedTask, work

Answered = Mapping[str, Answers]
_EXAMPLES_A_TASK = 3
_PROMPT_CHARACTERS = 120
PASSED, FAILED, NOT_DECIDABLE = "passed", "failed", "not decidable"


@dataclass(frozen=True, slots=True)
class Exam:
    """What is asked.

    Attributes:
        questions: Answered by reading.
        worked: Answered by writing.
        tokenizer: Of both.
        ends: Tokens that end an answer.
        answer_tokens: Length of a worked answer at most.
    """

    questions: Questions
    worked: tuple[WorkedTask, ...]
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a comparison needs of a task: its name, chance (0..1), and the document (N,) of each item."""

    name: str
    chance: float
    clusters: Numbers


def sit(exam: Exam, reader: Reader) -> dict[str, Answers]:
    """Ask one model everything; one that cannot write is not asked for worked answers."""
    answers = answer(exam.questions, reader.rows(exam.questions.sequences))
    if isinstance(reader, Writer):
        for task in exam.worked:
            answers[task.name] = work(task, reader, exam.tokenizer, most_tokens=exam.answer_tokens, ends=exam.ends)
    return answers


def _subjects(exam: Exam) -> list[_Subject]:
    read = [_Subject(task.name, task.chance, task.clusters) for task in exam.questions.tasks]
    written = [
        _Subject(task.name, Counter(task.answers).most_common(1)[0][1] / len(task.answers), task.clusters)
        for task in exam.worked
    ]
    return read + written


def recovery_table(
    exam: Exam, fp: Answered, teacher: Mapping[str, NDArray[np.bool_]], found: Mapping[str, Answered],
    bounds: Bounds, recovery_min: float,
) -> dict[str, Any]:  # fmt: skip
    """By task: items, accuracies, and for each container what it kept of the student's and of the teacher's.

    Args:
        exam: The tasks.
        fp: The student's answers before 4 bits.
        teacher: What the teacher has right, of the tasks that it was asked.
        found: The answers of each container.
        bounds: When a task counts.
        recovery_min: What the interval's lower end must reach.
    """
    table = {}
    for subject in (subject for subject in _subjects(exam) if len(subject.clusters) and subject.name in fp):
        containers = {}
        for container, answers in found.items():
            if (given := answers.get(subject.name)) is None:
                continue
            to_fp = _compare(subject, fp[subject.name].correct, given, bounds)
            of_teacher = teacher.get(subject.name)
            containers[container] = {
                **to_fp.to_dict(),
                "verdict": _verdict(to_fp, recovery_min),
                "to_teacher": None if of_teacher is None else _compare(subject, of_teacher, given, bounds).to_dict(),
            }
        table[subject.name] = {
            "items": len(subject.clusters),
            "documents": len(set(subject.clusters.tolist())),
            "chance": round(subject.chance, 6),
            "accuracy_fp": round(float(fp[subject.name].correct.mean()), 6),
            "accuracy_teacher": round(float(teacher[subject.name].mean()), 6) if subject.name in teacher else None,
            "containers": containers,
        }
    return table


def recovery_reasons(table: Mapping[str, Any], containers: Sequence[str], recovery_min: float) -> list[str]:
    """Why a gate refuses: a lower end below the bound, or a container of which no task decides."""
    reasons = []
    for container in containers:
        entries = {name: task["containers"].get(container) for name, task in table.items()}
        entries = {name: entry for name, entry in entries.items() if entry is not None}
        if all(entry["verdict"] == NOT_DECIDABLE for entry in entries.values()):
            reasons.append(f"{container}: no task decides how much is kept: too few items, or fp too close to chance")
        for name, entry in entries.items():
            if entry["verdict"] == FAILED:
                reasons.append(
                    f"{container}: {name} keeps {_percent(entry['recovery'])}, at least {_percent(entry['low'])};"
                    f" {_percent(recovery_min)} is needed"
                )
    return reasons


def flips(exam: Exam, fp: Answered, found: Answered) -> list[dict[str, Any]]:
    """Examples of items that one of two models has right, evenly spread over each task."""
    examples = []
    tasks: tuple[Task | WorkedTask, ...] = (*exam.questions.tasks, *exam.worked)
    for task in tasks:
        one, other = fp.get(task.name), found.get(task.name)
        if one is None or other is None:
            continue
        changed = np.flatnonzero(one.correct != other.correct)
        for place in np.linspace(0, len(changed) - 1, min(_EXAMPLES_A_TASK, len(changed))).astype(int).tolist():
            item = int(changed[place])
            prompt, right, said, now = _shown(exam, task, item, one, other)
            examples.append(
                {"task": task.name, "prompt": prompt[-_PROMPT_CHARACTERS:], "answer": right, "fp": said, "found": now}
            )
    return examples


def _compare(subject: _Subject, reference: NDArray[np.bool_], found: Answers, bounds: Bounds) -> Recovery:
    return compare(reference, found.correct, subject.clusters, subject.chance, bounds)


def _verdict(recovery: Recovery, recovery_min: float) -> str:
    if not recovery.decidable or recovery.low is None:
        return NOT_DECIDABLE
    return PASSED if recovery.low >= recovery_min else FAILED


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _shown(exam: Exam, task: Task | WorkedTask, item: int, one: Answers, other: Answers) -> tuple[str, ...]:
    """Prompt, right answer, and what both said, as texts."""

    def text(ids: Any) -> str:
        return str(exam.tokenizer.decode([int(token) for token in ids], skip_special_tokens=False))

    if isinstance(task, WorkedTask):
        return text(task.prompts[item][1:]), task.answers[item], one.texts[item], other.texts[item]
    choices = list(_choices(task, item))
    sequence, position, right = choices[int(task.answers[item])]
    prompt = text(exam.questions.sequences[sequence][1 : position + 1])
    said = []
    for answers in (one, other):
        choice = int(answers.said[item])
        if task.exact:  # the token where it left the right answer
            said.append(text(right) if choice < 0 else text([choice]))
        else:
            said.append(text(choices[choice][2]))
    return prompt, text(right), said[0], said[1]


def _choices(task: Task, item: int) -> Iterator[tuple[int, int, Numbers]]:
    """(sequence, first position, tokens) of each choice."""
    first, end = task.first_choice[item : item + 2].tolist()
    for choice in range(first, end):
        begin, stop = np.searchsorted(task.choice, [choice, choice + 1]).tolist()
        yield int(task.sequence[begin]), int(task.position[begin]), task.token[begin:stop]
