"""Tasks from the user's own files: one JSON object a line, one file a task, named after it.

    {"prompt": "...", "choices": ["...", "..."], "answer": 1}            multiple choice; the index of the right one
    {"prompt": "... ____ ...", "choices": ["...", "..."], "answer": 0}   the same with a hidden word
    {"prompt": "...", "answer": "..."}                                    must be written exactly: words, needles
    {"prompt": "...", "answer": "72", "pattern": "#### (-?[0-9.,]+)"}     worked: text is generated, the pattern's last
                                                                          match is the final answer

A field ``document`` names what items have in common, so that the interval knows. Prompts are taken as they are:
examples, templates and the space before an answer belong to the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.data.encoding import TextEncoder, encode_texts, text_encoder
from pipeline.evaluation.questions import Answers, Ids, Item, Probe, Questions, make_task
from pipeline.evaluation.readers import Writer

GAP = "____"
_FILE_BYTES, _LINE_BYTES, _ROWS, _CHOICES, _PATTERN_CHARACTERS = 2**28, 2**20, 200_000, 26, 200
_FIELDS = {"prompt", "choices", "answer", "pattern", "document"}


@dataclass(frozen=True, slots=True)
class Row:
    """One checked line; which of ``choices``, ``pattern`` and neither it has is the same in a whole file."""

    prompt: str
    answer: int | str
    choices: tuple[str, ...]
    pattern: str | None
    document: str


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A file's rows, none of them empty."""

    name: str
    rows: tuple[Row, ...]

    @property
    def worked(self) -> bool:
        """Whether answers are generated."""
        return self.rows[0].pattern is not None


@dataclass(frozen=True, slots=True)
class WorkedTask:
    """Prompts whose answers are generated.

    Attributes:
        prompts: Tokens of each.
        answers: What the pattern must find.
        patterns: With one group each.
        clusters: (N,) number of each item's document.
    """

    name: str
    prompts: tuple[Ids, ...]
    answers: tuple[str, ...]
    patterns: tuple[str, ...]
    clusters: NDArray[np.int64]


def read_task_file(path: Path) -> TaskFile:
    """Read and check a file.

    Raises:
        UserError: It cannot be read, is too large, or a line is no such row; the message names line and field.
    """
    try:
        size = path.stat().st_size
        if size > _FILE_BYTES:
            raise UserError("runtime.task_files", f"{path.name}, {size} bytes", f"at most {_FILE_BYTES}", "split it")
        with path.open("rb") as file:
            rows = tuple(_row(line, path, number) for number, line in enumerate(_lines(file.readlines(), path), 1))
    except OSError as error:
        raise UserError("runtime.task_files", str(path), f"a file of JSON lines ({error.strerror})") from None
    if not rows:
        raise UserError("runtime.task_files", str(path), "at least one line", "add items")
    kinds = [(bool(row.choices), row.pattern is not None) for row in rows]
    if odd := next((number for number, kind in enumerate(kinds, 1) if kind != kinds[0]), None):
        _refuse(path, odd, "choices and pattern", "the same fields as in line 1", "make a file of each kind")
    return TaskFile(path.stem, rows)


def file_questions(files: Sequence[TaskFile], tokenizer: Tokenizer, *, start_id: int, most_tokens: int) -> Questions:
    """Items of all files whose answers need no writing, in the tokens of a tokenizer.

    Prompts that are too long lose their beginning. Where a choice begins inside a token of its prompt, all choices
    count from there.
    """
    encoder, sequences, tasks = text_encoder(tokenizer), list[Ids](), []
    for file in files:
        if file.worked:
            continue
        items = []
        for row in file.rows:
            probes = list(_probes(encoder, row, start_id, most_tokens, len(sequences)))
            sequences += [sequence for sequence, _ in probes]
            answer = row.answer if isinstance(row.answer, int) else 0
            items.append(Item(row.document, tuple(probe for _, probe in probes), answer))
        tasks.append(make_task(file.name, items, exact=not file.rows[0].choices))
    return Questions(tuple(sequences), tuple(tasks))


def worked_tasks(
    files: Sequence[TaskFile], tokenizer: Tokenizer, *, start_id: int, most_tokens: int
) -> tuple[WorkedTask, ...]:
    """The files whose answers are generated; prompts keep their last ``most_tokens`` tokens."""
    encoder, found = text_encoder(tokenizer), []
    for file in (file for file in files if file.worked):
        prompts = encode_texts(encoder, [row.prompt for row in file.rows])
        names = {name: number for number, name in enumerate(dict.fromkeys(row.document for row in file.rows))}
        found.append(
            WorkedTask(
                file.name, tuple(_cut(np.append(np.int32(start_id), ids), most_tokens)[0] for ids in prompts),
                tuple(str(row.answer) for row in file.rows), tuple(str(row.pattern) for row in file.rows),
                np.array([names[row.document] for row in file.rows], np.int64),
            )
        )  # fmt: skip
    return tuple(found)


def work(task: WorkedTask, writer: Writer, tokenizer: Tokenizer, *, most_tokens: int, ends: Sequence[int]) -> Answers:
    """Generate greedily and look for the final answers; commas, spaces and a full stop at the end do not count."""
    said = []
    for prompt, pattern in zip(task.prompts, task.patterns, strict=True):
        text = tokenizer.decode(writer.write(prompt, most_tokens, ends), skip_special_tokens=False)
        matches = re.findall(pattern, text)
        said.append(matches[-1] if matches else "")
    correct = [_plain(found) == _plain(answer) for found, answer in zip(said, task.answers, strict=True)]
    return Answers(np.array(correct, np.bool_), np.full(len(said), -1), tuple(said))


def _lines(lines: list[bytes], path: Path) -> Iterator[bytes]:
    for number, line in enumerate(lines, 1):
        if number > _ROWS or len(line) > _LINE_BYTES:
            _refuse(path, number, "length", f"at most {_ROWS} lines of {_LINE_BYTES} bytes", "split the file")
        yield line


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        _refuse(path, number, "line", "a JSON object", "write one object a line")
    if not isinstance(row, dict):
        _refuse(path, number, "line", "a JSON object", "write one object a line")
    if unknown := sorted(set(row) - _FIELDS):
        _refuse(path, number, unknown[0], f"one of {', '.join(sorted(_FIELDS))}", "rename or remove it")
    if not isinstance(prompt := row.get("prompt"), str) or not prompt:
        _refuse(path, number, "prompt", "text", "write the question there")
    choices, pattern = _choices(row, path, number), _pattern(row, path, number)
    answer = row.get("answer")
    if choices:
        if type(answer) is not int or not 0 <= answer < len(choices):
            _refuse(path, number, "answer", f"an index from 0 to {len(choices) - 1}", "name the right choice")
        if pattern is not None or prompt.startswith(GAP) or prompt.count(GAP) > 1:
            _refuse(path, number, "prompt", f"choices without pattern, and {GAP} at most once, not at the start")
    elif not isinstance(answer, str) or not answer.strip():
        _refuse(path, number, "answer", "text", "write what must be answered, or add choices")
    document = row.get("document", number)
    if not isinstance(document, (str, int)):
        _refuse(path, number, "document", "a name", "name what items have in common, or leave it out")
    return Row(prompt, answer, choices, pattern, str(document))


def _choices(row: Mapping[str, Any], path: Path, number: int) -> tuple[str, ...]:
    choices = row.get("choices", [])
    good = isinstance(choices, list) and all(isinstance(each, str) and each for each in choices)
    if not good or ("choices" in row and not 2 <= len(choices) <= _CHOICES) or len(set(choices)) != len(choices):
        _refuse(path, number, "choices", f"2 to {_CHOICES} different texts", "correct the list")
    return tuple(choices)


def _pattern(row: Mapping[str, Any], path: Path, number: int) -> str | None:
    if (pattern := row.get("pattern")) is None:
        return None
    try:
        good = isinstance(pattern, str) and len(pattern) <= _PATTERN_CHARACTERS and re.compile(pattern).groups == 1
    except (re.error, OverflowError, RecursionError):
        good = False
    if not good:
        _refuse(path, number, "pattern", f"a regular expression of at most {_PATTERN_CHARACTERS} characters, one group")
    return str(pattern)


def _refuse(path: Path, number: int, field: str, allowed: str, next_step: str = "correct the line") -> NoReturn:
    raise UserError(f"{path.name} line {number}: {field}", "something else", allowed, next_step)


def _probes(encoder: TextEncoder, row: Row, start_id: int, most_tokens: int, first: int) -> Iterator[tuple[Ids, Probe]]:
    """A sequence for each choice, and the tokens of it that count."""
    before, _, behind = row.prompt.partition(GAP) if row.choices else (row.prompt, "", "")
    texts = [before + choice + behind for choice in row.choices or (str(row.answer),)]
    prompt, *whole = (np.append(np.int32(start_id), ids) for ids in encode_texts(encoder, [before, *texts]))
    start = min(_common(prompt, ids) for ids in whole)
    for number, ids in enumerate(whole):
        kept, cut = _cut(ids, most_tokens)
        begin = max(1, start - cut)
        yield kept, Probe(first + number, begin - 1, tuple(kept[begin:].tolist()))


def _common(one: Ids, other: Ids) -> int:
    """Tokens at the start that two texts share; never all of the second."""
    size = min(len(one), len(other) - 1)
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


def _cut(ids: Ids, most_tokens: int) -> tuple[Ids, int]:
    """The last tokens, and how many before them were lost."""
    lost = max(0, len(ids) - most_tokens)
    return ids[lost:].astype(np.int32), lost


def _plain(text: str) -> str:
    return text.strip().rstrip(".").replace(",", "")
