"""What is kept, what is dropped and why, and which side of the split it falls on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.errors import UserError
from pipeline.data.cleaning import CleaningReport, CleaningSettings, clean_corpus
from pipeline.data.cleaning_report import render_page
from pipeline.data.judging import renderings
from pipeline.data.sources import Document

WORDS = "some ordinary words, enough of them to be kept "
SETTINGS = CleaningSettings(min_chars=40, max_chars=500, held_out_modulus=20, pii="off")
Rows = list[dict[str, Any]]
Clean = Callable[..., tuple[CleaningReport, Rows, Rows]]


@pytest.fixture
def cleaned(tmp_path: Path) -> Clean:
    """The report, training rows and held-out rows of documents, or of texts."""

    def run(documents: Sequence[Document | str], **changes: Any) -> tuple[CleaningReport, Rows, Rows]:
        run.runs += 1
        whole = [
            Document(f"source {number}", document) if isinstance(document, str) else document
            for number, document in enumerate(documents)
        ]
        output = tmp_path / f"output {run.runs}"
        output.mkdir()
        report = clean_corpus(whole, output, replace(SETTINGS, **changes), tmp_path / f"checkpoint {run.runs}")
        train, held_out = (_rows(output / f"{side}.jsonl") for side in ("train", "held_out"))
        return report, train, held_out

    run.runs = 0
    return run


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
def test_each_reason_to_drop(cleaned: Clean, text: str, reason: str | None) -> None:
    report, train, held_out = cleaned([text])
    assert report.dropped == ({reason: 1} if reason else {})
    expected = [{"source": "source 0", "text": text.strip()[:120]}]
    assert report.examples == ({reason: expected} if reason else {})
    assert (report.documents, report.kept, len(train + held_out)) == (1, 0 if reason else 1, 0 if reason else 1)


def test_duplicates_are_those_with_the_same_normalised_text(cleaned: Clean) -> None:
    report, train, held_out = cleaned([WORDS, "another text: " + WORDS, WORDS.rstrip() + " \r\n", WORDS])
    assert report.dropped == {"duplicate": 2} and report.kept == 2 == len(train + held_out)
    assert [example["source"] for example in report.examples["duplicate"]] == ["source 2", "source 3"]


def test_a_near_copy_goes_and_names_its_original(cleaned: Clean) -> None:
    long = " ".join(f"word{number}" for number in range(60))
    copy = long.replace("word59", "word60")
    report, train, held_out = cleaned([long, "another text: " + WORDS, copy, copy + "!"], near_duplicates=0.8)
    assert report.dropped == {"near_duplicate": 2}
    assert [row["text"] for row in train + held_out] == [long, "another text: " + WORDS.strip()]
    assert report.near_duplicates == {"clusters": 1, "largest": [{"source": "source 0", "copies": 2}]}
    assert [example["copy_of"] for example in report.examples["near_duplicate"]] == ["source 0"] * 2
    assert cleaned([long, copy])[0].near_duplicates is None


def test_examples_are_few_and_counts_are_all(cleaned: Clean) -> None:
    report, _, _ = cleaned(["x"] * 9)
    assert report.dropped == {"too_short": 9} and [e["source"] for e in report.examples["too_short"]] == [
        "source 0", "source 1", "source 2",
    ]  # fmt: skip


@pytest.mark.parametrize("pii", ["off", "replace", "drop"])
def test_personal_data_is_left_replaced_or_drops_its_document(cleaned: Clean, pii: str) -> None:
    asked = Document("asked", "an answer: " + WORDS, "who is jane.doe@mail.org?")
    report, train, held_out = cleaned([WORDS + "jane.doe@mail.org", asked, "another text: " + WORDS], pii=pii)
    texts = " ".join(row["text"] for row in train + held_out)
    assert ("jane.doe@mail.org" in texts) is (pii == "off") and ("[EMAIL]" in texts) is (pii == "replace")
    assert report.personal_data == ({"email": 2} if pii == "replace" else {})
    assert report.dropped == ({"personal_data": 2} if pii == "drop" else {})


def test_examples_hold_no_personal_data_whatever_is_kept(cleaned: Clean) -> None:
    report, _, _ = cleaned(["jane.doe@mail.org", WORDS + "jane.doe@mail.org", WORDS + "jane.doe@mail.org"])
    assert [report.examples[reason][0]["text"][-7:] for reason in ("too_short", "duplicate")] == ["[EMAIL]"] * 2


def test_languages_that_are_not_wanted_go(cleaned: Clean) -> None:
    chinese = "这是一个用来测试的句子，它足够长，可以被保留下来。我们希望它被识别为中文，而不是其他语言，谢谢。"
    report, train, held_out = cleaned([WORDS * 2, chinese], languages=("zh",))
    assert report.dropped == {"other_language": 1} and report.languages == {"zh": 1}
    assert [row["text"] for row in train + held_out] == [chinese]


def test_documents_that_hold_a_piece_of_an_evaluation_go(cleaned: Clean, tmp_path: Path) -> None:
    exam = " ".join(f"exam{number}" for number in range(20))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": exam}) + "\n" + json.dumps({"text": "too short"}))
    asked = Document("asked", WORDS, exam)
    documents = [WORDS + exam, asked, "another text: " + WORDS + exam[:40]]
    report, train, held_out = cleaned(documents, decontaminate=(tmp_path / "exam.jsonl",))
    assert report.dropped == {"contaminated": 2} and len(train + held_out) == 1
    assert report.evaluation == {"texts": 2, "too_short": 1, "grams": 8}


def test_conversations_are_rows_of_messages(cleaned: Clean) -> None:
    messages = (("system", "Be  brief.\r\n"), ("user", "What is six times seven, if you please?"), ("assistant", "42"))
    report, train, held_out = cleaned([Document("chat", "", None, messages), WORDS])
    assert report.rows == {"messages": 1, "plain": 1} and report.kept == 2
    (row,) = [row for row in train + held_out if row["kind"] == "messages"]
    assert row["messages"] == [
        {"role": "system", "content": "Be  brief."},
        {"role": "user", "content": "What is six times seven, if you please?"},
        {"role": "assistant", "content": "42"},
    ]
    text = "system: Be  brief.\n\nuser: What is six times seven, if you please?\n\nassistant: 42"
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert row["document"] == digest[:16] and (row in held_out) is (int(digest, 16) % 20 == 0)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (["Hi", "Hello"], "too_short"),
        (["a question, please, of some length, if you like", "\u200b"], "too_short"),
        (["a question, please " * 20, "an answer " * 20], "too_long"),
        (["a question of some length, if you like it so", "12345 67890 " * 5], "few_letters"),
        (["a question of some length, if you like it so", "broken " * 10 + "\ufffd"], "undecodable"),
        (["a question of some length, if you like it so", "12345"], None),
    ],
)
def test_one_bad_message_drops_its_conversation(cleaned: Clean, contents: list[str], reason: str | None) -> None:
    messages = tuple(zip(("user", "assistant"), contents, strict=True))
    for rules in ("basic", "web"):
        report, train, held_out = cleaned([Document("chat", "", None, messages)], rules=rules)
        assert report.dropped == ({reason: 1} if reason else {}) and len(train + held_out) == (reason is None)


def test_conversations_are_scrubbed_compared_and_looked_through(cleaned: Clean, tmp_path: Path) -> None:
    def chat(user: str, assistant: str) -> Document:
        return Document("chat", "", None, (("user", user), ("assistant", assistant)))

    exam = " ".join(f"exam{number}" for number in range(13))
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": exam}))
    long = " ".join(f"word{number}" for number in range(60))
    documents = [
        chat(f"My address is jane.doe@mail.org. {long}", "Thank you."),
        chat(f"My address is jane.doe@mail.org. {long}", "Thank you."),
        chat(f"My address is jane.doe@mail.org. {long}", "Thank you!!"),
        chat("What comes next, I would like to know?", exam),
    ]
    report, train, held_out = cleaned(
        documents, near_duplicates=0.8, decontaminate=(tmp_path / "exam.jsonl",), pii="replace"
    )
    assert report.dropped == {"duplicate": 1, "near_duplicate": 1, "contaminated": 1}
    (row,) = train + held_out
    assert row["messages"][0]["content"] == f"My address is [EMAIL]. {long}" and report.personal_data == {"email": 1}


@settings(deadline=None, max_examples=30)  # each example is a dozen runs on disk
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=8))
def test_the_split_depends_on_the_text_alone(texts: list[str]) -> None:
    def sides(order: list[str]) -> dict[str, bool]:
        documents = (Document("any", text, "why?") for text in order)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            report = clean_corpus(documents, folder, CleaningSettings(1, 10_000, 2, pii="off"), folder / "checkpoint")
            train, held_out = (
                {json.loads(line)["document"] for line in (folder / f"{side}.jsonl").read_bytes().splitlines()}
                for side in ("train", "held_out")
            )
        assert report.held_out == len(held_out) and not train & held_out
        return dict.fromkeys(train, False) | dict.fromkeys(held_out, True)

    together, reversed_order = sides(texts), sides(texts[::-1])
    assert together == reversed_order
    for text in texts:
        assert sides([text]).items() <= together.items()


def test_both_renderings_of_a_document_fall_on_one_side(cleaned: Clean) -> None:
    texts = [f"Text number {n}, long enough to be kept as one." for n in range(400)]
    documents = [Document("any", text, f"What is {n}?") for n, text in enumerate(texts)]
    report, train, held_out = cleaned(documents, min_chars=10, held_out_modulus=5)
    assert report.rows == {"plain": 400, "question_answer": 400}
    for rows, is_held_out in ((train, False), (held_out, True)):
        for plain, asked in zip(rows[::2], rows[1::2], strict=True):
            assert plain["document"] == asked["document"]
            assert (plain["kind"], asked["kind"]) == ("plain", "question_answer")
            assert plain["text"] in asked["text"] and asked["text"].startswith("Question: What is ")
            assert is_held_out is (int(hashlib.sha256(plain["text"].encode()).hexdigest(), 16) % 5 == 0)
    assert [row["text"] for row in train[::2]] == [text for text in texts if text in {row["text"] for row in train}]
    assert 50 <= report.held_out <= 110, "a fifth of 400, within four standard deviations"


def test_an_answer_holds_whole_paragraphs_up_to_a_bound() -> None:
    paragraphs = ["first " * 40, "second " * 30, "third " * 60]
    text = "\n\n".join(paragraph.strip() for paragraph in paragraphs)
    ((_, plain), (_, asked)) = renderings(text, "q")
    answer = asked.removeprefix("Question: q\nAnswer: ")
    assert plain == text and answer == "\n\n".join(paragraph.strip() for paragraph in paragraphs[:2])
    ((_, _), (_, asked)) = renderings("word " * 400, "q")
    assert len(asked) <= len("Question: q\nAnswer: ") + 600 and asked.endswith(" word")


def test_the_page_shows_counts_and_examples_in_markdown(cleaned: Clean) -> None:
    report, _, _ = cleaned(["x", "`y`\nz", WORDS, WORDS])
    page = render_page(report)
    assert (
        "4 documents read, 1 kept" in page
        and "| too_short | 2 | 50.0% |" in page
        and "| duplicate | 1 | 25.0% |" in page
    )
    assert "- `source 1`: `'y' z`" in page


def test_nothing_is_written_of_a_setting_that_cannot_be(tmp_path: Path) -> None:
    missing = replace(SETTINGS, decontaminate=(tmp_path / "missing.jsonl",))
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        clean_corpus([Document("any", WORDS)], tmp_path, missing, tmp_path / "checkpoint")
    assert not list(tmp_path.glob("*.jsonl"))


def _rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
