"""What a rule says of a text: keep it, perhaps changed, or drop it for one of a closed set of reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class DropReason(StrEnum):
    """Every reason for which cleaning drops a document; the words of the report."""

    # basic: any text
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    UNDECODABLE = "undecodable"
    FEW_LETTERS = "few_letters"
    # language
    OTHER_LANGUAGE = "other_language"
    MIXED_LANGUAGE = "mixed_language"
    # Gopher: quality
    FEW_WORDS = "few_words"
    MANY_WORDS = "many_words"
    WORD_LENGTH = "word_length"
    SHORT_LINES = "short_lines"
    MANY_SYMBOLS = "many_symbols"
    BULLET_LIST = "bullet_list"
    CUT_LINES = "cut_lines"
    FEW_LETTER_WORDS = "few_letter_words"
    FEW_STOP_WORDS = "few_stop_words"
    # Gopher: repetition
    REPEATED_PARAGRAPHS = "repeated_paragraphs"
    REPEATED_LINES = "repeated_lines"
    REPEATED_PHRASE = "repeated_phrase"
    REPEATED_PASSAGES = "repeated_passages"
    # C4
    LOREM_IPSUM = "lorem_ipsum"
    CURLY_BRACKET = "curly_bracket"
    FEW_SENTENCES = "few_sentences"
    # the corpus around it
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    CONTAMINATED = "contaminated"
    PERSONAL_DATA = "personal_data"


@dataclass(frozen=True, slots=True)
class Keep:
    """The text is kept in this form; a rule may have removed lines of it."""

    text: str


@dataclass(frozen=True, slots=True)
class Drop:
    """The text is dropped."""

    reason: DropReason


Verdict = Keep | Drop
Rule = Callable[[str, str], Verdict]  # (normalised text, language code)


def apply_rules(text: str, language: str, rules: Iterable[Rule]) -> Verdict:
    """Apply rules in order, each to the text that the one before kept; the first drop ends it."""
    for rule in rules:
        verdict = rule(text, language)
        if isinstance(verdict, Drop):
            return verdict
        text = verdict.text
    return Keep(text)
