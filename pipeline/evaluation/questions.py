"""What is asked of a model: items of several tasks over shared sequences, and what its logits answer.

Every item is a set of choices, every choice a set of tokens at positions of sequences, so that one teacher-forced pass
over the sequences answers all tasks. A choice of several tokens scores the sum of their log-probabilities (as the
``acc`` of lm-evaluation-harness does). An item that must be written exactly has one choice: greedy decoding writes it
if and only if each of its tokens is the most likely one after those before it, which teacher forcing shows without
writing anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Numbers = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens that stand, or might stand, in a sequence: ``tokens[i]`` is predicted at ``position + i``."""

    sequence: int
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        cluster: Where it comes from; items of one document are not independent.
        choices: One probe a choice; of an item that must be written exactly just the answer.
        answer: Index of the right choice.
    """

    cluster: str
    choices: tuple[Probe, ...]
    answer: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """Items of one kind.

    Attributes:
        name: For tables.
        exact: Whether the answer must be written exactly, rather than chosen.
        chance: Accuracy of answering without reading: one over the number of choices in the mean; of exact answers the
            share of the commonest one.
        clusters: (N,) number of each item's document.
        answers: (N,) index of the right choice.
        first_choice: (N + 1,) where an item's choices begin, and the end.
        sequence: (P,) of each token that is looked at, grouped by choice.
        position: (P,) where it is predicted.
        token: (P,) its id.
        choice: (P,) the choice it belongs to, growing.
    """

    name: str
    exact: bool
    chance: float
    clusters: Numbers
    answers: Numbers
    first_choice: Numbers
    sequence: Numbers
    position: Numbers
    token: Numbers
    choice: Numbers

    @property
    def items(self) -> int:
        """How many."""
        return len(self.answers)


@dataclass(frozen=True, slots=True)
class Questions:
    """Sequences that are read once, and the tasks that look at them."""

    sequences: tuple[Ids, ...]
    tasks: tuple[Task, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True, slots=True)
class Answers:
    """What one model answered in one task.

    Attributes:
        correct: (N,) bool.
        said: (N,) the choice that was taken; of an exact item, the first token that the model would have written
            otherwise, or -1 where all were right.
        texts: (N,) what was said where answers are written.
        chance: Of a task whose items are somebody else's; None of our own, which know theirs.
    """

    correct: NDArray[np.bool_]
    said: Numbers
    texts: tuple[str, ...] = ()
    chance: float | None = None


def make_task(name: str, items: Sequence[Item], *, exact: bool) -> Task:
    """Items as arrays."""
    probes = [probe for item in items for probe in item.choices]
    lengths = np.array([len(probe.tokens) for probe in probes], np.int64)
    ends = np.cumsum([0, *(len(item.choices) for item in items)])
    offsets = np.concatenate([np.arange(length) for length in lengths]) if len(probes) else np.empty(0, np.int64)
    names = {name: number for number, name in enumerate(dict.fromkeys(item.cluster for item in items))}
    return Task(
        name, exact, _chance(items, exact),
        clusters=np.array([names[item.cluster] for item in items], np.int64),
        answers=np.array([item.answer for item in items], np.int64),
        first_choice=ends.astype(np.int64),
        sequence=np.repeat(np.array([probe.sequence for probe in probes], np.int64), lengths),
        position=np.repeat(np.array([probe.position for probe in probes], np.int64), lengths) + offsets,
        token=np.array([token for probe in probes for token in probe.tokens], np.int64),
        choice=np.repeat(np.arange(len(probes)), lengths),
    )  # fmt: skip


def join_questions(one: Questions, other: Questions) -> Questions:
    """The sequences and tasks of both."""
    before = len(one.sequences)
    moved = [replace(task, sequence=task.sequence + before) for task in other.tasks]
    return Questions((*one.sequences, *other.sequences), (*one.tasks, *moved))


def answer(questions: Questions, rows: Iterable[tuple[int, FloatArray]]) -> dict[str, Answers]:
    """What a model answers.

    Args:
        questions: Of all tasks.
        rows: (sequence, its (T, V) logits), each sequence once, in any order; one is held at a time.

    Raises:
        ValueError: A sequence is missing.
    """
    if not questions.tasks:
        return {}
    log_p, most_likely = token_marks(questions, rows)
    ends = np.cumsum([0, *(len(task.token) for task in questions.tasks)]).tolist()
    parts = zip(questions.tasks, pairwise(ends), strict=True)
    return {task.name: _answers(task, log_p[a:b], most_likely[a:b]) for task, (a, b) in parts}


def token_marks(questions: Questions, rows: Iterable[tuple[int, FloatArray]]) -> tuple[NDArray[np.float64], Numbers]:
    """(log-probability, most likely token) at each token that is looked at, (P,) of all tasks in order.

    Raises:
        ValueError: A sequence is missing.
    """
    at = _Lookup.of(questions)
    log_p, most_likely = np.full(len(at.token), np.nan), np.zeros(len(at.token), np.int64)
    for sequence, logits in rows:
        chosen = at.order[at.bounds[sequence] : at.bounds[sequence + 1]]
        if not len(chosen):
            continue
        positions, back = np.unique(at.position[chosen], return_inverse=True)
        found = logits[positions]
        largest = found.argmax(axis=1)
        top = found[np.arange(len(found)), largest]
        total = np.exp(found - top[:, None]).sum(axis=1)
        log_p[chosen] = found[back, at.token[chosen]] - (top + np.log(total))[back]
        most_likely[chosen] = largest[back]
    if np.isnan(log_p).any():
        raise ValueError("logits of a sequence are missing or not finite")
    return log_p, most_likely


@dataclass(frozen=True, slots=True)
class _Lookup:
    """The tokens of all tasks, findable by sequence."""

    token: Numbers
    position: Numbers
    order: Numbers
    bounds: Numbers

    @classmethod
    def of(cls, questions: Questions) -> _Lookup:
        sequence = np.concatenate([task.sequence for task in questions.tasks])
        order = np.argsort(sequence, kind="stable")
        return cls(
            np.concatenate([task.token for task in questions.tasks]),
            np.concatenate([task.position for task in questions.tasks]),
            order, np.searchsorted(sequence[order], np.arange(len(questions.sequences) + 1)),
        )  # fmt: skip


def _answers(task: Task, log_p: NDArray[np.float64], most_likely: Numbers) -> Answers:
    if task.exact:
        missed = most_likely != task.token
        first = np.full(task.items, len(missed))
        np.minimum.at(first, task.choice[missed], np.flatnonzero(missed))
        correct = first == len(missed)
        return Answers(correct, np.where(correct, -1, np.append(most_likely, -1)[first]))
    scores = np.bincount(task.choice, weights=log_p, minlength=int(task.first_choice[-1]))
    said = np.empty(task.items, np.int64)
    correct = np.empty(task.items, np.bool_)
    for item, (start, end) in enumerate(pairwise(task.first_choice.tolist())):
        found = scores[start:end]
        said[item] = found.argmax()
        # A tie is no answer: a model that says the same of everything must not score.
        correct[item] = said[item] == task.answers[item] and (found == found[said[item]]).sum() == 1
    return Answers(correct, said)


def _chance(items: Sequence[Item], exact: bool) -> float:
    if not items:
        return 0.0
    if exact:
        counts: dict[tuple[int, ...], int] = {}
        for item in items:
            counts[item.choices[0].tokens] = counts.get(item.choices[0].tokens, 0) + 1
        return max(counts.values()) / len(items)
    return float(np.mean([1 / len(item.choices) for item in items]))
