"""The user's tasks: choices, gaps, words and worked answers from files, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.evaluation.questions import answer
from pipeline.evaluation.readers import TorchReader
from pipeline.evaluation.task_files import file_questions, read_task_file, work, worked_tasks
from tests.pipeline.conftest import MakeModel


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def score(model: Any, tokenizer: Tokenizer, text: str, begin: str) -> float:
    """log p of a text behind its beginning, in torch; both are cut at the same token."""
    ids = [1, *tokenizer.encode(text, add_special_tokens=False).ids]
    start = 1 + len(tokenizer.encode(begin, add_special_tokens=False).ids)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[at - 1, ids[at]]) for at in range(start, len(ids)))


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Any:
    return make_model("llama", num_hidden_layers=1)


def test_choices_and_gaps_are_scored_to_the_end_of_the_text(model: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prompts end before a space, so that their tokens are those of the whole texts."""
    gaps = [
        {"prompt": "def ____ x, y:\n", "choices": [" return", " words", " many words"], "answer": right}
        for right in range(3)
    ]
    plain = [{"prompt": "of many", "choices": [" words", " x", " y + 1"], "answer": right} for right in range(3)]
    files = [read_task_file(write(tmp_path / f"{name}.jsonl", *rows)) for name, rows in (("gap", gaps), ("mc", plain))]
    gaps[0]["prompt"] = "def ____ x"
    questions = file_questions(files, tokenizer, start_id=1, most_tokens=200)
    found = answer(questions, TorchReader(model).rows(questions.sequences))
    for name, row, behind in (("gap", gaps[1], " x, y:\n"), ("mc", plain[0], "")):
        begin = row["prompt"].split("____")[0]
        scores = [score(model, tokenizer, begin + each + behind, begin) for each in row["choices"]]
        best = int(np.argmax(scores))
        assert found[name].said.tolist() == [best] * 3
        assert found[name].correct.tolist() == [right == best for right in range(3)]
    assert [task.chance for task in questions.tasks] == [pytest.approx(1 / 3)] * 2


def test_a_choice_that_changes_the_prompts_last_token_counts_from_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """ "rn" is one token and "r!" are two: both count from the first token that differs."""
    row = {"prompt": "x retur", "choices": ["n", "!"], "answer": 0}
    path = write(tmp_path / "merge.jsonl", row)
    questions = file_questions([read_task_file(path)], tokenizer, start_id=1, most_tokens=99)
    (task,) = questions.tasks
    whole = [[1, *tokenizer.encode(row["prompt"] + each, add_special_tokens=False).ids] for each in row["choices"]]
    assert [sequence.tolist() for sequence in questions.sequences] == whole
    shared = next(at for at, (a, b) in enumerate(zip(*whole, strict=False)) if a != b)
    prompt = [1, *tokenizer.encode(row["prompt"], add_special_tokens=False).ids]
    assert shared < len(prompt), "the choices must differ inside the prompt's tokens"
    for choice in range(2):
        assert task.token[task.choice == choice].tolist() == whole[choice][shared:]
        assert task.position[task.choice == choice][0] == shared - 1


def test_a_long_prompt_loses_its_beginning(model: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"prompt": "return x " * 40 + "of many", "answer": " words"}
    file = read_task_file(write(tmp_path / "long.jsonl", row))
    questions = file_questions([file], tokenizer, start_id=1, most_tokens=20)
    (sequence,), (task,) = questions.sequences, questions.tasks
    assert len(sequence) == 20 and tokenizer.decode(sequence.tolist()).endswith("of many words")
    assert task.exact and tokenizer.decode(task.token.tolist()) == " words"
    assert np.array_equal(sequence[task.position + 1], task.token)


def test_worked_answers_are_written_and_their_last_match_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Scripted:
        """Writes what it was told, a prompt after another."""

        def __init__(self, texts: list[str]) -> None:
            self.texts, self.prompts, self.asked = iter(texts), list[str](), list[tuple[int, Any]]()

        def rows(self, sequences: Any) -> Any:
            raise AssertionError("worked answers are written")

        def write(self, prompt: np.ndarray, most_tokens: int, ends: Any) -> list[int]:
            self.prompts.append(tokenizer.decode(prompt.tolist()))
            self.asked.append((most_tokens, ends))
            return list(tokenizer.encode(next(self.texts), add_special_tokens=False).ids)

    pattern = "#### (-?[0-9.,]+)"
    rows = [{"prompt": f"x {n}", "answer": "1200", "pattern": pattern, "document": n // 2} for n in range(4)]
    (task,) = worked_tasks(
        [read_task_file(write(tmp_path / "sums.jsonl", *rows))], tokenizer, start_id=1, most_tokens=50
    )
    writer = Scripted(["#### 5 many #### 1,200.", "#### 1200 #### 5", "1200", "#### 1200"])
    found = work(task, writer, tokenizer, most_tokens=9, ends=(1,))
    assert found.correct.tolist() == [True, False, False, True] and found.texts == ("1,200.", "5", "", "1200")
    assert [prompt.removeprefix("</s>") for prompt in writer.prompts] == ["x 0", "x 1", "x 2", "x 3"]
    assert set(writer.asked) == {(9, (1,))} and task.clusters.tolist() == [0, 0, 1, 1]


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, "{"], "bad.jsonl line 2: line"),
        ([[1]], "line 1: line"),
        ([{**GOOD, "anser": 1}], "line 1: anser"),
        ([{**GOOD, "prompt": 3}], "line 1: prompt"),
        ([{**GOOD, "answer": 2}], "line 1: answer: got 'something else', allowed: an index from 0 to 1"),
        ([{**GOOD, "answer": True}], "line 1: answer"),
        ([{**GOOD, "choices": ["a", "a"]}], "line 1: choices"),
        ([{**GOOD, "choices": ["a"]}], "line 1: choices"),
        ([{**GOOD, "choices": []}], "line 1: choices"),
        ([{**GOOD, "prompt": "____ x"}], "line 1: prompt"),
        ([{**GOOD, "prompt": "x ____ ____"}], "line 1: prompt"),
        ([{"prompt": "p", "answer": " "}], "line 1: answer"),
        ([{"prompt": "p", "answer": "1", "pattern": "([0-9]"}], "line 1: pattern"),
        ([{"prompt": "p", "answer": "1", "pattern": "[0-9]"}], "line 1: pattern"),
        ([{"prompt": "p", "answer": "1", "pattern": "(x)" * 99}], "line 1: pattern"),
        ([{"prompt": "p", "answer": "1", "document": [1]}], "line 1: document"),
        ([GOOD, {"prompt": "p", "answer": "1"}], "line 2: choices and pattern"),
        ([], "at least one line"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        read_task_file(write(tmp_path / "bad.jsonl", *rows))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"runtime\.task_files.*absent"):
        read_task_file(tmp_path / "absent.jsonl")
    path = write(tmp_path / "large.jsonl", GOOD, GOOD)
    for name, value, says in (("_FILE_BYTES", 50, "at most 50"), ("_LINE_BYTES", 20, "line 1"), ("_ROWS", 1, "line 2")):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.evaluation.task_files.{name}", value)
            with pytest.raises(UserError, match=says):
                read_task_file(path)
