"""What is kept, what is dropped and why, and which side of the split it falls on."""

from __future__ import annotations

import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.cleaning import CleaningReport, Row, clean, drop_reason, normalize, renderings
from pipeline.data.sources import Document

TEXT = st.text(
    st.one_of(st.characters(), st.sampled_from("\n\r\t \u200b\ufeff\x00\x85\u0301\u0323eaé가\u1100\u1161\ud800"))
)
WORDS = "some ordinary words, enough of them to be kept "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("short", "too_short"),
        (WORDS * 20, "too_long"),
        ("letters " * 10 + "\ufffd", "undecodable"),
        ("12345 67890 " * 5 + "letters", "few_letters"),
        (WORDS, None),
        ("日本語の文章です" * 5, None),
    ],
)
def test_each_reason_to_drop(text: str, reason: str | None) -> None:
    assert drop_reason(text, 40, 500) == reason
    report, rows = _clean([text])
    assert report.dropped == ({reason: 1} if reason else {})
    assert report.examples == ({reason: ["source 0"]} if reason else {})
    assert (report.documents, report.kept, len(rows)) == (1, 0 if reason else 1, 0 if reason else 1)


@pytest.mark.parametrize(
    ("text", "length", "reason"),
    [("a" * 40, 40, None), ("a" * 39, 39, "too_short"), ("a" * 500, 500, None), ("a" * 501, 501, "too_long"),
     ("a" * 99 + "\ufffd", 100, None), ("a" * 98 + "\ufffd", 99, "undecodable"), ("a" * 10 + "1" * 30, 40, None),
     ("a" * 10 + "1" * 31, 41, "few_letters")],
)  # fmt: skip
def test_bounds_are_where_they_say(text: str, length: int, reason: str | None) -> None:
    assert len(text) == length and drop_reason(text, 40, 500) == reason


def test_duplicates_are_those_with_the_same_normalised_text() -> None:
    report, rows = _clean([WORDS, "another text: " + WORDS, WORDS.rstrip() + " \r\n", WORDS])
    assert report.dropped == {"duplicate": 2} and report.kept == 2 == len(rows)
    assert report.examples == {"duplicate": ["source 2", "source 3"]}


def test_examples_are_few_and_counts_are_all() -> None:
    report, _ = _clean(["x"] * 9)
    assert report.dropped == {"too_short": 9} and report.examples == {"too_short": ["source 0", "source 1", "source 2"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cafe\u0301", "Café"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("tab\tkept, bell\x07 and\x85 escape\x1b gone", "tab\tkept, bell and escape gone"),
        ("zero\u200bwidth\ufeff \u2060joined\u200e", "zerowidth joined"),
        ("trailing   \nspaces\t\n", "trailing\nspaces"),
        ("one\n\n\n\n\ntwo\n \n \nthree", "one\n\ntwo\n\nthree"),
        ("e\u200b\u0301", "é"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("    indented code", "indented code"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(TEXT)
def test_normalisation_is_idempotent_and_leaves_what_it_promises(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not [c for c in once if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert "\n\n\n" not in once and not any(line != line.rstrip() for line in once.split("\n"))


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=8), st.randoms())
def test_the_split_depends_on_the_text_alone(texts: list[str], random: object) -> None:
    def sides(order: list[str]) -> dict[str, bool]:
        report = CleaningReport()
        documents = (Document("any", text, "why?") for text in order)
        rows = list(clean(documents, report, min_chars=1, max_chars=10_000, held_out_modulus=2))
        assert report.held_out == len({row.document for row in rows if row.held_out})
        return {row.document: row.held_out for row in rows}

    together, reversed_order = sides(texts), sides(texts[::-1])
    assert together == reversed_order
    for text in texts:
        assert sides([text]).items() <= together.items()


def test_both_renderings_of_a_document_fall_on_one_side() -> None:
    texts = [f"Text number {n}, long enough to be kept as one." for n in range(400)]
    report = CleaningReport()
    documents = [Document("any", text, f"What is {n}?") for n, text in enumerate(texts)]
    rows = list(clean(documents, report, min_chars=10, max_chars=500, held_out_modulus=5))
    assert report.rows == {"plain": 400, "question_answer": 400}
    for plain, asked in zip(rows[::2], rows[1::2], strict=True):
        assert (plain.document, plain.held_out) == (asked.document, asked.held_out)
        assert (plain.kind, asked.kind) == ("plain", "question_answer")
        assert plain.text in asked.text and asked.text.startswith("Question: What is ")
        assert plain.held_out is (int(hashlib.sha256(plain.text.encode()).hexdigest(), 16) % 5 == 0)
    assert 50 <= report.held_out <= 110, "a fifth of 400, within four standard deviations"


def test_an_answer_holds_whole_paragraphs_up_to_a_bound() -> None:
    paragraphs = ["first " * 40, "second " * 30, "third " * 60]
    text = "\n\n".join(paragraph.strip() for paragraph in paragraphs)
    ((_, plain), (_, asked)) = renderings(text, "q")
    answer = asked.removeprefix("Question: q\nAnswer: ")
    assert plain == text and answer == "\n\n".join(paragraph.strip() for paragraph in paragraphs[:2])
    ((_, _), (_, asked)) = renderings("word " * 400, "q")
    assert len(asked) <= len("Question: q\nAnswer: ") + 600 and asked.endswith(" word")


def _clean(texts: list[str]) -> tuple[CleaningReport, list[Row]]:
    report = CleaningReport()
    documents = [Document(f"source {number}", text) for number, text in enumerate(texts)]
    return report, list(clean(documents, report, min_chars=40, max_chars=500, held_out_modulus=20))
