"""Which language a text is in: by its script where that decides, by a packaged model where it does not."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.characters import Script, count_scripts

UNDETERMINED = "und"  # ISO 639-2's code

_SAMPLE_CHARS = 300  # the model is right on all English texts of 200 characters that were tried, and reads 2 MB/s
_MIN_KANA_RATIO = 0.1  # of kana and Han; Chinese decorates with a の now and then
_MIN_HANGUL_RATIO = 0.3  # of the letters
_LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f]+")
# Characters as Japan simplified them, and as China never wrote them.
_JAPANESE_HAN = re.compile("[込働畑峠円気広図対駅売読済発験様続変戻歳覚営総歩戦団単沢竜桜検権県鉄塩払拝駄渋渓縄釈顔]")

# How much more often than a usual language these are met; decides where a few words say little.
_ENGLISH_WEIGHT, _COMMON_WEIGHT, _USUAL_WEIGHT, _RARE_WEIGHT = 30.0, 4.0, 1.0, 0.2
_COMMON = frozenset(("ar", "cs", "da", "de", "el", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "nl", "no"))
_COMMON |= frozenset(("pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "ur", "vi"))

_WRITTEN_IN = (
    ("zh", (Script.HAN,)),
    ("ja", (Script.HAN, Script.KANA)),
    ("ko", (Script.HANGUL, Script.HAN)),
    ("be bg kk ky mk mn ru tg tt uk ba", (Script.CYRILLIC,)),
    ("el grc", (Script.GREEK,)),
    ("ar ary arz fa ps sdh ug ur", (Script.ARABIC,)),
    ("he hbo", (Script.HEBREW,)),
    ("hi mr ne sa gom", (Script.DEVANAGARI,)),
    ("th", (Script.THAI,)),
    ("af br ca cs cy da de en eo es et eu fi fr ga gl hr hu id is it la lt lv ms nl nn no pl pt ro", (Script.LATIN,)),
    ("sk sl sq sv sw tl tr vi", (Script.LATIN,)),
)
SCRIPTS: Mapping[str, tuple[Script, ...]] = {code: scripts for codes, scripts in _WRITTEN_IN for code in codes.split()}


@dataclass(frozen=True, slots=True)
class Language:
    """An ISO 639 code, or ``und`` where a text has no letters, and how sure it is, 0..1."""

    code: str
    probability: float


def identify(text: str) -> Language:
    """Name the language of a text.

    Chinese, Japanese and Korean are told by their scripts: any length will do. Chinese is one language here, whatever
    its script and region. For other scripts py3langid's packaged model answers, weighted by how common a language
    is, so that a word or two of English stay English. A long text is judged by its beginning, middle and end.

    Source: M. Lui and T. Baldwin 2012, langid.py (https://aclanthology.org/P12-3005); A. Barbaresi, py3langid.
    """
    sample = _sample(text)
    counts = count_scripts(sample)
    letters = int(counts[1:].sum())
    if letters == 0:
        return Language(UNDETERMINED, 0.0)
    han, kana, hangul = (int(counts[script]) for script in (Script.HAN, Script.KANA, Script.HANGUL))
    if hangul >= _MIN_HANGUL_RATIO * letters and hangul > kana:
        return Language("ko", (hangul + han) / letters)
    # A Han character says about as much as a word: a Chinese text may name much in English.
    words = len(_LATIN_WORD.findall(sample)) if han + kana else 0
    if han + kana and han + kana >= words:
        japanese = kana >= _MIN_KANA_RATIO * (han + kana) or (kana + han < 40 and _JAPANESE_HAN.search(sample))
        return Language("ja" if japanese else "zh", (han + kana) / (han + kana + words))
    return _ask_model(sample)


def script_ratio(text: str, language: str) -> float:
    """The share of a text's letters that belong to the scripts of a language; 1 where they are not known."""
    scripts = SCRIPTS.get(language)
    if scripts is not None and Script.LATIN in scripts and text.isascii():
        return 1.0
    counts = count_scripts(text)
    letters = int(counts[1:].sum())
    if scripts is None or letters == 0:
        return 1.0
    return float(sum(int(counts[script]) for script in scripts) / letters)


def _sample(text: str) -> str:
    if len(text) <= _SAMPLE_CHARS:
        return text
    part = _SAMPLE_CHARS // 3
    middle = (len(text) - part) // 2
    return f"{text[:part]} {text[middle : middle + part]} {text[-part:]}"


def _ask_model(sample: str) -> Language:
    weighted = {code: ratio * _weight(code) for code, ratio in _identifier().rank(sample)}
    weighted.pop("zxx", None)  # no language at all
    code = max(weighted, key=weighted.__getitem__)
    return Language(code, weighted[code] / sum(weighted.values()))


@functools.cache
def _weight(code: str) -> float:
    if code == "en":
        return _ENGLISH_WEIGHT
    if code in _COMMON:
        return _COMMON_WEIGHT
    return _USUAL_WEIGHT if len(code) == 2 else _RARE_WEIGHT


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
