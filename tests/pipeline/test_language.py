"""Languages of short texts by script, of others by the packaged model; characters counted as str counts them."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.characters import Script, code_points, count_letters, count_scripts
from pipeline.data.language import Language, identify, script_ratio
from pipeline.data.sources import python_documents


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ("en", "Hello|ok|Yes|Thank you|What is 2 + 2?|def f(x): return x|import numpy as np|The cat sat on the mat."),
        (
            "zh",
            "你好|东京|這是繁體中文|用 Python 写 tests|使用 Python 的 list comprehension 语法|鲜の每日橙汁今天上市了",
        ),
        ("ja", "こんにちは|カタカナ|東京大学図書館|彼は先生です|Pythonのリスト内包表記を使う|駅"),
        ("ko", "안녕|안녕하세요|한국어 문장입니다. Python 사용"),
        ("de", "Guten Tag|Danke schön|Wie geht es dir?|Das ist ein kurzer Satz."),
        ("fr", "Merci beaucoup|Bonjour tout le monde|Je ne sais pas"),
        ("es", "Gracias|Hola, ¿cómo estás?"),
        ("it", "Buongiorno a tutti"),
        ("pt", "Obrigado pela ajuda"),
        ("pl", "Dziękuję bardzo"),
        ("ru", "Сегодня хорошая погода, и мы идём гулять."),
        ("ar", "مرحبا بكم في بيتنا"),
        ("th", "สวัสดีครับ"),
        ("el", "Καλημέρα σας"),
        ("und", "|123|2 + 2 = 4|!?|😀"),
    ],
)
def test_short_texts(code: str, texts: str) -> None:
    found = {text: identify(text).code for text in texts.split("|")}
    assert found == dict.fromkeys(found, code)


def test_no_text_is_in_no_language() -> None:
    """The model has a label for that, and would give it here; whether this is text is for the rules to say."""
    assert identify("0x1f 0xa3 ff aa bb dd 00").code == "om"


def test_probabilities_say_how_sure_it_is() -> None:
    assert identify("你好，世界") == Language("zh", 1.0)
    assert identify("") == Language("und", 0.0)
    assert identify("ok").probability < 0.5 < 0.99 < identify("The cat sat on the mat and it was happy.").probability
    assert identify("我爱 Python").probability == pytest.approx(2 / 3)  # two characters beside one word


def test_documentation_is_english() -> None:
    texts = [document.text for document in itertools.islice(python_documents(), 600)]
    codes = Counter(identify(text).code for text in texts if len(text) > 100)
    assert codes == {"en": codes.total()}


def test_a_long_text_is_judged_by_three_parts_of_it() -> None:
    """Not by its first page alone, and in the time that a short one takes."""
    english, german = "It was a cold day and the wind blew. ", "Es war ein kalter Tag und der Wind wehte. "
    assert identify(english * 10 + german * 100_000).code == "de"
    assert identify(german * 10 + english * 100_000).code == "en"


@given(st.text(st.one_of(st.characters(), st.sampled_from("aé你かカ가привет한ب\ud800"))))
def test_any_text_has_a_language_and_always_the_same(text: str) -> None:
    language = identify(text)
    assert language == identify(text)
    assert 0 <= language.probability <= 1
    assert (language.code == "und") is not any(character.isalpha() for character in text)


@pytest.mark.parametrize(
    ("text", "language", "ratio"),
    [
        ("abcd 你好", "en", 4 / 6),
        ("abcd 你好", "zh", 2 / 6),
        ("かな漢字x", "ja", 4 / 5),
        ("123", "en", 1.0),
        ("abc", "xx", 1.0),
    ],
)
def test_share_of_a_languages_scripts(text: str, language: str, ratio: float) -> None:
    assert script_ratio(text, language) == pytest.approx(ratio)


def test_letters_are_those_of_str() -> None:
    for first in range(0, 0x110000, 0x1000):
        text = "".join(map(chr, range(first, first + 0x1000)))
        assert count_letters(text) == sum(map(str.isalpha, text)), hex(first)


@given(st.text(st.characters(codec="ascii")))
def test_letters_of_ascii_are_counted_as_those_of_any_text(text: str) -> None:
    assert count_letters(text) == count_letters(text + "é") - 1 == sum(map(str.isalpha, text))
    assert (count_scripts(text + "é")[Script.LATIN], count_scripts(text).sum()) == (count_letters(text) + 1, len(text))


def test_scripts_of_known_characters() -> None:
    text = "aZéßﬁ 中㐀𠀀々 あカ가ㄱ Жя Ωα ابت אב नम กข 1。"
    counts = dict(zip(Script, count_scripts(text).tolist(), strict=True))
    latin, han = {Script.LATIN: 5, Script.HAN: 4}, {Script.KANA: 2, Script.HANGUL: 2, Script.CYRILLIC: 2}
    others = {Script.GREEK: 2, Script.ARABIC: 3, Script.HEBREW: 2, Script.DEVANAGARI: 2, Script.THAI: 2}
    assert counts == latin | han | others | {Script.NONE: len(text) - 26, Script.OTHER: 0}


@given(st.text())
def test_code_points_are_those_of_ord(text: str) -> None:
    assert code_points(text).tolist() == list(map(ord, text))
