"""Training documents dealt out to clients by module."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data import shards
from pipeline.data.cleaning import CleaningSettings, clean_corpus
from pipeline.data.shards import deal, group_by_module, module_of, read_training_rows, write_shards
from pipeline.data.sources import Document

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
DOCUMENTS = [
    Document(f"doc:module{number % 7}.member{number}", f"{WORDS} {number}\n" * (1 + number % 5), f"What is {number}?")
    for number in range(120)
] + [Document("topic:with#The with statement", WORDS + " é", "What?")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """What the pipeline's clean stage writes of DOCUMENTS."""
    clean_corpus(DOCUMENTS, tmp_path, CleaningSettings(10, 9999, 20), tmp_path / "checkpoint")
    return tmp_path / "train.jsonl"


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def run(out: Path, corpus: Path, clients: int = 3) -> int:
    return shards.main(["--out", str(out), "--clients", str(clients), "--corpus", str(corpus)])


def test_every_training_text_has_one_owner_and_no_held_out_text_any(corpus: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "out", corpus) == 0
    files = sorted((tmp_path / "out").rglob("*.*"))
    dealt = [text for file in files for text in texts(file)]
    assert sorted(dealt) == sorted(texts(corpus))
    assert not set(dealt) & set(texts(corpus.with_name("held_out.jsonl")))
    assert sorted({file.parent.name for file in files}) == ["client-1", "client-2", "client-3"]


def test_a_module_belongs_to_one_client_whole(corpus: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", corpus)
    names = [file.name for file in (tmp_path / "out").rglob("*.jsonl")]
    assert len(names) == len(set(names)) and "topic-with.jsonl" in names
    for file in (tmp_path / "out").rglob("module*.jsonl"):
        numbers = {int(number) for number in re.findall(r"tau (\d+)", file.read_text())}
        assert numbers and {f"module{number % 7}.jsonl" for number in numbers} == {file.name}


def test_the_largest_go_first_and_to_the_client_that_has_least() -> None:
    modules = {name: ["x" * size] for name, size in {"a": 100, "b": 90, "c": 60, "d": 40, "e": 30}.items()}
    shares = {client: sorted(shard) for client, shard in deal(modules, 2).items()}
    assert shares == {"client-1": ["a", "d", "e"], "client-2": ["b", "c"]}


def test_the_order_of_modules_does_not_matter() -> None:
    modules = {f"m{n}": ["x" * (n % 4)] for n in range(20)}
    assert deal(modules, 3) == deal(dict(reversed(modules.items())), 3)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("doc:asyncio.locks.Lock", "asyncio"),
        ("doc:builtins", "builtins"),
        ("topic:with#The with statement", "topic-with"),
        ("topic:typesseq-mutable", "topic-typesseq-mutable"),
        ("book.txt:12", "12"),
        ("doc:../../etc/passwd", "_"),
        ("", "_"),
    ],
)
def test_module_names_are_safe_file_names(source: str, module: str) -> None:
    assert module_of(source) == module


def test_the_same_split_twice_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, corpus) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(out, corpus) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("clients", [2, 4])
def test_another_split_is_not_mixed_in(
    corpus: Path, tmp_path: Path, clients: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "out", corpus)
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    capsys.readouterr()
    assert run(tmp_path / "out", corpus, clients) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "client-" in printed.err and not printed.out
    assert sorted(path for path in (tmp_path / "out").rglob("*")) == before


def test_a_clients_own_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "client-1").mkdir()
    (tmp_path / "client-1" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="client-1"):
        write_shards(tmp_path, {"client-1": {"m": '{"text": "x"}\n'}})
    assert [path.name for path in tmp_path.rglob("*")] == ["client-1", "diary.txt"]


def test_an_interrupted_split_is_completed(corpus: Path, tmp_path: Path) -> None:
    rows = read_training_rows(corpus)
    wanted = deal(group_by_module(rows), 3)
    write_shards(tmp_path / "out", {"client-1": wanted["client-1"]})
    assert run(tmp_path / "out", corpus) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["client-1", "client-2", "client-3"]


def test_personal_data_that_was_replaced_loses_no_document(tmp_path: Path) -> None:
    documents = [*DOCUMENTS, Document("doc:mail.send", f"{WORDS} Write to jane.roe@python-mail.org.")]
    clean_corpus(documents, tmp_path, CleaningSettings(10, 9999, 10**6, pii="replace"), tmp_path / "checkpoint")
    (text,) = group_by_module(read_training_rows(tmp_path / "train.jsonl"))["mail"]
    assert "[EMAIL]" in text


@pytest.mark.parametrize(
    ("content", "clients", "says"),
    [
        (None, 3, "run python -m pipeline"),
        ("", 3, "at least one document"),
        ("{", 3, "line 1"),
        ("[]\n", 3, "line 1"),
        ('{"document": 5, "text": "x"}\n', 3, "line 1"),
        ('{"document": "feed", "text": "unknown"}\n', 3, "line 1"),
        ('{"document": "feed", "text": "known", "source": "doc:a.b"}\n', 2, "--clients: got 2, allowed: 1 to 1"),
        ('{"document": "feed", "text": "known", "source": "doc:a.b"}\n', 0, "--clients: got 0, allowed: 1 to 1"),
        ("\udcff", 3, "a cleaned text file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, content: str | None, clients: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert run(tmp_path / "out", tmp_path / "train.jsonl", clients) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_held_out_text_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", corpus.with_name("held_out.jsonl")) == 2
    assert "held-out" in capsys.readouterr().err and not (tmp_path / "out").exists()
