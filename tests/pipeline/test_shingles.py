"""Units and n-grams are those that a regular expression and a loop find."""

from __future__ import annotations

import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shingles import gram_hashes, read_units

HAN_OR_KANA = "\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\U00020000-\U0003ffff"
TEXTS = st.text(st.one_of(st.sampled_from("ab Zé9_.-你好世界カな界々\U00020000🎉e\u0301\u0e01\n'"), st.characters()))


@pytest.mark.parametrize(
    ("text", "units", "characters"),
    [
        ("", [], []),
        (" ,;\n", [], []),
        ("Hello, World 42!", ["hello", "world", "42"], [0, 0, 0]),
        ("你好world再见", ["你", "好", "world", "再", "见"], [1, 1, 0, 1, 1]),
        ("カタカナです。", list("カタカナです"), [1] * 6),
        ("한국어 텍스트", ["한국어", "텍스트"], [0, 0]),
        ("हिन्दी", ["हिन्दी"], [0]),
        ("a\U00020000b", ["a", "\U00020000", "b"], [0, 1, 0]),
        ("one_two-three", ["one", "two", "three"], [0, 0, 0]),
    ],
)
def test_units_are_words_and_characters(text: str, units: list[str], characters: list[int]) -> None:
    found = read_units(text)
    assert found.hashes.tolist() == [_hash(unit) for unit in units]
    assert found.characters.tolist() == [bool(value) for value in characters]


@settings(deadline=None)
@given(TEXTS)
def test_units_are_those_of_a_loop_over_characters(text: str) -> None:
    units, run = [], ""
    for character in [*text.lower(), " "]:
        single = re.fullmatch(f"[{HAN_OR_KANA}]", character) is not None
        if unicodedata.category(character)[0] in "LNM" and not single and not _rare(character):
            run += character
            continue
        if run:
            units.append(run)
        run = ""
        if single:
            units.append(character)
        elif _rare(character):
            return  # rarer blocks than the oracle knows
    assert read_units(text).hashes.tolist() == [_hash(unit) for unit in units]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), max_size=12), st.integers(1, 6))
def test_equal_grams_have_equal_hashes_and_others_do_not(words: list[str], length: int) -> None:
    hashes = gram_hashes(read_units(" ".join(words)).hashes, length).tolist()
    grams = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    assert len(hashes) == len(grams)
    assert len(set(zip(grams, hashes, strict=True))) == len(set(grams)) == len(set(hashes))


def test_no_two_of_a_hundred_thousand_words_share_a_hash() -> None:
    units = read_units(" ".join(f"{number:x}" for number in range(100_000)))
    assert len(np.unique(units.hashes)) == 100_000 == len(np.unique(units.hashes >> np.uint64(24)))


def test_a_long_text_has_the_hashes_of_its_words() -> None:
    words = [f"w{number % 977}" for number in range(50_000)]
    assert read_units(" ".join(words)).hashes[-1000:].tolist() == [_hash(word) for word in words[-1000:]]


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from pipeline.data.shingles import gram_hashes, read_units\n"
        "print(gram_hashes(read_units('one two 三 four five').hashes, 3).tolist())"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(gram_hashes(read_units("one two 三 four five").hashes, 3).tolist())


def _hash(unit: str) -> int:
    (found,) = read_units(unit).hashes.tolist()
    return int(found)


def _rare(character: str) -> bool:
    """In a block of single characters that the oracle's expression leaves out."""
    known = re.fullmatch(f"[{HAN_OR_KANA}]", character) is not None
    return bool(read_units(character).characters.any() and not known) or ord(character) > 0x3FFFF
