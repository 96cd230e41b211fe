"""Tasks made from held-out text: thousands of items at the cost of reading it once.

Every item is a position of a document, and tokens that stand or might stand there:

    cloze            a hidden word among four; the others are words of the same form and length
    multiple_choice  what goes on here, among four tokens of the same kind: a piece of a word, a sign, an indentation
    pairing          what stands in this text's own heading or signature, among three pieces of other ones
    exact_match      what must be written where the training text leaves little doubt: after the same two tokens one
                     token came in most cases
    needle           a line of random words, to be found again (``distillation/needles.py``)

Distractors are drawn with a seed from the same text, as common as it has them, and are never the answer. No item is
chosen by what any model says of it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.data.encoding import encode_texts, text_encoder
from pipeline.data.packing import row_text
from pipeline.distillation.needles import NeedleFormat, draw_needles, needle_format, write_needle
from pipeline.evaluation.questions import Ids, Item, Probe, Questions, Task, make_task

CHOICES = 4
NEEDLE, EXACT_MATCH = "needle", "exact_match"
_MOST_ITEMS = 12_000  # of a task; more of the same documents say little more
_DRAWS = 24  # tried for three distractors
_SPACES = " \u2581\u0120"  # a space as such, as sentencepiece or as GPT-2 writes it
_WORD = re.compile(rf"[{_SPACES}][A-Za-z]{{3,}}")
_LETTER = re.compile("[^\\W\\d_]")
_KINDS = (
    ("word", re.compile(rf"[{_SPACES}][a-z]+")),
    ("name", re.compile(rf"[{_SPACES}][A-Z][A-Za-z]*")),
    ("part", re.compile("[a-z]+")),
    ("letters", re.compile("[A-Za-z]+")),
    ("digits", re.compile(rf"[{_SPACES}]?[0-9]+")),
    ("space", re.compile(rf"[\s{_SPACES}\u010a]+")),
)
_NEEDLES_A_TEXT = 4
_DOUBTLESS_TIMES, _DOUBTLESS_SHARE, _COUNTED_TOKENS = 3, 0.6, 1_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """A held-out text.

    Attributes:
        name: Of the document; several rows may be made of one.
        tokens: (T,) with the token before every text at the start.
        heading_tokens: How many of them are that token and the first line.
    """

    name: str
    tokens: Ids
    heading_tokens: int


def read_documents(
    tokenizer: Tokenizer, rows: Iterable[Mapping[str, Any]], *, start_id: int, most_tokens: int, sequence_tokens: int
) -> list[Document]:
    """Rows of several lines in their order, each cut to ``sequence_tokens``, until ``most_tokens`` are read."""
    encoder, start = text_encoder(tokenizer), np.array([start_id], np.int32)
    documents: list[Document] = []
    for number, row in enumerate(rows):
        heading, newline, _ = (text := row_text(row)).partition("\n")
        if not newline:
            continue
        whole, head = encode_texts(encoder, [text, heading])
        tokens = np.concatenate([start, whole])[: min(sequence_tokens, most_tokens)]
        if len(tokens) < 2:
            break
        documents.append(Document(str(row.get("document", number)), tokens, min(1 + len(head), len(tokens))))
        most_tokens -= len(tokens)
    return documents


def documentation_tasks(
    names: Sequence[str], documents: Sequence[Document], tokenizer: Tokenizer, *, train: NDArray[np.int32],
    sequence_tokens: int, seed: int,
) -> Questions:  # fmt: skip
    """The tasks of ``names``; their sequences are the documents', then those with needles.

    Args:
        names: Of the table above.
        documents: Held out.
        tokenizer: What their ids mean.
        train: (S, T) ids of training text, which says what leaves little doubt.
        sequence_tokens: No sequence is longer.
        seed: Of distractors and needles; each task has a stream of its own.
    """
    held_out = _HeldOut.of(tokenizer, documents)
    sequences, tasks = [document.tokens for document in documents], list[Task]()
    for name in names:
        rng = np.random.default_rng([seed, *name.encode()])
        if name == NEEDLE:
            added = list(_needle_texts(documents, tokenizer, sequence_tokens, rng))
            items = [item for number, text in enumerate(added, len(sequences)) for item in text.items(number)]
            sequences += [text.tokens for text in added]
        elif name == EXACT_MATCH:
            items = _exact_match(documents, train, rng)
        else:
            items = _MAKERS[name](held_out, rng)
        tasks.append(make_task(name, items, exact=name == EXACT_MATCH))
    return Questions(tuple(sequences), tuple(tasks))


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Documents, and what their tokens look like.

    Attributes:
        text: Of each token.
        kind: Of each token: word, name, part, ...
        ends_word: Whether a word is over when this token follows it.
    """

    documents: Sequence[Document]
    text: list[str]
    kind: list[str]
    ends_word: list[bool]

    @classmethod
    def of(cls, tokenizer: Tokenizer, documents: Sequence[Document]) -> _HeldOut:
        size = max([tokenizer.get_vocab_size(), *(int(document.tokens.max()) + 1 for document in documents)])
        text = [tokenizer.id_to_token(token) or "" for token in range(size)]
        kind = [next((name for name, form in _KINDS if form.fullmatch(each)), "other") for each in text]
        return cls(documents, text, kind, [not each[:1].isalpha() or each[0] in _SPACES for each in text])

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(document, position, token) of everything that is predicted."""
        for number, document in enumerate(self.documents):
            for position, token in enumerate(document.tokens[1:].tolist(), 1):
                yield number, position, token

    def is_word(self, number: int, position: int) -> bool:
        """Whether the token is a whole word of at least three letters."""
        tokens = self.documents[number].tokens
        if _WORD.fullmatch(self.text[tokens[position]]) is None:
            return False
        return position + 1 == len(tokens) or self.ends_word[tokens[position + 1]]


_Place = tuple[int, int, int]


def _cloze(held_out: _HeldOut, rng: np.random.Generator) -> list[Item]:
    places = [place for place in held_out.places() if held_out.is_word(*place[:2])]
    offered = [token for *_, token in places]
    return _choose(held_out, places, offered, lambda token: (held_out.kind[token], len(held_out.text[token])), rng)


def _multiple_choice(held_out: _HeldOut, rng: np.random.Generator) -> list[Item]:
    places = [place for place in held_out.places() if not held_out.is_word(*place[:2])]
    return _choose(held_out, places, [token for *_, token in places], held_out.kind.__getitem__, rng)


def _pairing(held_out: _HeldOut, rng: np.random.Generator) -> list[Item]:
    headings = (document.tokens[1 : document.heading_tokens].tolist() for document in held_out.documents)
    own = [{token for token in heading if _LETTER.search(held_out.text[token])} for heading in headings]
    places = [
        (number, position, token) for number, position, token in held_out.places()
        if position >= held_out.documents[number].heading_tokens and token in own[number]
    ]  # fmt: skip
    offered = [token for heading in own for token in sorted(heading)]
    return _choose(held_out, places, offered, held_out.kind.__getitem__, rng, own)


def _choose(
    held_out: _HeldOut, places: list[_Place], offered: Iterable[int], form: Callable[[int], object],
    rng: np.random.Generator, refused: Sequence[set[int]] | None = None,
) -> list[Item]:  # fmt: skip
    """Items whose choices are single tokens of one form; a place with too few distractors gives none."""
    pools: dict[object, list[int]] = defaultdict(list)
    for token in offered:
        pools[form(token)].append(token)
    items = []
    for number, position, token in _sample(places, rng):
        pool, choices = pools[form(token)], dict.fromkeys([token])
        without = refused[number] if refused is not None else ()
        for index in rng.integers(0, max(1, len(pool)), _DRAWS if pool else 0).tolist():
            if len(choices) < CHOICES and pool[index] not in without:
                choices[pool[index]] = None
        if len(choices) == CHOICES:
            order = [list(choices)[index] for index in rng.permutation(CHOICES)]
            probes = tuple(Probe(number, position - 1, (other,)) for other in order)
            items.append(Item(held_out.documents[number].name, probes, order.index(token)))
    return items


def _sample(places: list[_Place], rng: np.random.Generator) -> list[_Place]:
    if len(places) <= _MOST_ITEMS:
        return places
    return [places[index] for index in np.sort(rng.choice(len(places), _MOST_ITEMS, replace=False))]


def _exact_match(documents: Sequence[Document], train: NDArray[np.int32], rng: np.random.Generator) -> list[Item]:
    clear = _doubtless(train)
    places = [
        (number, position, int(tokens[position]))
        for number, tokens in enumerate(document.tokens for document in documents)
        for position in range(2, len(tokens)) if (int(tokens[position - 2]), int(tokens[position - 1])) in clear
    ]  # fmt: skip
    return [
        Item(documents[number].name, (Probe(number, position - 1, (token,)),))
        for number, position, token in _sample(places, rng)
    ]


def _doubtless(train: NDArray[np.int32]) -> set[tuple[int, int]]:
    """Pairs of tokens that were followed by one and the same token in most cases."""
    rows = train[: max(1, _COUNTED_TOKENS // train.shape[1])]
    triples = np.lib.stride_tricks.sliding_window_view(rows, 3, axis=1).reshape(-1, 3)
    found, times = np.unique(triples, axis=0, return_counts=True)
    first = np.flatnonzero(np.append(True, (found[1:, :2] != found[:-1, :2]).any(axis=1)))
    total, best = np.add.reduceat(times, first), np.maximum.reduceat(times, first)
    clear = (total >= _DOUBTLESS_TIMES) & (best >= _DOUBTLESS_SHARE * total)
    return {(a, b) for a, b, _ in found[first[clear]].tolist()}


@dataclass(frozen=True, slots=True)
class _NeedleText:
    """A text with needles before it and the same ones asked for behind it, in the order ``asked``."""

    name: str
    tokens: Ids
    values: tuple[tuple[int, ...], ...]
    asked: tuple[int, ...]
    first_answer: int
    step: int

    def items(self, sequence: int) -> Iterator[Item]:
        """The value of each needle among those of the others."""
        for turn, needle in enumerate(self.asked):
            position = self.first_answer - 1 + turn * self.step
            yield Item(self.name, tuple(Probe(sequence, position, value) for value in self.values), needle)


def _needle_texts(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int, rng: np.random.Generator
) -> Iterator[_NeedleText]:
    form: NeedleFormat = needle_format(tokenizer, key_words=1, value_words=1)
    room = length - 2 * _NEEDLES_A_TEXT * form.needle_tokens
    for document in documents if room > 0 else ():
        needles = draw_needles(form, _NEEDLES_A_TEXT, rng)
        written = [write_needle(form, needles, index) for index in range(_NEEDLES_A_TEXT)]
        asked = tuple(rng.permutation(_NEEDLES_A_TEXT).tolist())
        before = [document.tokens[:1], *written, document.tokens[1:room]]
        tokens = np.concatenate([*before, *(written[index] for index in asked)]).astype(np.int32)
        values = tuple(tuple(value.tolist()) for value in needles.values)
        if len(set(values)) == _NEEDLES_A_TEXT:
            at = sum(map(len, before)) + form.question_tokens
            yield _NeedleText(document.name, tokens, values, asked, at, form.needle_tokens)


_MAKERS: Mapping[str, Callable[[_HeldOut, np.random.Generator], list[Item]]] = {
    "cloze": _cloze, "multiple_choice": _multiple_choice, "pairing": _pairing,
}  # fmt: skip
