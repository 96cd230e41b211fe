"""Thresholds of the web rules by language, in one table, with the source of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Grams = tuple[tuple[int, float], ...]  # (units in a gram, largest share of the characters), shortest gram first


@dataclass(frozen=True, slots=True)
class WebLimits:
    """What a page of one language must keep to. Ratios are 0..1; None switches a limit off.

    A unit is a word or a sign between words (``words``), or one character that is no space (``characters``), for
    languages that put no spaces between words.
    """

    unit: Literal["words", "characters"]
    min_script_ratio: float  # letters of the language's own scripts
    min_words: int  # units that are not punctuation alone
    max_words: int
    word_chars: tuple[float, float] | None  # mean length of such units
    min_line_chars: float | None  # mean length of a line that is not empty
    max_hash_ratio: float  # "#" a unit, and ellipses a unit
    max_bullet_line_ratio: float
    max_cut_line_ratio: float  # lines that end in an ellipsis
    min_letter_unit_ratio: float  # units with a letter
    stop_words: frozenset[str]
    min_stop_words: int  # distinct ones
    max_repeated_line_ratio: float
    max_repeated_line_char_ratio: float
    max_repeated_paragraph_ratio: float
    max_repeated_paragraph_char_ratio: float
    top_grams: Grams  # the most frequent gram's share of the characters
    repeated_grams: Grams  # the share of characters in grams that stood before
    min_line_units: int  # a shorter line is removed
    min_sentences: int
    sentence_end: str  # a regular expression for one inside a line
    policy_phrases: tuple[str, ...]  # lines with one of them, in lower case, are removed
    terminal_marks: tuple[str, ...] | None  # lines that end in none of them are removed


# Gopher: Rae et al. 2021, arXiv 2112.11446, section A.1.1 and table A1. C4: Raffel et al. 2020, arXiv 1910.10683,
# section 2.2, and its reference code for citations and policies. Lines without a terminal mark stay, as in FineWeb
# (Penedo et al. 2024, arXiv 2406.17557, section 3.5), which found that the rule removes 30 % of all tokens.
ENGLISH = WebLimits(
    unit="words",
    min_script_ratio=0.8,
    min_words=50,
    max_words=100_000,
    word_chars=(3, 10),
    min_line_chars=None,
    max_hash_ratio=0.1,
    max_bullet_line_ratio=0.9,
    max_cut_line_ratio=0.3,
    min_letter_unit_ratio=0.8,
    stop_words=frozenset(("the", "be", "to", "of", "and", "that", "have", "with")),
    min_stop_words=2,
    max_repeated_line_ratio=0.3,
    max_repeated_line_char_ratio=0.2,
    max_repeated_paragraph_ratio=0.3,
    max_repeated_paragraph_char_ratio=0.2,
    top_grams=((2, 0.20), (3, 0.18), (4, 0.16)),
    repeated_grams=((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
    min_line_units=3,
    min_sentences=5,
    sentence_end=r"[.!?][\"'”’)\]]* (?=\S)",
    policy_phrases=("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"),
    terminal_marks=None,
)

# Chinese words have 1.6 characters on average, so a limit on n words is one on 1.6 n characters. Repetition and stop
# words: FineWeb-2's configuration for cmn_Hani (Penedo et al. 2025, arXiv 2506.20920). Mean line and share of
# Han: EvalWeb (ChineseWebText, Chen et al. 2023, arXiv 2311.01149). Letters: data-juicer's Chinese recipe
# (alphanumeric_filter, 0.60). Lines: C4 and CLUECorpus2020 (Xu et al. 2020, arXiv 2003.01355). Own: three sentences, as
# a Chinese one holds about two English ones; the phrases of policies and of registration.
CHINESE = replace(
    ENGLISH,
    unit="characters",
    min_script_ratio=0.3,
    min_words=80,
    max_words=160_000,
    word_chars=None,
    min_line_chars=10,
    max_hash_ratio=0.0625,
    min_letter_unit_ratio=0.6,
    stop_words=frozenset("的年在月是和日了於為有被人中为他與後也而由"),
    max_repeated_line_ratio=0.287,
    top_grams=((3, 0.256), (5, 0.201), (6, 0.171)),
    repeated_grams=((8, 0.198), (10, 0.182), (11, 0.167), (13, 0.154), (14, 0.14), (16, 0.127)),
    min_line_units=5,
    min_sentences=3,
    sentence_end=r"[。！？!?；;…]+[”’」』）\")]*(?=[^\n])",
    policy_phrases=("使用条款", "服务条款", "隐私政策", "隐私权政策", "免责声明", "版权所有", "icp备", "cookie"),
)

# Japanese as Chinese, with FineWeb-2's configuration for jpn_Jpan.
JAPANESE = replace(
    CHINESE,
    stop_words=frozenset("のにをはたてがとで年し月れさ"),
    max_repeated_line_ratio=0.375,
    top_grams=((3, 0.121), (5, 0.129), (6, 0.145)),
    repeated_grams=((8, 0.307), (10, 0.283), (11, 0.264), (13, 0.248), (14, 0.234), (16, 0.223)),
    policy_phrases=("利用規約", "プライバシーポリシー", "cookie"),
)

# Gopher's limits that say nothing of a language's words; for languages that the table lacks.
OTHER = replace(
    ENGLISH,
    word_chars=None,
    min_letter_unit_ratio=0.7,
    stop_words=frozenset(),
    min_stop_words=0,
    sentence_end=r"[.!?।؟][\"'”’)\]]* (?=\S)|[。！？](?=[^\n])",
)

LIMITS: dict[str, WebLimits] = {"en": ENGLISH, "zh": CHINESE, "ja": JAPANESE}
