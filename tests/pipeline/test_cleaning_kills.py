"""A cleaning run that is killed, or meets a full disk, goes on to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data import cleaning, cleaning_journal
from pipeline.data.cleaning import CleaningReport, CleaningSettings, clean_corpus
from pipeline.data.sources import Document

SETTINGS = CleaningSettings(
    min_chars=10, held_out_modulus=3, near_duplicates=0.7, chunk_documents=3, part_documents=6, pii="replace"
)
KILLS = 40


def documents() -> Iterator[Document]:
    """Forty documents, some of them short, equal or nearly equal to others in other parts."""
    for number in range(40):
        base = number - 17 if number % 5 == 0 and number > 20 else number
        words = [f"word{base * 100 + place}" for place in range(25)]
        if number % 10 == 5:
            words[-1] = f"changed{number}"
        text = "short" if number % 11 == 4 else " ".join(words)
        question = None if number % 3 else f"What is {number}? ask a{number}@mail.org"
        yield Document(f"source {number}", text, question)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is for power cuts; a killed process leaves what it wrote to the kernel."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(cleaning_journal, "_SETTINGS", ("journal_mode = TRUNCATE", "synchronous = OFF"))


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What a run writes that nothing disturbs."""
    report = _clean(tmp_path / "whole")
    assert report.dropped.keys() == {"too_short", "duplicate", "near_duplicate"} and report.kept > 20
    return _outputs(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"workers": 2}, {"chunk_documents": 40}, {"part_documents": 1}])
def test_bytes_do_not_depend_on_who_works_and_how_much_at_once(
    tmp_path: Path, whole: dict[str, bytes], changes: dict[str, Any]
) -> None:
    _clean(tmp_path / "other", replace(SETTINGS, **changes))
    assert _outputs(tmp_path / "other") == whole


def test_a_run_killed_at_any_line_goes_on_to_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    lines = _lines_of_a_run(tmp_path / "counted")
    assert lines > 4 * KILLS
    for place in range(KILLS):
        folder = tmp_path / f"killed {place}"
        assert _killed(folder, (2 * place + 1) * lines // (2 * KILLS))
        _clean(folder)
        assert _outputs(folder) == whole, f"killed at line {place} of {KILLS}"


def test_a_run_killed_again_and_again_ends(tmp_path: Path, whole: dict[str, bytes]) -> None:
    lines, kills = _lines_of_a_run(tmp_path / "counted"), 0
    while _killed(tmp_path / "again", lines * 2 // 5):
        kills += 1
        assert kills < 20
    assert kills >= 2 and _outputs(tmp_path / "again") == whole


def test_finished_parts_are_not_cleaned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _lines_of_a_run(tmp_path / "counted")
    assert _killed(tmp_path / "killed", lines // 2)
    judged = []
    judge = cleaning.judge_chunk
    monkeypatch.setattr(cleaning, "judge_chunk", lambda plan, chunk: judged.append(chunk) or judge(plan, chunk))
    report = _clean(tmp_path / "killed")
    assert report.documents == 40 and 6 <= sum(len(chunk.documents) for chunk in judged) <= 34


def test_other_documents_than_before_are_refused(tmp_path: Path) -> None:
    assert _killed(tmp_path / "killed", _lines_of_a_run(tmp_path / "counted") // 2)
    changed = [Document("new", "a document that was not there"), *documents()]
    with pytest.raises(UserError, match=r"^data: got 'other documents .*remove the checkpoint"):
        _clean(tmp_path / "killed", documents=changed)
    with pytest.raises(UserError, match=r"^data: got 'other documents .*remove the checkpoint"):
        _clean(tmp_path / "killed", documents=list(documents())[:5])


def test_other_settings_than_before_begin_again(tmp_path: Path) -> None:
    other = replace(SETTINGS, held_out_modulus=2)
    _clean(tmp_path / "fresh", other)
    assert _killed(tmp_path / "killed", _lines_of_a_run(tmp_path / "counted") // 2)
    _clean(tmp_path / "killed", other)
    assert _outputs(tmp_path / "killed") == _outputs(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["cut", "removed", "changed"])
def test_a_damaged_part_is_found(tmp_path: Path, damage: str) -> None:
    _clean(tmp_path / "run")
    part = tmp_path / "run" / "checkpoint" / "parts" / "train-000001.jsonl"
    content = part.read_bytes()
    if damage == "removed":
        part.unlink()
    else:
        part.write_bytes(content[:-1] if damage == "cut" else content.replace(b"w", b"v"))
    with pytest.raises(UserError, match=r"^checkpoint: got .*train-000001.*remove .*checkpoint and run"):
        _clean(tmp_path / "run")


def test_a_damaged_database_is_one_line(tmp_path: Path) -> None:
    _clean(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / "journal.sqlite"
    path.write_bytes(b"no database at all, but long enough " * 100)
    with pytest.raises(UserError, match=r"^checkpoint: .*not a database.*remove "):
        _clean(tmp_path / "run")


def test_a_disk_that_fills_at_any_write_is_one_line_and_the_run_goes_on(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """A limit on the size of files, as a quota sets it, met by parts, by the database and by the output."""
    sizes = {path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    refused = 0
    for limit_bytes in (1, 2000, 30_000, *(size - 1 for size in sorted(sizes) if size > 1)):
        folder = tmp_path / f"full {limit_bytes}"
        message = _in_child(lambda limit_bytes=limit_bytes, folder=folder: _clean_with_limit(folder, limit_bytes))
        if not message:
            assert limit_bytes > 30_000
            continue
        refused += 1
        assert message.count("\n") == 0 and message.startswith(("free disk: got", "checkpoint: got"))
        assert "the same command goes on from here" in message
        assert not (folder / "output" / "held_out.jsonl").exists() or _outputs(folder) != whole
        _clean(folder)
        assert _outputs(folder) == whole
    assert refused >= 5


def test_errors_that_are_not_a_full_disk_stay_what_they_are(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from documents()
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        _clean(tmp_path / "run", documents=broken())
    with pytest.raises(UserError, match=r"^line 7"):
        _clean(tmp_path / "run", documents=_failing())
    assert not list((tmp_path / "run" / "output").iterdir())


def test_sqlite_reports_the_limit_that_these_tests_set(tmp_path: Path) -> None:
    """What a full database raises is what is caught: not every error of sqlite."""
    with cleaning_journal.full_disk_refused(tmp_path), pytest.raises(sqlite3.ProgrammingError):
        connection = sqlite3.connect(":memory:")
        connection.close()
        connection.execute("SELECT 1")


def _failing() -> Iterator[Document]:
    yield next(documents())
    raise UserError("line 7", "{", "one JSON object a line")


def _clean(folder: Path, settings: CleaningSettings = SETTINGS, **given: Any) -> CleaningReport:
    output = folder / "output"
    output.mkdir(parents=True, exist_ok=True)
    for path in output.iterdir():
        path.unlink()
    report = clean_corpus(given.get("documents", documents()), output, settings, folder / "checkpoint")
    (output / "report.json").write_text(json.dumps(_values(report), sort_keys=True))
    return report


def _values(report: CleaningReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in CleaningReport.__slots__}


def _outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "output").iterdir())}


def _clean_with_limit(folder: Path, limit_bytes: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        output = folder / "output"
        output.mkdir(parents=True)
        clean_corpus(documents(), output, SETTINGS, folder / "checkpoint")
    except UserError as error:
        return str(error)
    return ""


def _lines_of_a_run(folder: Path) -> int:
    return int(_in_child(lambda: str(_traced(folder, None))))


def _killed(folder: Path, line: int) -> bool:
    """Whether a run in a process of its own was killed there; if not, it is finished."""
    return _in_child(lambda: str(_traced(folder, line))) == ""


def _traced(folder: Path, killed_at: int | None) -> int:
    """Clean with a count of the lines of the module that changes what is on disk."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if event == "call":
            return trace if frame.f_code.co_filename == cleaning_journal.__file__ else None
        if event == "line":
            count += 1
            if count == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        _clean(folder)
    finally:
        sys.settrace(None)
    return count


def _in_child(work: Callable[[], str]) -> str:
    """The text that a forked process returns; nothing when it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(write, work().encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the child failed: {status}"
    return answer
