"""Answers from logits: against torch's log-probabilities and against greedy decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluation.questions import Item, Probe, Questions, answer, join_questions, make_task
from pipeline.evaluation.readers import TorchReader
from tests.pipeline.conftest import VOCABULARY, MakeModel


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Any:
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def sequences() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(2, VOCABULARY, length).astype(np.int32) for length in (9, 30, 5, 17))


def log_p(model: Any, sequence: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sequence[None].astype(np.int64))).logits[0]
    return np.asarray(logits.double().log_softmax(-1))


def test_a_choice_scores_the_sum_of_its_log_probabilities(model: Any, sequences: tuple[np.ndarray, ...]) -> None:
    """Choices of one to three tokens, as teacher forcing in torch scores them."""
    rng = np.random.default_rng(1)
    items, expected = [], []
    for number, sequence in enumerate(sequences):
        table = log_p(model, sequence)
        for position in range(len(sequence) - 3):
            choices = tuple(
                Probe(number, position, tuple(rng.integers(0, VOCABULARY, size).tolist())) for size in (1, 2, 3)
            )
            scores = [sum(table[position + i, token] for i, token in enumerate(probe.tokens)) for probe in choices]
            items.append(Item(str(number), choices, int(rng.integers(3))))
            expected.append(int(np.argmax(scores)))
    questions = Questions(sequences, (make_task("t", items, exact=False),))
    found = answer(questions, TorchReader(model).rows(sequences))["t"]
    assert found.said.tolist() == expected
    assert found.correct.tolist() == [said == item.answer for said, item in zip(expected, items, strict=True)]
    assert 0 < found.correct.sum() < len(items)


def test_an_exact_answer_is_what_greedy_decoding_writes(model: Any, sequences: tuple[np.ndarray, ...]) -> None:
    """Of continuations half of which were written greedily, those and no others are right."""
    texts, items, written = [], [], []
    for number, sequence in enumerate(sequences * 2):
        said = model.generate(
            torch.from_numpy(sequence[None].astype(np.int64)), max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0, len(sequence) :].numpy()
        wanted = said.copy()
        if number >= len(sequences):
            wanted[number % 3] = (wanted[number % 3] + 1) % VOCABULARY
        texts.append(np.concatenate([sequence, wanted]).astype(np.int32))
        items.append(Item(str(number), (Probe(number, len(sequence) - 1, tuple(wanted.tolist())),)))
        written.append(said[number % 3])
    questions = Questions(tuple(texts), (make_task("t", items, exact=True),))
    found = answer(questions, TorchReader(model).rows(texts))["t"]
    assert found.correct.tolist() == [True] * len(sequences) + [False] * len(sequences)
    assert found.said.tolist() == [-1] * len(sequences) + written[len(sequences) :]


def test_a_model_that_says_the_same_of_everything_knows_nothing() -> None:
    items = [Item("a", tuple(Probe(0, 0, (token,)) for token in range(4)), right) for right in range(4)]
    questions = Questions((np.zeros(2, np.int32),), (make_task("t", items, exact=False),))
    found = answer(questions, [(0, np.zeros((2, 8), np.float32))])["t"]
    assert not found.correct.any()


def test_chance_is_that_of_the_choices_or_of_the_commonest_answer() -> None:
    def probe(token: int) -> Probe:
        return Probe(0, 0, (token,))

    two, four = ((probe(0), probe(1)), (probe(0), probe(1), probe(2), probe(3)))
    chosen = make_task("t", [Item("a", two), Item("a", four)], exact=False)
    written = make_task("t", [Item("a", (probe(token),)) for token in (5, 6, 5, 7)], exact=True)
    assert chosen.chance == pytest.approx((1 / 2 + 1 / 4) / 2) and written.chance == 0.5
    assert make_task("t", [], exact=False).items == 0


def test_tasks_of_several_sources_are_answered_in_one_pass(model: Any, sequences: tuple[np.ndarray, ...]) -> None:
    def questions(name: str, texts: tuple[np.ndarray, ...], exact: bool) -> Questions:
        tokens = (7,) if exact else tuple(range(7, 40))
        items = [Item("a", tuple(Probe(number, 2, (token,)) for token in tokens)) for number in range(len(texts))]
        return Questions(texts, (make_task(name, items, exact=exact),))

    one, other = questions("one", sequences, False), questions("other", sequences[::-1], False)
    third = questions("third", sequences[2:], True)
    both = join_questions(join_questions(one, other), third)
    found = answer(both, TorchReader(model).rows(both.sequences))
    assert not np.array_equal(found["one"].said, found["other"].said)
    for single in (one, other, third):
        (name,) = (task.name for task in single.tasks)
        alone = answer(single, TorchReader(model).rows(single.sequences))[name]
        assert np.array_equal(found[name].said, alone.said) and np.array_equal(found[name].correct, alone.correct)


def test_a_sequence_without_logits_is_noticed(sequences: tuple[np.ndarray, ...]) -> None:
    items = [Item("a", (Probe(number, 0, (1,)), Probe(number, 0, (2,)))) for number in range(2)]
    questions = Questions(sequences[:2], (make_task("t", items, exact=False),))
    with pytest.raises(ValueError, match="missing"):
        answer(questions, [(0, np.zeros((9, VOCABULARY), np.float32))])
