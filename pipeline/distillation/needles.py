"""Sentences to be found again in long texts: the same ones for training and for the needle test.

A needle is ``Note: KEY KEY VALUE VALUE`` on a line of its own, its words taken from the tokenizer and put
together at random, so that nothing but the text itself says which value belongs to a key. Asking is to write the
line again as far as the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Sequences

Ids = NDArray[np.int32]

_WORD = re.compile("[ \u2581\u0120][a-z]{3,12}")  # a space as such, as sentencepiece or as GPT-2 writes it
_LETTERS = re.compile("[ \u2581\u0120]?[a-z]{1,12}")
_OPENING, _CLOSING = "\nNote:", "\n"
_MIN_WORDS = 32
_LATE_SHARE, _LATE_FROM = 0.5, 0.9  # half of the questions come in the last tenth: those are the far ones


@dataclass(frozen=True, slots=True)
class NeedleFormat:
    """How needles are written.

    Attributes:
        words: (W,) tokens, each a word with the space before it.
        opening: Tokens before a key.
        closing: Tokens after a value.
        key_words: Words of a key, 1 to 3.
        value_words: Words of a value, 1 to 8.
    """

    words: Ids
    opening: Ids
    closing: Ids
    key_words: int = 2
    value_words: int = 2

    @property
    def question_tokens(self) -> int:
        """Length of a question, up to its key."""
        return len(self.opening) + self.key_words

    @property
    def needle_tokens(self) -> int:
        """Length of a needle."""
        return self.question_tokens + self.value_words + len(self.closing)


@dataclass(frozen=True, slots=True)
class Needles:
    """Keys (N, K), all different, and values (N, V), as tokens."""

    keys: Ids
    values: Ids


def needle_format(tokenizer: Tokenizer, key_words: int = 2, value_words: int = 2) -> NeedleFormat:
    """Needles in a tokenizer's own words: lower-case words that are one token; in a very small one, parts of words.

    Raises:
        UserError: It has fewer than 32 of either, or a number of words is out of range.
    """
    if not 1 <= key_words <= 3 or not 1 <= value_words <= 8:
        raise UserError("needles", f"{key_words} and {value_words} words", "1 to 3 of a key, 1 to 8 of a value")
    vocabulary = tokenizer.get_vocab().items()
    choices = [sorted(token for text, token in vocabulary if form.fullmatch(text)) for form in (_WORD, _LETTERS)]
    words = next((words for words in choices if len(words) >= _MIN_WORDS), None)
    if words is None:
        found = f"{len(choices[-1])} words and parts of words"
        raise UserError("tokenizer", found, f"at least {_MIN_WORDS}", "take a larger vocabulary")
    opening, closing = (
        np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in (_OPENING, _CLOSING)
    )
    return NeedleFormat(np.asarray(words, np.int32), opening, closing, key_words, value_words)


def draw_needles(form: NeedleFormat, count: int, rng: np.random.Generator) -> Needles:
    """``count`` needles with different keys."""
    combinations = len(form.words) ** form.key_words
    chosen = rng.choice(combinations, count, replace=False)
    digits = np.stack([chosen // len(form.words) ** place % len(form.words) for place in range(form.key_words)], axis=1)
    values = rng.integers(0, len(form.words), (count, form.value_words))
    return Needles(form.words[digits], form.words[values])


def write_needle(form: NeedleFormat, needles: Needles, index: int) -> Ids:
    """Tokens (needle_tokens,) of one needle."""
    return np.concatenate([form.opening, needles.keys[index], needles.values[index], form.closing])


def needle_prompt(
    form: NeedleFormat, haystack: Ids, tokens: int, depth: float, distractors: int, rng: np.random.Generator
) -> tuple[Ids, Ids]:
    """A text of ``tokens`` that ends with a question, and its answer.

    Args:
        form: How needles are written.
        haystack: Tokens of ordinary text; a random piece of it is taken.
        tokens: Length of text, question and answer together.
        depth: Where the needle lies: 0 at the start, 1 just before the question.
        distractors: Needles with other keys, anywhere.
        rng: Decides everything else.

    Returns:
        (tokens - V,) and (V,).

    Raises:
        UserError: The haystack is too short.
    """
    needles = draw_needles(form, 1 + distractors, rng)
    plain = tokens - (1 + distractors) * form.needle_tokens - form.question_tokens - form.value_words
    if not 0 < plain <= len(haystack):
        raise UserError("haystack", f"{len(haystack)} tokens", f"at least {plain} for {tokens}", "give longer text")
    start = int(rng.integers(0, len(haystack) - plain + 1))
    places = np.concatenate([[round(depth * plain)], rng.integers(0, plain + 1, distractors)])
    parts: list[Ids] = []
    done = 0
    for index in np.argsort(places, kind="stable"):
        parts += [haystack[start + done : start + places[index]], write_needle(form, needles, int(index))]
        done = int(places[index])
    parts += [haystack[start + done : start + plain], form.opening, needles.keys[0]]
    return np.concatenate(parts).astype(np.int32), needles.values[0].astype(np.int32)


def add_retrieval(
    form: NeedleFormat, text: Ids, *, needles: int, questions: int, text_counts: bool, seed: int
) -> Sequences:
    """Texts (S, T) with needles and later questions about them; what no one could know is not learned.

    Learned are the values of repeated needles and, with ``text_counts``, the text; never the first time that a
    needle is written, and never which one is asked for. Every sequence keeps its length: the end of its text
    makes room. A needle is asked for at most once, so that what is asked for stands only where it was first written.

    Raises:
        UserError: The needles leave no room for text, or are fewer than the questions.
    """
    length = text.shape[1]
    plain = length - (needles + questions) * form.needle_tokens
    if plain < 1 or not 0 <= questions <= needles or needles < 1:
        raise UserError(
            "needles", f"{needles} with {questions} questions",
            f"at least one, no fewer than questions, and all in less than {length} tokens",
        )  # fmt: skip
    tokens = np.empty_like(text, dtype=np.int32)
    counts = np.empty(text.shape, np.bool_)
    for row, plain_text in enumerate(text):
        rng = np.random.default_rng([seed, row])
        tokens[row], learned = _retrieval_row(form, plain_text[:plain], needles, questions, text_counts, rng)
        counts[row] = np.append(learned[1:], False)  # a position counts when the token after it is learned
    return Sequences(tokens, counts)


def _retrieval_row(
    form: NeedleFormat, text: Ids, count: int, questions: int, text_counts: bool, rng: np.random.Generator
) -> tuple[Ids, NDArray[np.bool_]]:
    """Tokens (T,), and which of them are learned."""
    needles = draw_needles(form, count, rng)
    first = rng.random(count) ** 2  # more of them early: what lies far back is what has to be learned
    first[0] = 0.0  # nothing before it: the place that random ones leave out, and where recall is lowest
    asked = rng.permutation(count)[:questions]  # each once: an earlier answer close by would do for a later one
    late = rng.random(questions) < _LATE_SHARE
    earliest = np.where(late, np.maximum(first[asked], _LATE_FROM), first[asked])
    times = np.concatenate([first, earliest + (1 - earliest) * rng.random(questions)])
    which = np.concatenate([np.arange(count), asked])
    unknown = np.zeros(form.needle_tokens, np.bool_)
    answer = unknown.copy()
    answer[form.question_tokens : form.question_tokens + form.value_words] = True
    parts, learned, done = [], [], 0
    for event in np.lexsort((np.arange(len(times)) >= count, times)):  # a needle before a question at the same time
        place = int(times[event] * len(text))
        parts += [text[done:place], write_needle(form, needles, int(which[event]))]
        learned += [np.full(place - done, text_counts), answer if event >= count else unknown]
        done = place
    parts.append(text[done:])
    learned.append(np.full(len(text) - done, text_counts))
    return np.concatenate(parts), np.concatenate(learned)
