"""One written form: what is repaired, folded and removed, and that a second time changes nothing."""

from __future__ import annotations

import itertools
import time
import unicodedata

import ftfy
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.data.normalize import normalize
from pipeline.data.sources import python_documents

PIECES = (
    "\n\r\t \u200b\ufeff\x00\x85\u0301\u0323eaé가\u1100\u1161\ud800\udc00Ãâ€™Â©\u00a0\u00ad\u2028\u2066ＡＢ（，ﾊﾞ\uffff"
    "\u200d\u200cﾞ👩🚀🏴\U000e0067می\u0915\u094d\ufe0f"
)
TEXT = st.text(st.one_of(st.characters(), st.sampled_from(PIECES)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cafe\u0301", "Café"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("tab\tkept, bell\x07 and\x85 escape\x1b gone", "tab\tkept, bell and escape gone"),
        ("bell\x07, feed\x0b\x0c, separator\x1f and delete\x7f", "bell, feed, separator and delete"),
        ("zero\u200bwidth\ufeff \u2060joined\u200e", "zerowidth joined"),
        ("right\u202eto\u2066left", "righttoleft"),
        ("soft\u00adhyphen", "softhyphen"),
        ("trailing   \nspaces\t\n", "trailing\nspaces"),
        ("one\n\n\n\n\ntwo\n \n \nthree", "one\n\ntwo\n\nthree"),
        ("e\u200b\u0301", "é"),
        ("lone \ud800 surrogate, \ud83d\ude00 pair", "lone \ufffd surrogate, 😀 pair"),
        ("    indented code", "indented code"),
    ],
)
def test_lines_and_invisible_characters(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ＡＢＣ１２３＋－＝％＠［］", "ABC123+-=%@[]"),
        ("你好，世界！真的？对：是；（一）。～", "你好，世界！真的？对：是；（一）。～"),
        ("\u3000\u3000段落\u3000空格", "段落 空格"),
        ("￥５，￡３", "¥5，£3"),
        ("ﾊﾝﾊﾞｰｸﾞとｶﾞ", "ハンバーグとガ"),
        ("。「」、《》…—", "。「」、《》…—"),
    ],
)
def test_widths(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",  # Persian: a non-joiner inside a word
        "क्\u200dष",  # Devanagari: a half form
        "👩\u200d🚀 and 👩🏽\u200d💻 and ❤\ufe0f\u200d🔥",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # England's flag
        "葛\U000e0100",  # a variant of a character
    ],
)
def test_joiners_that_mean_something_stay(text: str) -> None:
    assert normalize(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\u200db", "ab"),
        ("word\u200c", "word"),
        ("你\u200c好", "你好"),
        ("می\u200c ", "می"),
        ("👩\u200d", "👩"),
        ("م\u200c\u200cی", "می"),
        ("x\U000e0041\U000e0042y", "xy"),  # tags nobody sees
    ],
)
def test_joiners_that_mean_nothing_go(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize("encoding", ["latin-1", "sloppy-windows-1252", "macroman", "cp437"])
@pytest.mark.parametrize("text", ["Pão de Açúcar está à venda", "“quoted” — it’s", "你好，世界", "Ünïcödé ✔"])
def test_utf8_that_was_read_otherwise_is_repaired(text: str, encoding: str) -> None:
    damaged = text.encode().decode(encoding)
    assert normalize(f"fine\n{damaged}\nfine") == f"fine\n{ftfy.fix_encoding(damaged)}\nfine".replace("\x85", "")
    if encoding == "sloppy-windows-1252":
        assert normalize(damaged) == text


def test_a_no_break_space_that_became_a_space_is_repaired() -> None:
    assert normalize("voilÃ  le travail") == "voilà le travail"


def test_twice_damaged_is_repaired_too() -> None:
    damaged = "Café".encode().decode("latin-1").encode().decode("latin-1")
    assert normalize(damaged) == "Café"


@pytest.mark.parametrize("text", ["Él está aquí", "naïve café à la carte", "Привет, мир", "50 °C × 2", "ÀÉÎ", "Ã"])
def test_what_is_right_is_not_repaired(text: str) -> None:
    assert normalize(text) == text


@given(TEXT)
@example("\u200cÃ\u200c©")
@example("Ã\x00©")
@example("ﾊ\u200bﾞ")
def test_normalisation_is_idempotent_and_leaves_what_it_promises(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not [c for c in once if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not set(once) & set("\u00ad\u200b\u200e\u200f\u2028\u2029\u202e\u2060\u2066\ufeff\uffff１Ａ")
    assert "\n\n\n" not in once and not any(line != line.rstrip() for line in once.split("\n"))
    once.encode()  # no surrogates


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_printable_ascii_loses_only_spaces_at_its_ends(text: str) -> None:
    assert normalize(text) == text.strip()


def test_the_documentation_of_python_keeps_its_words() -> None:
    """Nothing of it is damaged or full-width: only line ends and trailing spaces may change."""
    documents = list(itertools.islice(python_documents(), 1_500))
    changed = [d.source for d in documents if normalize(d.text).split() != d.text.split()]
    assert changed == []


@pytest.mark.parametrize(
    "piece", ["a", " ", "1", "é", "Ã", "Ã\u00a0", "你", "\u200d", "\u0301", "\n", " \n", "â€", "Ａ"]
)
def test_a_long_line_of_one_character_takes_no_longer_than_reading_it(piece: str) -> None:
    text = piece * (1_000_000 // len(piece)) + "x"
    started = time.process_time()
    normalize(text)
    assert time.process_time() - started < 5, "a second where two cores are shared; a quadratic walk takes minutes"
