"""Rules that keep a text or drop it with a reason: basic ones for any text, web ones by language."""

from __future__ import annotations

from functools import partial

from pipeline.data.characters import count_letters
from pipeline.data.verdicts import Drop, DropReason, Keep, Rule, Verdict, apply_rules

__all__ = ["Drop", "DropReason", "Keep", "Rule", "Verdict", "apply_rules", "basic_rules", "web_rules"]


def basic_rules(min_chars: int, max_chars: int) -> tuple[Rule, ...]:
    """Rules that any training text must pass: length in characters, decodable, enough letters.

    Args:
        min_chars: Shortest text kept, 1 or more; 40 suits documentation, 200 web pages.
        max_chars: Longest text kept, at least ``min_chars``; 100,000 is usual.
    """
    return (partial(_length, min_chars=min_chars, max_chars=max_chars), _decodable, _enough_letters)


def web_rules(min_chars: int, max_chars: int) -> tuple[Rule, ...]:
    return basic_rules(min_chars, max_chars)


def _length(text: str, language: str, *, min_chars: int, max_chars: int) -> Verdict:
    if len(text) < min_chars:
        return Drop(DropReason.TOO_SHORT)
    return Drop(DropReason.TOO_LONG) if len(text) > max_chars else Keep(text)


def _decodable(text: str, language: str) -> Verdict:
    return Drop(DropReason.UNDECODABLE) if text.count("\ufffd") * 100 > len(text) else Keep(text)


def _enough_letters(text: str, language: str) -> Verdict:
    return Drop(DropReason.FEW_LETTERS) if count_letters(text) * 4 < len(text) else Keep(text)
