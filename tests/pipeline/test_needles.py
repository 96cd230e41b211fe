from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.data.packing import train_tokenizer
from pipeline.distillation.needles import (
    NeedleFormat,
    add_retrieval,
    draw_needles,
    needle_format,
    needle_prompt,
)

SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "ra", "so", "ti")
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = " ".join(f"{word} and {other}" for word in WORDS for other in WORDS)
    return train_tokenizer([f"A text. {text}\nNote: {text}\n"], 480)


@pytest.fixture(scope="module")
def form(tokenizer: Tokenizer) -> NeedleFormat:
    return needle_format(tokenizer)


def test_words_are_single_tokens_of_the_tokenizer(tokenizer: Tokenizer, form: NeedleFormat) -> None:
    texts = [tokenizer.decode([int(word)]) for word in form.words]
    assert len(set(texts)) == len(texts) >= 64
    assert all(text[0] == " " and text[1:].isalpha() for text in texts)
    assert tokenizer.decode([*form.opening, *form.words[:4], *form.closing]) == "\nNote:" + "".join(texts[:4]) + "\n"


def test_a_small_tokenizer_lends_parts_of_words() -> None:
    small = train_tokenizer(["the quick brown fox jumps over the lazy dog\nNote:\n"] * 3, 330)
    texts = [small.decode([int(word)]) for word in needle_format(small).words]
    assert len(set(texts)) == len(texts) >= 32 and all(text.strip().isalpha() for text in texts)


def test_tokenizers_and_numbers_that_make_no_needles_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="words and parts of words"):
        needle_format(train_tokenizer(["no words here to speak of"], 262))
    for words in ((0, 2), (4, 2), (2, 0), (2, 9)):
        with pytest.raises(UserError, match="1 to 3 of a key"):
            needle_format(tokenizer, *words)


def test_keys_differ_and_words_are_used_evenly(form: NeedleFormat) -> None:
    needles = draw_needles(form, 2_000, np.random.default_rng(0))
    assert len({tuple(key) for key in needles.keys.tolist()}) == 2_000
    for column in (*needles.keys.T, *needles.values.T):
        counts = Counter(column.tolist())
        assert set(counts) == set(form.words.tolist()) and max(counts.values()) < 3 * 2_000 / len(form.words)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("distractors", [0, 3])
def test_a_prompt_has_its_length_and_the_needle_at_its_depth(
    form: NeedleFormat, depth: float, distractors: int
) -> None:
    haystack = np.full(600, -1, np.int32)
    for trial in range(20):
        prompt, answer = needle_prompt(form, haystack, 500, depth, distractors, np.random.default_rng(trial))
        assert len(prompt) + len(answer) == 500
        question = prompt[-form.question_tokens :]
        written = np.concatenate([question, answer, form.closing]).tolist()
        places = [at for at in range(500) if prompt[at : at + len(written)].tolist() == written]
        assert len(places) == 1
        before = int((prompt[: places[0]] == -1).sum())
        assert before == round(depth * (prompt == -1).sum())
        assert (prompt == -1).sum() == 500 - (1 + distractors) * form.needle_tokens - len(question) - len(answer)


def test_prompts_keep_the_text_in_order(form: NeedleFormat) -> None:
    haystack = np.arange(10_000, 11_000, dtype=np.int32)
    prompt, _ = needle_prompt(form, haystack, 400, 0.5, 4, np.random.default_rng(1))
    text = prompt[prompt >= 10_000]
    np.testing.assert_array_equal(np.diff(text), 1)
    with pytest.raises(UserError, match="haystack"):
        needle_prompt(form, haystack[:100], 400, 0.5, 4, np.random.default_rng(1))


@pytest.mark.parametrize("text_counts", [True, False])
def test_only_what_can_be_known_is_learned(form: NeedleFormat, text_counts: bool) -> None:
    text = np.arange(10_000, 10_000 + 6 * 1_000, dtype=np.int32).reshape(6, 1_000)
    made = add_retrieval(form, text, needles=30, questions=20, text_counts=text_counts, seed=3)
    assert made.tokens.shape == (6, 1_000) and made.counts is not None
    for row, counts, original in zip(made.tokens, made.counts, text, strict=True):
        plain = row[row >= 10_000]
        np.testing.assert_array_equal(plain, original[: len(plain)])
        learned = np.append(False, counts[:-1])  # by the token that is predicted
        assert not counts[-1] and (learned[row >= 10_000][1:] == text_counts).all()
        seen: dict[tuple[int, ...], tuple[int, ...]] = {}
        answers = 0
        for at in starts(row, form):
            key = tuple(row[at + 3 - 3 + len(form.opening) : at + form.question_tokens].tolist())
            value = slice(at + form.question_tokens, at + form.question_tokens + form.value_words)
            known = key in seen
            assert not learned[at : at + form.question_tokens].any()
            assert (learned[value] == known).all() and not learned[value.stop]
            assert seen.setdefault(key, tuple(row[value].tolist())) == tuple(row[value].tolist())
            answers += known
        assert len(seen) == 30 and answers == 20


def starts(row: np.ndarray, form: NeedleFormat) -> list[int]:
    opening = form.opening.tolist()
    return [at for at in range(len(row)) if row[at : at + len(opening)].tolist() == opening]


def test_questions_reach_far_back(form: NeedleFormat) -> None:
    text = np.full((40, 2_000), 10_000, np.int32)
    made = add_retrieval(form, text, needles=40, questions=40, text_counts=False, seed=0)
    distances = []
    for row in made.tokens:
        first: dict[tuple[int, ...], int] = {}
        for at in starts(row, form):
            key = tuple(row[at + len(form.opening) : at + form.question_tokens].tolist())
            if key in first:
                distances.append(at - first.pop(key))  # a third time would count as a first one
            else:
                first[key] = at
        assert not first
    shares = np.histogram(distances, [1, 500, 1_000, 1_500, 2_000])[0] / (40 * 40)
    assert (shares > 0.08).all() and abs(shares.sum() - 1) < 1e-9


@pytest.mark.parametrize(("needles", "questions"), [(8, 8), (0, 0), (2, 3), (2, -1)])
def test_needles_without_room_and_questions_without_needles_are_refused(
    form: NeedleFormat, needles: int, questions: int
) -> None:
    with pytest.raises(UserError, match="at least one"):
        add_retrieval(
            form, np.zeros((1, 100), np.int32), needles=needles, questions=questions, text_counts=True, seed=0
        )
