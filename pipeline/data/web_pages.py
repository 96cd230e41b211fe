"""Rules for pages of the web: Gopher's on quality and repetition, and C4's, by the limits of their language."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.characters import Script, code_points, scripts_of
from pipeline.data.repetition import repeated_share, repetition
from pipeline.data.rule_limits import LIMITS, OTHER, WebLimits
from pipeline.data.verdicts import Drop, DropReason, Keep, Verdict

_SIGN_ONLY = re.compile(r"[\W_]+")
_SPACES = re.compile(r"\s+")
_BULLETS = ("•", "-", "*", "·", "●", "○", "■", "◆", "▪", "※")
_ELLIPSES = ("...", "…", "。。。")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_MAX_WORD_CHARS = 1_000  # C4's code: a longer word is data, not text


@dataclass(frozen=True, slots=True)
class _Units:
    """A text's units as numbers, and what their limits ask of them."""

    ids: npt.NDArray[np.int64]  # (N,)
    lengths: npt.NDArray[np.int64]  # (N,) characters
    names: Set[str]  # the distinct units
    words: int  # units that are not punctuation alone
    word_chars: int
    letter_units: int


def gopher_quality(text: str, language: str) -> Verdict:
    """Gopher's rules on quality: how many words and how long, symbols, bullets, ellipses, letters, stop words.

    Words stand between spaces, as in Gopher. datatrove's default lets spaCy cut every comma off as a word of its own,
    which makes fewer words of prose have a letter, and drops most documentation for that; given words by spaces it
    agrees with these rules on every document of the benchmark. Unlike there, all that is sign and no letter or digit
    is no word (there, those of a fixed list), and more signs than "-" and "•" are bullets: Markdown and Chinese pages
    use others.
    """
    limits = LIMITS.get(language, OTHER)
    units = _measure(text, limits.unit)
    reason = _word_fault(units, limits) or _line_fault(text, limits, len(units.ids))
    if reason is None and units.letter_units < limits.min_letter_unit_ratio * len(units.ids):
        reason = DropReason.FEW_LETTER_WORDS
    if reason is None and len(units.names & limits.stop_words) < limits.min_stop_words:
        reason = DropReason.FEW_STOP_WORDS
    return Drop(reason) if reason else Keep(text)


def gopher_repetition(text: str, language: str) -> Verdict:
    """Gopher's rules on repetition: paragraphs, lines, the most frequent phrase, passages that stood before.

    As datatrove, but that a phrase which stands once repeats nothing: there the first of them counts as the most
    frequent one, and a page that begins with a long address goes.
    """
    limits = LIMITS.get(language, OTHER)
    count_ratio, char_ratio = repeated_share(_split(text, 2), len(text))
    if count_ratio > limits.max_repeated_paragraph_ratio or char_ratio > limits.max_repeated_paragraph_char_ratio:
        return Drop(DropReason.REPEATED_PARAGRAPHS)
    count_ratio, char_ratio = repeated_share(_split(text, 1), len(text))
    if count_ratio > limits.max_repeated_line_ratio or char_ratio > limits.max_repeated_line_char_ratio:
        return Drop(DropReason.REPEATED_LINES)
    units = _measure(text, limits.unit)
    reason = repetition(units.ids, units.lengths, len(text), limits.unit == "words", limits)
    return Drop(reason) if reason else Keep(text)


def c4_lines(text: str, language: str) -> Verdict:
    """C4's rules: lines that are no text go, and pages with filler text, curly brackets or few sentences.

    As in C4's own code and in datatrove, in their order: a bracket or filler text counts only in a line that the rules
    before it leave, so that a short line of code, or the notice that scripts are off, costs a page that line alone.
    Unlike there, the lines that stay keep their indentation, which says something in code, lists and verse.
    """
    limits = LIMITS.get(language, OTHER)
    lowered = text.lower()
    lines = [line for line in text.split("\n") if not _has_long_word(line, limits)]
    if "[" in text:
        lines = [_CITATION.sub("", line) for line in lines]
    lines = [line for line in lines if _is_text(line, limits)]
    if "lorem ipsum" in lowered and any("lorem ipsum" in line.lower() for line in lines):
        return Drop(DropReason.LOREM_IPSUM)
    lines = _without(("javascript",), lines, lowered)
    if "{" in text and any("{" in line for line in lines):
        return Drop(DropReason.CURLY_BRACKET)
    lines = _without(limits.policy_phrases, lines, lowered)
    kept = "\n".join(lines).strip()
    # Each line is a sentence at least; its ends inside lines are sought only where the lines are too few.
    if len(lines) < limits.min_sentences and len(lines) + _count(limits.sentence_end, kept) < limits.min_sentences:
        return Drop(DropReason.FEW_SENTENCES)
    return Keep(kept)


def _split(text: str, line_ends: int) -> list[str]:
    """Split at runs of at least one line end, or of two: fast where no run is longer than two."""
    if "\n\n\n" in text:
        return re.split(rf"\n{{{line_ends},}}", text)
    return text.split("\n\n") if line_ends == 2 else text.replace("\n\n", "\n").split("\n")


@functools.lru_cache(maxsize=1)  # quality and repetition look at the same text, one after the other
def _measure(text: str, unit: Literal["words", "characters"]) -> _Units:
    return _measure_words(text) if unit == "words" else _measure_characters(text)


def _measure_words(text: str) -> _Units:
    words = text.split()
    index: defaultdict[str, int] = defaultdict(itertools.count().__next__)  # in the order of the first ones
    ids = np.fromiter(map(index.__getitem__, words), np.int64, len(words))
    lengths = np.fromiter(map(len, index), np.int64, len(index))
    counts = np.bincount(ids, minlength=len(index))
    letters, proper = np.ones(len(index), np.bool_), np.ones(len(index), np.bool_)
    # Each distinct word is looked at once, and only at its first character in most: there are few of the others.
    for number, name in enumerate(index):
        if not name[0].isalpha() and not any(map(str.isalpha, name)):
            letters[number] = False
            proper[number] = _SIGN_ONLY.fullmatch(name) is None
    return _Units(
        ids=ids,
        lengths=lengths[ids],
        names=index.keys(),
        words=int(counts[proper].sum()),
        word_chars=int((counts * lengths)[proper].sum()),
        letter_units=int(counts[letters].sum()),
    )


def _measure_characters(text: str) -> _Units:
    characters = _SPACES.sub("", text)
    codes = code_points(characters)
    letters = int((scripts_of(codes) != Script.NONE).sum())
    return _Units(
        ids=codes.astype(np.int64),
        lengths=np.ones(len(codes), np.int64),
        names=frozenset(characters),
        words=letters,
        word_chars=letters,
        letter_units=letters,
    )


def _word_fault(units: _Units, limits: WebLimits) -> DropReason | None:
    if units.words < limits.min_words:
        return DropReason.FEW_WORDS
    if units.words > limits.max_words:
        return DropReason.MANY_WORDS
    if limits.word_chars is not None:
        shortest, longest = limits.word_chars
        if not shortest <= units.word_chars / units.words <= longest:
            return DropReason.WORD_LENGTH
    return None


def _line_fault(text: str, limits: WebLimits, num_units: int) -> DropReason | None:
    most = limits.max_hash_ratio * num_units
    ellipses = text.count("...") + text.count("…") - text.count("……")  # the last is one, in Chinese
    if text.count("#") > most or ellipses > most:
        return DropReason.MANY_SYMBOLS
    lines = text.split("\n")
    filled = [line for line in lines if line]
    if limits.min_line_chars is not None and sum(map(len, filled)) < limits.min_line_chars * len(filled):
        return DropReason.SHORT_LINES
    if sum([line.lstrip().startswith(_BULLETS) for line in filled]) > limits.max_bullet_line_ratio * len(lines):
        return DropReason.BULLET_LIST
    if sum([line.endswith(_ELLIPSES) for line in filled]) > limits.max_cut_line_ratio * len(lines):
        return DropReason.CUT_LINES
    return None


def _has_long_word(line: str, limits: WebLimits) -> bool:
    if limits.unit != "words" or len(line) <= _MAX_WORD_CHARS:
        return False
    return any(len(word) > _MAX_WORD_CHARS for word in line.split())


def _is_text(line: str, limits: WebLimits) -> bool:
    """Whether a line has units enough and ends as it must."""
    units = len(line.split(None, limits.min_line_units)) if limits.unit == "words" else len(line)
    if units < limits.min_line_units:
        return False
    return limits.terminal_marks is None or (line.endswith(limits.terminal_marks) and not line.endswith("..."))


def _without(phrases: tuple[str, ...], lines: list[str], lowered: str) -> list[str]:
    """The lines that hold none of the phrases; ``lowered``, the whole text, mostly says so at once."""
    phrases = tuple(phrase for phrase in phrases if phrase in lowered)
    if not phrases:
        return lines
    return [line for line in lines if not any(phrase in line.lower() for phrase in phrases)]


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
