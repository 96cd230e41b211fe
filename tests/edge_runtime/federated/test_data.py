"""Local text: what is trained on, what is held out, what is deleted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.federated.data import PASSAGE_CHARACTERS, LocalData, Retention
from edge_runtime.formats.errors import UserError
from tests.edge_runtime.fakes import BOS, EOS

DAY_S = 86400.0
NOW_S = 1_000 * DAY_S


def local(directory: Path, lines: list[str] | None = None, **changes: object) -> LocalData:
    values: dict[str, object] = {
        "directory": directory,
        "encode": lambda text: list(text.encode()),
        "bos": BOS,
        "eos": EOS,
        "most_bytes": 1 << 20,
        "retention": Retention(),
        "now": lambda: NOW_S,
        "log": (lines if lines is not None else []).append,
    }
    data = LocalData(**(values | changes))  # type: ignore[arg-type]
    data.refresh()
    return data


def write(path: Path, text: str, age_days: float = 0.0) -> Path:
    path.write_text(text)
    os.utime(path, (NOW_S - age_days * DAY_S,) * 2)
    return path


def text_of(batches: object) -> str:
    """All real tokens of some batches, as text."""
    found = []
    for ids, mask in batches:  # type: ignore[attr-defined]
        for row, counted in zip(ids, mask, strict=True):
            last = int(np.flatnonzero(counted).max(initial=-1)) + 1
            found.append(bytes(int(i) for i in row[: last + 1] if i < 256).decode(errors="replace"))
    return "".join(found)


def paragraphs(count: int) -> list[str]:
    """Passages that each fill exactly one."""
    return [(f"passage {n} " + "x" * PASSAGE_CHARACTERS)[: PASSAGE_CHARACTERS - 1] + "\n" for n in range(count)]


def test_a_passage_is_held_out_by_its_own_digest_and_never_trained_on(tmp_path: Path) -> None:
    texts = paragraphs(60)
    write(tmp_path / "a.txt", "".join(texts[:30]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[30:]))
    data = local(tmp_path)
    expected = [text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0]
    assert 1 <= len(expected) <= 15
    held = text_of(data.held_out(4096, 100, 4))
    taken = data.batches(4096, 1, 0)
    trained = text_of(next(taken) for _ in range(data.count(4096)))
    for text in texts:
        name = text.split(" x")[0] + " "
        assert (name in held) == (text in expected)
        assert (name in trained) == (text not in expected)


def test_sequences_cover_every_token_once_an_epoch_in_an_order_of_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "".join(f"{n:05d}\n" for n in range(2000)))
    data = local(tmp_path)
    count = data.count(64)

    def epoch(seed: int) -> list[bytes]:
        batches = data.batches(64, 1, seed)
        return [next(batches)[0].tobytes() for _ in range(count)]

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert first == again and first != other
    assert sorted(first) == sorted(other) and len(set(first)) == count


def test_every_sequence_comes_before_any_comes_again(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "".join(f"{n:05d}\n" for n in range(400)))
    data = local(tmp_path)
    count = data.count(64)
    batches = data.batches(64, 4, 9)
    rows = [row.tobytes() for _ in range(count) for row in next(batches)[0]]
    assert len(rows) == 4 * count
    for start in range(0, len(rows), count):
        assert len(set(rows[start : start + count])) == count


def test_the_order_is_that_of_raw_words_which_every_version_of_numpy_draws_alike(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "".join(f"{n:05d}\n" for n in range(200)))
    data = local(tmp_path)
    count, batches = data.count(256), data.batches(256, 1, 3)
    unshuffled = [b""] * count
    for place in np.argsort(np.random.PCG64([3, 0]).random_raw(count), kind="stable"):
        unshuffled[int(place)] = bytes(int(i) for i in next(batches)[0][0] if 0 < i < 256)
    numbers = [int(text) for text in b"".join(unshuffled).split()]
    assert numbers == sorted(numbers) and len(numbers) > 100


def test_what_follows_in_another_passage_or_sequence_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "fghijklm"}\n')
    data = local(tmp_path)
    ids, mask = next(data.batches(32, 9, 0))
    stream = [BOS, *b"abc", EOS, BOS, *b"de", EOS, BOS, *b"fghijklm", EOS]
    assert ids[0, : len(stream)].tolist() == stream and not ids[0, len(stream) :].any()
    expected = [1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert mask[0].tolist() == expected + [0] * (32 - len(stream))
    # The same stream in sequences of 8: their last tokens predict what stands in another one.
    ids, mask = next(data.batches(8, 9, 0))
    rows = {tuple(row): counts.tolist() for row, counts in zip(ids.tolist(), mask, strict=True)}
    assert rows[tuple(stream[:8])] == [1, 1, 1, 1, 0, 1, 1, 0]
    assert rows[tuple(stream[8:16])] == [0, 1, 1, 1, 1, 1, 1, 0]
    assert rows[(*stream[16:], 0, 0, 0, 0, 0)] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_directory_too_small_for_one_sequence_is_padded(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "abcdefgh\n")  # is not held out
    data = local(tmp_path)
    assert data.count(64) == 1
    ids, mask = next(data.batches(64, 8, 0))
    assert ids.shape == (1, 64)
    assert ids[0, :11].tolist() == [BOS, *b"abcdefgh\n", EOS]
    assert mask[0].tolist() == [1.0] * 10 + [0.0] * 54


def test_an_empty_directory_has_no_sequences(tmp_path: Path) -> None:
    data = local(tmp_path)
    assert data.count(8) == 0
    assert list(data.batches(8, 2, 0)) == [] == list(data.held_out(8, 5, 2))


def test_what_is_past_its_time_is_deleted_and_said(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old.txt", "a" * 50, 31), write(tmp_path / "new.txt", "b" * 50, 29)
    other = write(tmp_path / "photo.jpg", "c", 400)
    lines: list[str] = []
    local(tmp_path, lines, retention=Retention(days=30))
    assert not old.exists() and new.exists() and other.exists()
    assert len([text for text in lines if "deleted" in text]) == 1 and "old.txt" in lines[0]


def test_too_much_text_is_deleted_oldest_first(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{age}.txt", "a" * 100, age) for age in (5, 1, 3, 2)]
    local(tmp_path, retention=Retention(keep_bytes=250))
    assert [path.exists() for path in files] == [False, True, False, True]


def test_nothing_is_deleted_unless_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a" * 5000, 5000)
    local(tmp_path)
    assert path.exists()


def test_links_hidden_files_and_subdirectories_are_left_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", write(tmp_path / "secret.txt", "s" * 3000, 900)
    inside.mkdir()
    (inside / "link.txt").symlink_to(outside)
    (inside / "sub").mkdir()
    deep, hidden = write(inside / "sub" / "deep.txt", "d" * 3000, 900), write(inside / ".hid.txt", "h" * 3000, 900)
    data = local(inside, retention=Retention(days=1))
    assert data.count(8) == 0
    assert outside.exists() and deep.exists() and hidden.exists() and (inside / "link.txt").is_symlink()


def test_memory_is_bounded_and_the_newest_text_stays(tmp_path: Path) -> None:
    write(tmp_path / "old.txt", "old\n" * 1000, 9)
    write(tmp_path / "new.txt", "new\n" * 500, 1)
    lines: list[str] = []
    data = local(tmp_path, lines, most_bytes=2500)
    trained = text_of(next(data.batches(4096, 1, 0)) for _ in range(1)) + text_of(data.held_out(4096, 9, 9))
    assert trained.count("new") == 500 and trained.count("old") == 125
    assert any("3500 bytes of the oldest text are left out" in text for text in lines)


def test_lines_that_are_no_text_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abcdef"}\n{"text": 5}\n[]\nnot json\n\xff\n' + b"[" * 5000 + b"\n")
    lines: list[str] = []
    data = local(tmp_path, lines)
    assert data.count(8) == 1
    assert any("5 lines" in text for text in lines)


def test_text_is_read_again_only_when_it_changed(tmp_path: Path) -> None:
    encoded: list[str] = []
    write(tmp_path / "a.txt", "hello there\n")
    data = local(tmp_path, encode=lambda text: encoded.append(text) or list(text.encode()))
    data.refresh()
    assert len(encoded) == 1
    write(tmp_path / "b.txt", "and more\n")
    data.refresh()
    assert len(encoded) == 3 and data.count(8) == 3


def test_a_directory_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data"):
        local(tmp_path / "missing")
