from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data.multimodal.pairs import BadRow, Pair, PairDrop, Refused, read_inside, read_pairs
from tests.pipeline.media_cases import write_rows


def reason(root: Path, path: str, max_bytes: int = 100) -> str:
    found = read_inside(root, path, max_bytes)
    assert isinstance(found, Refused), found
    return found.reason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "inner.bin").write_bytes(b"inner")
    (folder / "top.bin").write_bytes(b"top")
    (tmp_path / "outside.bin").write_bytes(b"outside")
    return folder


def test_files_inside_are_read(root: Path) -> None:
    (root / "图片 é.bin").write_bytes(b"unicode")
    assert read_inside(root, "top.bin", 3) == b"top"
    assert read_inside(root, "sub/inner.bin", 100) == b"inner"
    assert read_inside(root, "图片 é.bin", 100) == b"unicode"


@pytest.mark.parametrize(
    "path",
    ["../outside.bin", "sub/../../outside.bin", "sub/../top.bin", "..", "/etc/passwd", "", "sub//inner.bin", "a\0b",
     "/", "x/" * 600],
)  # fmt: skip
def test_paths_that_could_leave_are_refused_as_text(root: Path, path: str) -> None:
    assert reason(root, path) == PairDrop.PATH_OUTSIDE


def test_links_are_refused_wherever_they_point(root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path / "outside.bin")
    (root / "in").symlink_to(root / "top.bin")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    for path in ("out", "in", "folder/outside.bin", "loop", "dangling"):
        assert reason(root, path) == PairDrop.SYMLINK
    assert reason(root, "top.bin/inner.bin") == PairDrop.MISSING_FILE


def test_what_is_no_file_is_never_opened(root: Path) -> None:
    os.mkfifo(root / "pipe")  # opening it for reading would wait for a writer
    assert reason(root, "pipe") == PairDrop.NOT_A_FILE
    assert reason(root, "sub") == PairDrop.NOT_A_FILE
    assert reason(Path("/dev"), "zero") == PairDrop.NOT_A_FILE


def test_missing_and_large_files(root: Path) -> None:
    assert reason(root, "nothing") == PairDrop.MISSING_FILE
    assert reason(root, "nothing/inner.bin") == PairDrop.MISSING_FILE
    assert reason(root, "n" * 300) == PairDrop.MISSING_FILE
    assert reason(root, "\ud800") == PairDrop.MISSING_FILE
    assert reason(root, "top.bin", 2) == PairDrop.FILE_TOO_LARGE


def test_descriptors_are_closed(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("top.bin", "sub/inner.bin", "sub/nothing", "sub/inner.bin/x", "nothing/x", "sub"):
        read_inside(root, path, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_of_json_lines(tmp_path: Path) -> None:
    lines: list[Any] = [
        {"image": "a.jpg", "text": "A"}, {"audio": "b.wav", "text": "B", "key": 7},
        
        {"image": "a", "audio": "b", "text": ""}, {"image": "a.jpg"},
        {"image": 3, "text": "C"}, {"image": "a.jpg", "text": None}, [], 5, None,
        {"image": "d.jpg", "text": "D", "key": []}, {"image": "e.jpg", "audio": None, "text": "E", "key": "k"},
    ]  # fmt: skip
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    content += b"\n{broken\n\xff\xfe\n" + b"[" * 100_000 + b"\n" + b" " * (3 << 20) + b"\n"
    (tmp_path / "a.jsonl").write_bytes(content + json.dumps({"image": "f.jpg", "text": "F"}).encode())

    rows = list(read_pairs(tmp_path))

    assert [row.number for row in rows] == list(range(len(rows)))
    good = [row for row in rows if isinstance(row, Pair)]
    assert good == [
        Pair(0, "a.jsonl:1", "image", "a.jpg", "A"),
        Pair(1, "a.jsonl:2", "audio", "b.wav", "B", "7"),
        Pair(10, "a.jsonl:11", "image", "e.jpg", "E", "k"),
        Pair(len(rows) - 1, f"a.jsonl:{len(rows)}", "image", "f.jpg", "F"),
    ]
    assert [row.number for row in rows if isinstance(row, BadRow)] == [*range(2, 10), *range(11, 15)]


def test_parquet_and_json_lines_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"image": "2.jpg", "text": "two"}], "b.jsonl")
    table = pa.table({"audio": ["1.wav", None], "image": [None, "1.jpg"], "text": ["one", "uno"], "other": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "notes.txt").write_text("ignored")
    assert [(row.origin, row.path) for row in read_pairs(tmp_path) if isinstance(row, Pair)] == [
        ("a.parquet:1", "1.wav"), ("a.parquet:2", "1.jpg"), ("b.jsonl:1", "2.jpg"),
    ]  # fmt: skip


def test_sources_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder with"):
        list(read_pairs(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        list(read_pairs(tmp_path))
    parquet.write_table(pa.table({"picture": ["1.jpg"], "text": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: got 'picture, text', allowed: columns image or audio"):
        list(read_pairs(tmp_path))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="a whole parquet file") as caught:
        list(read_pairs(tmp_path))
    assert "\n" not in str(caught.value)
