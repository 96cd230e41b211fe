"""Tasks from held-out text: what is asked stands there, what distracts does not, and nobody's model decides which."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.data.packing import train_tokenizer
from pipeline.evaluation.documentation_tasks import Document, documentation_tasks, read_documents
from pipeline.evaluation.questions import Questions, Task

NAMES = ("cloze", "pairing", "multiple_choice", "exact_match", "needle")
WORDS = [
    *("value", "index", "string", "object", "method", "return"),
    *("number", "letter", "module", "common", "people", "window"),
]


def rows(count: int = 60) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, 7))

    found = []
    for number in range(count):
        one, other = WORDS[number % 12], WORDS[(number + 5) % 12]
        body = f"The {one} is {sentence()}.\nThe {other} of {sentence()}."
        found.append({"document": f"d{number // 2}", "text": f"Use {one} {other} (self)\n\n{body}"})
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([row["text"] for row in rows()], 700)


@pytest.fixture(scope="module")
def documents(tokenizer: Tokenizer) -> list[Document]:
    return read_documents(tokenizer, rows(), start_id=1, most_tokens=100_000, sequence_tokens=64)


@pytest.fixture(scope="module")
def train(documents: list[Document]) -> np.ndarray:
    flat = np.concatenate([document.tokens for document in documents])
    return flat[: len(flat) // 32 * 32].reshape(-1, 32)


@pytest.fixture(scope="module")
def questions(documents: list[Document], tokenizer: Tokenizer, train: np.ndarray) -> Questions:
    return documentation_tasks(NAMES, documents, tokenizer, train=train, sequence_tokens=128, seed=7)


def task(questions: Questions, name: str) -> Task:
    return next(task for task in questions.tasks if task.name == name)


def choices(task: Task) -> np.ndarray:
    """(N, 4) tokens of a task whose choices are single tokens."""
    assert len(task.token) == 4 * task.items and (np.diff(task.first_choice) == 4).all()
    return task.token.reshape(-1, 4)


def test_documents_begin_with_the_token_before_every_text_and_know_their_first_line(
    documents: list[Document], tokenizer: Tokenizer
) -> None:
    for document, row in zip(documents, rows(), strict=True):
        assert document.name == row["document"] and document.tokens[0] == 1
        assert tokenizer.decode(document.tokens[1:].tolist()) == row["text"]
        heading = tokenizer.decode(document.tokens[1 : document.heading_tokens].tolist())
        assert heading == row["text"].split("\n")[0]


def test_reading_ends_with_the_tokens_that_were_asked_for(tokenizer: Tokenizer) -> None:
    some = read_documents(tokenizer, rows(), start_id=1, most_tokens=200, sequence_tokens=20)
    assert sum(len(document.tokens) for document in some) in (199, 200)
    assert max(len(document.tokens) for document in some) == 20
    lines = [{"text": "no second line"}, *rows(2)]
    assert len(read_documents(tokenizer, lines, start_id=1, most_tokens=999, sequence_tokens=99)) == 2


def test_the_answer_is_what_stands_there_and_no_distractor_is(questions: Questions) -> None:
    for name in ("cloze", "pairing", "multiple_choice"):
        each = task(questions, name)
        assert each.items > 100, name
        offered, item = choices(each), np.arange(each.items)
        stands = np.array(
            [questions.sequences[s][p + 1] for s, p in zip(each.sequence[::4], each.position[::4], strict=True)]
        )
        assert np.array_equal(offered[item, each.answers], stands)
        assert all(len(set(row)) == 4 for row in offered.tolist())
        assert (each.position.reshape(-1, 4) == each.position[::4, None]).all() and each.chance == 0.25
        # Where the right one stands says nothing.
        assert max(Counter(each.answers.tolist()).values()) / each.items < 0.25 + 3 * (0.1875 / each.items) ** 0.5


def test_hidden_words_are_whole_and_distract_by_words_of_the_same_length(
    questions: Questions, tokenizer: Tokenizer
) -> None:
    for row in choices(task(questions, "cloze")).tolist():
        words = [str(tokenizer.id_to_token(token)) for token in row]
        assert len({len(word) for word in words}) == 1 and all(word[0] == " " and word[1:].isalpha() for word in words)
    cloze, rest = (set(places(task(questions, name))) for name in ("cloze", "multiple_choice"))
    assert not cloze & rest


def places(task: Task) -> list[tuple[int, int]]:
    return list(zip(task.sequence.tolist(), task.position.tolist(), strict=True))


def test_pairs_are_of_a_texts_own_first_line_and_of_no_other(questions: Questions, documents: list[Document]) -> None:
    own = [set(document.tokens[1 : document.heading_tokens].tolist()) for document in documents]
    anywhere, pairing = set().union(*own), task(questions, "pairing")
    for row, sequence, position, answer in zip(
        choices(pairing).tolist(), pairing.sequence[::4], pairing.position[::4], pairing.answers, strict=True
    ):
        assert position + 1 >= documents[sequence].heading_tokens
        assert [token in own[sequence] for token in row] == [index == answer for index in range(4)]
        assert set(row) <= anywhere


def test_what_must_be_written_follows_pairs_that_training_text_settles(questions: Questions, train: np.ndarray) -> None:
    followers: dict[tuple[int, int], Counter[int]] = {}
    for row in train.tolist():
        for a, b, c in zip(row, row[1:], row[2:], strict=False):
            followers.setdefault((a, b), Counter())[c] += 1
    clear = {
        pair for pair, seen in followers.items()
        if seen.total() >= 3 and seen.most_common(1)[0][1] >= 0.6 * seen.total()
    }  # fmt: skip
    exact = task(questions, "exact_match")
    found = {(s, p) for s, p in places(exact)}
    wanted = {
        (number, position) for number, tokens in enumerate(questions.sequences[:60])
        for position in range(1, len(tokens) - 1) if (int(tokens[position - 1]), int(tokens[position])) in clear
    }  # fmt: skip
    assert exact.exact and found == wanted and len(found) > 100
    assert all(questions.sequences[s][p + 1] == token for (s, p), token in zip(places(exact), exact.token, strict=True))


def test_needles_are_asked_for_behind_the_text_and_stand_before_it(questions: Questions) -> None:
    needle = task(questions, "needle")
    for row, sequence, position, answer in zip(
        choices(needle).tolist(), needle.sequence[::4], needle.position[::4], needle.answers, strict=True
    ):
        tokens = questions.sequences[sequence].tolist()
        assert len(tokens) <= 128 and tokens[position + 1] == row[answer]
        question = tokens[position - 2 : position + 2]  # the end of the opening, the key, the value
        before = [tokens[at : at + 4] for at in range(position - 4)]
        assert question in before
        assert all(tokens[: position - 4].count(value) for value in row)


def test_items_belong_to_documents_and_not_to_rows(questions: Questions) -> None:
    for name in ("cloze", "multiple_choice", "exact_match"):
        each = task(questions, name)
        assert len(set(each.clusters.tolist())) == 30
        by_row = {s: set(each.clusters[each.sequence[:: len(each.token) // each.items] == s]) for s in range(60)}
        assert all(by_row[s] == by_row[s + 1] for s in range(0, 60, 2))


def test_a_seed_decides_the_distractors_and_a_task_has_its_own_stream(
    questions: Questions, documents: list[Document], tokenizer: Tokenizer, train: np.ndarray
) -> None:
    def made(names: tuple[str, ...], seed: int) -> Questions:
        return documentation_tasks(names, documents, tokenizer, train=train, sequence_tokens=128, seed=seed)

    alone, other = made(("pairing",), 7), made(("pairing",), 8)
    assert np.array_equal(task(alone, "pairing").token, task(questions, "pairing").token)
    assert not np.array_equal(task(alone, "pairing").token, task(other, "pairing").token)


def test_a_task_has_a_bounded_number_of_items(
    documents: list[Document], tokenizer: Tokenizer, train: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.documentation_tasks._MOST_ITEMS", 50)
    some = documentation_tasks(NAMES[:4], documents, tokenizer, train=train, sequence_tokens=64, seed=7)
    assert max(each.items for each in some.tasks) == 50 and len(set(some.tasks[3].clusters.tolist())) > 15
