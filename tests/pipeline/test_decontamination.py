"""Overlap with evaluation files: what a search for every n-gram, word by word, finds."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.errors import UserError
from pipeline.data.decontamination import contaminated, joined_text, map_grams, read_evaluation, save_grams
from pipeline.data.shingles import read_units
from pipeline.data.sources import Document

ENGLISH = "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May"
CHINESE = "罗杰有五个网球他又买了两罐网球每罐有三个网球他现在有多少个网球呢请告诉我"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "exam.jsonl"
    rows = [{"question": ENGLISH, "answer": "72"}, {"question": CHINESE, "answer": "11"}, {"text": "too short"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (ENGLISH, True),
        ("before it " + ENGLISH.upper().replace(" ", ",\n") + " after it", True),
        (" ".join(ENGLISH.split()[3:16]), True),
        (" ".join(ENGLISH.split()[3:15]), False),
        (ENGLISH.replace("eight", "nine").replace("half", "twice"), False),
        ("序言" + CHINESE + "结尾", True),
        (CHINESE[4:24], True),
        (CHINESE[4:23], False),
        ("，".join(CHINESE[start : start + 3] for start in range(0, 30, 3)), True),
        ("nothing of the kind", False),
        ("", False),
    ],
)
def test_thirteen_words_or_twenty_characters_in_a_row_are_found(evaluation: Path, text: str, found: bool) -> None:
    assert contaminated(read_units(text), read_evaluation([evaluation]).hashes) is found


def test_the_end_of_a_question_runs_into_its_answer(tmp_path: Path) -> None:
    words = ENGLISH.split()
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": " ".join(words[:8]), "answer": " ".join(words[8:])}))
    assert contaminated(read_units(" ".join(words[2:15])), read_evaluation([tmp_path / "exam.jsonl"]).hashes)


@settings(deadline=None)
@given(st.data())
def test_english_agrees_with_a_search_word_by_word(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10_000)))
    exam = [rng.choice("abc") for _ in range(60)]
    text = [rng.choice("abc") for _ in range(data.draw(st.integers(0, 40)))]
    start = rng.randrange(40)
    text += exam[start : start + data.draw(st.integers(9, 16))] + ["d"] * rng.randrange(2)
    grams = {tuple(exam[start : start + 13]) for start in range(len(exam) - 12)}
    expected = any(tuple(text[start : start + 13]) in grams for start in range(len(text) - 12))
    hashes = _evaluation_hashes([" ".join(exam)])
    assert contaminated(read_units(" ".join(text)), hashes) is expected


@settings(deadline=None)
@given(st.text(st.sampled_from("一二三x 1。"), max_size=120))
def test_chinese_agrees_with_a_search_character_by_character(text: str) -> None:
    exam = "一二三" * 12 + " xxx 1 。" + "三二一" * 12
    wanted = {tuple(gram) for gram in _character_grams(exam)}
    expected = any(tuple(gram) in wanted for gram in _character_grams(text))
    assert contaminated(read_units(text), _evaluation_hashes([exam])) is expected


def test_counts_say_what_was_looked_for(evaluation: Path, tmp_path: Path) -> None:
    grams = read_evaluation([evaluation, evaluation])
    # A question ends in its answer: 21 words and a number are 10 grams; 36 characters and a number are 18.
    assert (grams.texts, grams.too_short, len(grams.hashes)) == (6, 2, 10 + 18)
    assert (np.diff(grams.hashes.astype(object)) > 0).all()
    save_grams(grams, tmp_path / "grams")
    assert map_grams(tmp_path / "grams").tolist() == grams.hashes.tolist()


def test_an_evaluation_that_cannot_be_found_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text(json.dumps({"text": "two words"}))
    with pytest.raises(UserError, match=r"^data.decontaminate: .*13 words or 20 Chinese"):
        read_evaluation([tmp_path / "exam.jsonl"])
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        read_evaluation([tmp_path / "missing.jsonl"])


def test_all_that_a_document_says_is_joined() -> None:
    assert joined_text(Document("s", "answer", "question")) == "question\nanswer"
    assert joined_text(Document("s", "text")) == "text"
    assert joined_text(Document("s", "", None, (("user", "hello"), ("assistant", "there")))) == "hello\nthere"


def _evaluation_hashes(texts: list[str]) -> np.ndarray:
    from pipeline.data import decontamination

    return np.unique(np.concatenate([decontamination._grams(read_units(text)) for text in texts]))


def _character_grams(text: str) -> list[list[str]]:
    units = re.findall(r"[一二三]|[x1]+", text)
    words = [units[start : start + 13] for start in range(len(units) - 12)]
    characters = [units[start : start + 20] for start in range(len(units) - 19)]
    return [gram for gram in words if not any(unit in "一二三" for unit in gram)] + [
        gram for gram in characters if sum(unit in "一二三" for unit in gram) > 10
    ]
