"""Documents out of CPython and out of the user's files."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data import sources
from pipeline.data.sources import Document, document_files, file_documents, python_documents


@pytest.fixture(scope="module")
def documentation() -> list[Document]:
    return list(python_documents())


def test_every_python_carries_thousands_of_documents(documentation: list[Document]) -> None:
    assert len(documentation) > 5000
    assert sum(len(document.text) for document in documentation) > 2_500_000


def test_a_known_docstring_and_a_known_topic_are_there(documentation: list[Document]) -> None:
    by_question = {document.question: document for document in documentation}
    upper = by_question["What is str.upper?"]
    assert upper.text == f"str.upper($self, /)\n\n{str.upper.__doc__}"
    assert "What is json.decoder.JSONDecoder.raw_decode?" in by_question
    assert "considered true" in by_question["What does Python say about Truth Value Testing?"].text
    dumps = by_question["What is json.dumps?"]
    assert dumps.text.startswith("json.dumps(obj, *, skipkeys=False") and json.dumps.__doc__
    assert json.dumps.__doc__.split("\n")[0] in dumps.text


def test_order_does_not_depend_on_the_file_system(
    documentation: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(rglob(path, pattern))))
    assert list(python_documents()) == documentation


def test_sections_of_a_topic_do_not_overlap(documentation: list[Document]) -> None:
    """A text that were both a document and part of another would leak across the held-out split."""
    from pydoc_data.topics import topics

    for name, topic in topics.items():
        sections = [d.text for d in documentation if d.source.startswith(f"topic:{name}#")]
        starts = [0]
        for section in sections:
            start = topic.find(section, starts[-1])
            assert start >= starts[-1], f"{name}: out of order or not part of the topic"
            starts.append(start + len(section))
        headings = len(sections) - 1
        assert len(topic) - sum(map(len, sections)) <= 400 * headings, "only headings and their lines are cut away"


def test_sources_are_distinct_but_for_redefinitions(documentation: list[Document]) -> None:
    counts = Counter(document.source for document in documentation)
    assert sum(count - 1 for count in counts.values()) < len(documentation) * 0.02


def test_no_test_module_is_documentation(documentation: list[Document]) -> None:
    assert not [d.source for d in documentation if ".test." in d.source or d.source.startswith("doc:test.")]
    assert not [d.source for d in documentation if "site-packages" in d.source]


def test_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {n}. " + "words and words " * 30 + "\n\n" for n in range(20)]
    path = tmp_path / "notes.txt"
    path.write_text("".join(paragraphs), encoding="utf-8")
    documents = list(file_documents(path))
    assert "".join(document.text for document in documents) == "".join(paragraphs)
    assert len(documents) == 4 and all(document.text.endswith("\n\n") for document in documents)
    assert all(document.text.startswith("Paragraph") for document in documents)
    assert [document.source for document in documents] == [f"notes.txt:{n}" for n in range(4)]


def test_text_without_blank_lines_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("a line of a log file\n" * 2000, encoding="utf-8")
    documents = list(file_documents(path))
    assert "".join(document.text for document in documents) == path.read_text(encoding="utf-8")
    assert max(len(document.text) for document in documents) < 5000


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "ä\n日本"}, {"text": ""}], [("ä\n日本", None), ("", None)]),
        ([{"question": "q?", "answer": "a"}], [("a", "q?")]),
        ([{"prompt": "p", "response": "r", "text": "ignored"}], [("r", "p")]),
    ],
)
def test_rows_are_read_from_both_formats(
    tmp_path: Path, suffix: str, rows: list[dict[str, Any]], expected: list[tuple[str, str | None]]
) -> None:
    path = _write_rows(tmp_path / f"data{suffix}", rows)
    assert [(document.text, document.question) for document in file_documents(path)] == expected
    assert document_files(path) == [path]


def test_a_large_parquet_file_keeps_its_order_across_batches(tmp_path: Path) -> None:
    path = _write_rows(tmp_path / "large.parquet", [{"text": str(n)} for n in range(2500)])
    assert [document.text for document in file_documents(path)] == [str(n) for n in range(2500)]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    _write_rows(tmp_path / "b" / "2.jsonl", [{"text": "second"}])
    _write_rows(tmp_path / "c.parquet", [{"text": "third"}])
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert [document.text for document in file_documents(tmp_path)] == ["first", "second", "third"]
    assert document_files(tmp_path) == sorted(p for p in tmp_path.rglob("*.*") if p.suffix != ".png")


@pytest.mark.parametrize("line", ["{'text': 1}", '{"text": "cut', "7" * 5000, "[" * 100_000])
def test_a_malformed_json_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^bad\.jsonl (line )?:?3|^bad\.jsonl:3") as error:
        list(file_documents(path))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("row", [{"body": "x"}, {"text": None}, {"question": "q"}, {"text": 5}, ["text"], "text"])
def test_a_row_without_the_fields_is_named(tmp_path: Path, row: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: .*a row with text, or question and answer"):
        list(file_documents(path))


def test_what_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"PK")
    for path in (tmp_path / "nothing", tmp_path / "notes.docx", tmp_path):
        with pytest.raises(UserError, match=r"^data\.path: got .* allowed: (an existing|\.txt, .* or \.parquet)"):
            list(file_documents(path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = _write_rows(tmp_path / "data.parquet", [{"text": "x" * 1000}])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"^data\.path: got .*data\.parquet"):
        list(file_documents(path))


def test_bytes_that_are_not_utf8_become_replacement_characters(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert [document.text for document in file_documents(tmp_path)] == ["caf\ufffd"]


CONVERSATION = (("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "text": "ignored"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
    ],
)
def test_instruction_rows_are_read_from_all_formats(tmp_path: Path, suffix: str, row: dict[str, object]) -> None:
    path = _write_rows(tmp_path / f"data{suffix}", [row, row])
    assert list(file_documents(path)) == [
        Document(f"data{suffix}:{n}", "", messages=CONVERSATION) for n in (1, 2)
    ]  # fmt: skip


def test_json_lists_are_read_item_by_item_across_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": 'ü[],{}\\"' * (n % 23)} for n in range(200)]
    for indent in (None, 2):
        path = tmp_path / f"{indent}.json"
        path.write_text("\ufeff \n" + json.dumps(rows, indent=indent) + "\n ", encoding="utf-8")
        for chars in (1 << 20, 7, 1):
            monkeypatch.setattr(sources, "_READ_CHARS", chars)
            if chars > 1:  # the first read must reach the bracket
                assert [document.text for document in file_documents(path)] == [row["text"] for row in rows]


def test_json_lines_under_the_name_json_are_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    assert [document.text for document in file_documents(path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', 'data.json row 2: got \' {"text"'),
        ('[{"text": "a"},', "data.json row 2: got ','"),
        ('[{"text": "a"},]', "data.json row 2"),
        ('[,{"text": "a"}]', "data.json row 1"),
        ('[{"text": "a"}, {"text": "b', "data.json row 2"),
        ('[{"text": "a"}] x', "data.json: got 'x', allowed: nothing after the list"),
        ('[12, {"text": "a"}]', "data.json:1: got 'int'"),
        ('"text"', "data.json: got '\"text\"', allowed: a list of rows, or one JSON object a line"),
        ("[" * 100_000, "data.json row 1"),
        ('{"data": []}', "data.json:1: got ['data']"),
    ],
)
def test_a_json_file_that_is_no_list_of_rows_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list(file_documents(tmp_path))
    assert str(error.value).startswith(message) and len(str(error.value)) < 400


@pytest.mark.parametrize("cut", [5, 40])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = _write_rows(tmp_path / "data.jsonl.gz", [{"text": str(n) * 50} for n in range(500)])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"^data\.path: got .*data\.jsonl\.gz.* a whole gzip file"):
        list(file_documents(path))


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json"])
def test_a_row_without_end_does_not_fill_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ROW_CHARS", 1 << 16)
    monkeypatch.setattr(sources, "_READ_CHARS", 1 << 12)
    content = ('["' if name == "data.json" else "") + "x" * (1 << 24)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    tracemalloc.start()
    with pytest.raises(UserError, match=r"^data\.json\S* (line|row) 1: got 'more than 65536 characters'"):
        list(file_documents(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_large_list_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_READ_CHARS", 1 << 16)
    path = _write_rows(tmp_path / "data.json", [{"text": "x" * 1000} for _ in range(6000)])
    tracemalloc.start()
    assert sum(len(document.text) for document in file_documents(path)) == 6_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 < path.stat().st_size


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return path
