"""Rules that keep a text or drop it with a reason: basic ones for any text, web ones by language."""

from __future__ import annotations

from functools import partial

from pipeline.data.characters import count_letters
from pipeline.data.language import script_ratio
from pipeline.data.rule_limits import LIMITS, OTHER
from pipeline.data.verdicts import Drop, DropReason, Keep, Rule, Verdict, apply_rules
from pipeline.data.web_pages import c4_lines, gopher_quality, gopher_repetition

__all__ = ["Drop", "DropReason", "Keep", "Rule", "Verdict", "apply_rules", "basic_rules", "web_rules"]


def basic_rules(min_chars: int, max_chars: int) -> tuple[Rule, ...]:
    """Rules that any training text must pass: length in characters, decodable, enough letters.

    Args:
        min_chars: Shortest text kept, 1 or more; 40 suits documentation, 200 web pages.
        max_chars: Longest text kept, at least ``min_chars``; 100,000 is usual.
    """
    return (partial(_length, min_chars=min_chars, max_chars=max_chars), _decodable, _enough_letters)


def web_rules(min_chars: int, max_chars: int) -> tuple[Rule, ...]:
    """Rules for pages of the web: the basic ones, one language, Gopher's quality and repetition, C4's lines.

    The limits are those of the text's language in ``rule_limits.LIMITS``; languages that the table lacks are held to
    limits that say nothing of words. C4's rules remove lines, so that the length is looked at again.

    Args:
        min_chars: As for ``basic_rules``.
        max_chars: As for ``basic_rules``.

    Source: Rae et al. 2021, arXiv 2112.11446, A.1.1; Raffel et al. 2020, arXiv 1910.10683, section 2.2.
    """
    basic = basic_rules(min_chars, max_chars)
    return (*basic, one_language, gopher_quality, gopher_repetition, c4_lines, basic[0])


def one_language(text: str, language: str) -> Verdict:
    """Drop a text much of which is written in scripts that its language does not use."""
    limits = LIMITS.get(language, OTHER)
    if script_ratio(text, language) < limits.min_script_ratio:
        return Drop(DropReason.MIXED_LANGUAGE)
    return Keep(text)


def _length(text: str, language: str, *, min_chars: int, max_chars: int) -> Verdict:
    if len(text) < min_chars:
        return Drop(DropReason.TOO_SHORT)
    return Drop(DropReason.TOO_LONG) if len(text) > max_chars else Keep(text)


def _decodable(text: str, language: str) -> Verdict:
    return Drop(DropReason.UNDECODABLE) if text.count("\ufffd") * 100 > len(text) else Keep(text)


def _enough_letters(text: str, language: str) -> Verdict:
    return Drop(DropReason.FEW_LETTERS) if count_letters(text) * 4 < len(text) else Keep(text)
