"""The tokenizer trained here; texts laid end to end, conversations kept whole."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.data.packing import (
    BOS,
    EOS,
    Packed,
    document_rows,
    pack_rows,
    row_text,
    shuffled_document_rows,
    shuffled_rows,
    train_tokenizer,
)
from tests.pipeline.conftest import TEXTS, VOCABULARY

EOS_ID = 1
CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


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


@given(st.lists(st.text("ab c\n", max_size=30), min_size=1, max_size=40), st.integers(2, 12), st.integers(1, 9))
def test_packing_texts_is_concatenation(tokenizer: Tokenizer, texts: list[str], length: int, most: int) -> None:
    stream = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID]]
    expected = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    rows = [{"document": "d", "kind": "plain", "text": text} for text in texts]
    if not expected:
        with pytest.raises(UserError, match=rf"^data: got '\d+ tokens', allowed: rows that fill .* {length} tokens"):
            _pack(tokenizer, rows, length, most)
        return
    packed = _pack(tokenizer, iter(rows), length, None)
    assert packed.tokens.dtype == np.int32 and packed.tokens.tolist() == expected
    assert packed.counts.dtype == np.bool_ and packed.counts.shape == packed.tokens.shape and packed.counts.all()
    assert _pack(tokenizer, rows, length, most).tokens.tolist() == expected[:most]


def test_packing_carries_over_from_batch_to_batch(tokenizer: Tokenizer) -> None:
    rows = [{"text": f"text {n} of many"} for n in range(1300)]
    stream = [i for row in rows for i in [*tokenizer.encode(row["text"]).ids, EOS_ID]]
    packed = _pack(tokenizer, rows, 64, None)
    assert packed.tokens.ravel().tolist() == stream[: len(stream) // 64 * 64]
    assert _pack(tokenizer, rows, 64, 3).tokens.tolist() == packed.tokens[:3].tolist()


def test_a_token_in_a_text_is_text(tokenizer: Tokenizer) -> None:
    packed = _pack(tokenizer, [{"text": "one </s> two <s>" * 9}], 8, None)
    assert not np.isin(packed.tokens, (0, 1)).any()


def test_conversations_stay_whole_and_only_answers_count(tokenizer: Tokenizer) -> None:
    rows = [_chat(n, turns=1 + n % 3) for n in range(40)]
    packed = _pack(tokenizer, rows, 256, None)
    assert packed.cut == packed.dropped == 0
    said: list[str] = []
    for tokens, counts in zip(packed.tokens, packed.counts, strict=True):
        assert not counts[-1]
        said += tokenizer.decode(tokens[1:][counts[:-1]], skip_special_tokens=False).split("</s>")[:-1]
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        assert text.count("<s>user") == text.count("<s>assistant") and text.startswith("<s>user")
        assert set(text[text.rindex("</s>\n") :].replace("</s>", "")) <= {"\n"}, "only end tokens fill the rest"
    wanted = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    assert sorted(said) == sorted(wanted)
    lengths = [len(tokenizer.encode(_rendered(row)).ids) for row in rows]
    assert len(packed.tokens) <= -(-sum(lengths) // 256) * 1.1, "best fit leaves little room empty"


def test_texts_and_conversations_do_not_share_sequences(tokenizer: Tokenizer) -> None:
    rows = [row for n in range(30) for row in (_chat(n, turns=1), {"text": f"plain {n} " * 20})]
    packed = _pack(tokenizer, rows, 96, None)
    texts = [row["text"] for row in rows if "text" in row]
    plain = packed.counts.all(axis=1)
    alone = _pack(tokenizer, [{"text": text} for text in texts], 96, None)
    assert packed.tokens[plain].tolist() == alone.tokens.tolist()
    assert all("plain" not in tokenizer.decode(row, skip_special_tokens=False) for row in packed.tokens[~plain])
    again = _pack(tokenizer, iter(rows), 96, None)
    assert np.array_equal(packed.tokens, again.tokens) and np.array_equal(packed.counts, again.counts)


def test_what_is_too_long_is_cut_or_dropped_and_counted(tokenizer: Tokenizer) -> None:
    rows = [_chat(1, turns=12), {"messages": _messages("q", "long " * 200)}, _chat(2, turns=1)]
    packed = _pack(tokenizer, rows, 64, None)
    assert (packed.cut, packed.dropped) == (1, 1)
    text = tokenizer.decode(packed.tokens.ravel(), skip_special_tokens=False)
    assert "answer 1.0" in text and "answer 1.11" not in text and "answer 2.0" in text and "long" not in text


def test_nothing_is_read_beyond_the_sequences_wanted(tokenizer: Tokenizer) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        for number in range(10**9):
            assert number < 5000
            yield {"text": f"row {number} of very many"}

    assert len(_pack(tokenizer, endless(), 32, 20).tokens) == 20


def test_a_conversation_needs_a_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^document d1: got 'a conversation', .* no chat template; give it a chat_"):
        pack_rows(
            tokenizer, [_chat(1, 1)], template=None, eos_id=EOS_ID, sequence_tokens=64, max_sequences=None
        )  # fmt: skip


@pytest.mark.parametrize("most", [None, 3])
def test_files_hold_what_memory_would(tokenizer: Tokenizer, tmp_path: Path, most: int | None) -> None:
    rows = [row for n in range(30) for row in (_chat(n, turns=2), {"text": f"plain {n} " * 20})]
    expected = _pack(tokenizer, rows, 96, most)
    packed = _pack(tokenizer, rows, 96, most, tmp_path / "new" / "train.npy")
    assert isinstance(packed.tokens, np.memmap) and isinstance(packed.counts, np.memmap)
    for array, name in ((expected.tokens, "train.npy"), (expected.counts, "train_counts.npy")):
        stored = np.load(tmp_path / "new" / name)
        assert stored.dtype == array.dtype and np.array_equal(stored, array)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"train.npy", "train_counts.npy"}


def test_a_failure_leaves_the_files_as_they_were(tokenizer: Tokenizer, tmp_path: Path) -> None:
    output = tmp_path / "train.npy"
    _pack(tokenizer, [{"text": "words " * 100}], 16, None, output)
    before = output.read_bytes()

    def failing() -> Iterator[dict[str, Any]]:
        yield from ({"text": "more words " * 100} for _ in range(600))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        _pack(tokenizer, failing(), 16, None, output)
    with pytest.raises(UserError, match="rows that fill a sequence of 4096"):
        _pack(tokenizer, [{"text": "few"}], 4096, None, output)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"train.npy", "train_counts.npy"}


def test_memory_does_not_grow_with_the_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    peaks = []
    for count in (1024, 3072):  # whole batches
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{n:04} words of text " * 6}) + "\n" for n in range(count)))
        tracemalloc.start()
        _pack(tokenizer, shuffled_rows(path, 7), 256, None, tmp_path / f"{count}.npy")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    grown = (tmp_path / "3072.npy").stat().st_size - (tmp_path / "1024.npy").stat().st_size
    assert peaks[1] - peaks[0] < 2048 * 48 < 0.3 * grown, "16 bytes a row, and slack"


def test_rows_are_shuffled_where_they_lie(tmp_path: Path) -> None:
    rows = [{"document": str(n), "text": "é\n" * (n % 7)} for n in range(50)] + [_chat(3, 2)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    shuffled = list(shuffled_rows(path, 7))
    assert shuffled == [rows[n] for n in np.random.default_rng(7).permutation(51)] != rows
    assert list(shuffled_rows(path, 8)) != shuffled
    documents = [{key: row[key] for key in row if key in ("text", "messages")} for row in shuffled]
    assert list(shuffled_document_rows(path, 7)) == documents
    assert row_text(rows[-1]) == "question 3.0\n" + "answer 3.0 " * 4 + "\nquestion 3.1\n" + "answer 3.1 " * 4


def test_documents_of_any_file_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"instruction": "Say a.", "output": "a"}\n{"question": "b?", "answer": "b"}\n', encoding="utf-8")
    said = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
    assert list(document_rows(path)) == [{"messages": said}, {"text": "b"}]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": 5}', '{"document": "d"}', '{"messages": [{"role": "user"}]}', ""]
)
def test_a_row_that_is_not_a_cleaned_one_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^train\.jsonl at byte 17: .*run stage=clean again"):
        list(shuffled_rows(path, 7))


def _pack(tokenizer: Tokenizer, rows: Any, length: int, most: int | None, output: Path | None = None) -> Packed:
    return pack_rows(
        tokenizer, rows, template=CHATML, eos_id=EOS_ID, sequence_tokens=length, max_sequences=most, bos_id=0,
        output=output,
    )  # fmt: skip


def _chat(number: int, turns: int) -> dict[str, Any]:
    messages = [
        message
        for turn in range(turns)
        for message in _messages(f"question {number}.{turn}", f"answer {number}.{turn} " * (1 + number % 4))
    ]
    return {"document": f"d{number}", "kind": "messages", "messages": messages}


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _rendered(row: dict[str, Any]) -> str:
    return "".join(f"<s>{message['role']}\n{message['content']}</s>\n" for message in row["messages"])
