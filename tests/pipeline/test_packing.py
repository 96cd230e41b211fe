"""The tokenizer trained here, and texts laid end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.data.packing import BOS, EOS, pack_sequences, read_texts, shuffle_texts, train_tokenizer
from tests.pipeline.conftest import TEXTS, VOCABULARY

EOS_ID = 1


@given(st.text(st.characters(codec="utf-8")))
@example("emoji \U0001f469\u200d\U0001f680 and \U0001f1e9\U0001f1ea, 日本語, 한국어, العربية")
@example("\tif x:\n\t\t    return  \n\n\n\n   y  ")
@example(" leading and trailing ")
@example("▁ the mark that other tokenizers use for a space ▁▁")
@example("</s> <s> <0x41> \x00")
def test_every_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_first_ids_are_the_two_marks_and_the_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert [tokenizer.id_to_token(n) for n in range(258)] == [BOS, EOS, *(f"<0x{n:02X}>" for n in range(256))]


def test_characters_not_seen_in_training_become_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False).ids
    assert ids == [2 + byte for byte in "é".encode()]


def test_training_is_deterministic() -> None:
    first, second = train_tokenizer(TEXTS, VOCABULARY), train_tokenizer(iter(TEXTS), VOCABULARY)
    assert first.to_str() == second.to_str()


def test_spaces_merge_with_each_other_and_with_the_word_behind_them() -> None:
    roomy = train_tokenizer(TEXTS, 1000)
    assert [len(roomy.encode(text, add_special_tokens=False).ids) for text in ("    return", " words")] == [1, 1]
    assert max(len(token.strip(" ").split(" ")) for token in roomy.get_vocab()) == 1, "no token spans two words"
    assert 258 < roomy.get_vocab_size() < 1000, "so little text has no more merges than this"


@given(st.lists(st.text("ab c\n", max_size=30), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 9))
def test_packing_is_concatenation(tokenizer: Tokenizer, texts: list[str], length: int, most: int) -> None:
    stream = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID]]
    rows = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    if not rows:
        with pytest.raises(UserError, match=rf"^data: got '{len(stream)} tokens', allowed: at least {length} tokens"):
            pack_sequences(tokenizer, texts, EOS_ID, length)
        return
    packed = pack_sequences(tokenizer, iter(texts), EOS_ID, length)
    assert packed.dtype == np.int32 and packed.tolist() == rows
    assert pack_sequences(tokenizer, texts, EOS_ID, length, most).tolist() == rows[:most]


def test_packing_carries_over_from_batch_to_batch(tokenizer: Tokenizer) -> None:
    texts = [f"text {n} of many" for n in range(1300)]
    stream = [i for text in texts for i in [*tokenizer.encode(text).ids, EOS_ID]]
    packed = pack_sequences(tokenizer, texts, EOS_ID, 64)
    assert packed.ravel().tolist() == stream[: len(stream) // 64 * 64]
    assert pack_sequences(tokenizer, texts, EOS_ID, 64, 3).tolist() == packed[:3].tolist()


def test_shuffling_is_a_fixed_permutation() -> None:
    texts = [str(n) for n in range(50)]
    once = shuffle_texts(texts, 7)
    assert sorted(once) == sorted(texts)
    assert once == shuffle_texts(texts, 7) != texts and once != shuffle_texts(texts, 8)


def test_texts_are_read_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    assert list(read_texts(path)) == TEXTS
