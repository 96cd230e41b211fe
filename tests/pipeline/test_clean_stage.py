"""The clean stage: files and figures of a corpus, and one line for what cannot be cleaned."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import Layout, StageRun
from pipeline.data.cleaning import CleaningSettings
from pipeline.settings import Config
from pipeline.settings_training import DataConfig
from pipeline.stages import clean
from pipeline.stages.clean import cleaning_settings

ROWS = [{"text": f"This is text number {number}, long enough to be kept as one."} for number in range(80)]
Stage = Callable[..., StageRun]


@pytest.fixture
def stage(tmp_path: Path, ci_configs: dict[str, Config]) -> Stage:
    """``stage(path, rules="web")``: the run of a stage on files of one's own."""

    def prepare(path: Path, **changes: object) -> StageRun:
        config = next(iter(ci_configs.values()))
        data = DataConfig.model_validate(config.data.model_dump() | {"source": "local", "path": path} | changes)
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        return StageRun(config.model_copy(update={"data": data}), Layout(tmp_path), output, tmp_path / "checkpoint")

    return prepare


def test_rows_figures_and_a_page_are_written_and_unfinished_work_is_removed(tmp_path: Path, stage: Stage) -> None:
    _write_jsonl(tmp_path / "corpus.jsonl", [*ROWS, ROWS[3], {"text": "short"}])
    clean.run(stage(tmp_path / "corpus.jsonl", workers=2))
    figures = json.loads((tmp_path / "reports" / "metrics" / "clean.json").read_text())
    assert figures["documents"] == 82 and figures["kept"] == 80
    assert figures["dropped"] == {"duplicate": 1, "too_short": 1} and figures["licence"] == "the user's own data"
    lines = {side: (tmp_path / "output" / f"{side}.jsonl").read_text().splitlines() for side in ("train", "held_out")}
    assert [len(lines[side]) for side in ("train", "held_out")] == [
        figures["train_documents"], figures["held_out_documents"],
    ]  # fmt: skip
    assert sorted(json.loads(line)["text"] for line in lines["train"] + lines["held_out"]) == sorted(
        row["text"] for row in ROWS
    )
    assert "82 documents read, 80 kept" in (tmp_path / "output" / "cleaning.md").read_text()
    assert not (tmp_path / "checkpoint").exists()


def test_every_setting_of_the_data_group_reaches_the_library() -> None:
    values = {
        "min_chars": 7, "max_chars": 77, "held_out_modulus": 3, "rules": "web", "languages": ["en", "zh"],
        "pii": "drop", "near_duplicates": 0.7, "decontaminate": ["exam.jsonl"], "workers": 5, "engine": "ray",
    }  # fmt: skip
    settings = cleaning_settings(DataConfig.model_validate(values | {"source": "local", "path": "somewhere"}))
    assert settings == CleaningSettings(
        7, 77, 3, "web", ("en", "zh"), "drop", 0.7, (Path("exam.jsonl"),), 5, "ray"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("cut.parquet", lambda path: _cut(path, _write_parquet), r"cut\.parquet"),
        ("cut.jsonl", lambda path: _cut(path, _write_jsonl), r"cut\.jsonl line 80"),
        ("cut.jsonl.gz", lambda path: _cut(path, _write_gzip), r"cut\.jsonl\.gz"),
        ("columns.jsonl", lambda path: _write_jsonl(path, [{"body": "no text"}]), r"columns\.jsonl:1: got \['body'\]"),
        ("columns.parquet", lambda path: _write_parquet(path, [{"body": "no text"}]), r"columns\.parquet:1: got"),
        ("empty.jsonl", lambda path: _write_jsonl(path, []), "data: got '0 documents kept, 0 of them held out'"),
        ("dropped.jsonl", lambda path: _write_jsonl(path, [{"text": "x"}] * 9), "data: got '0 documents kept"),
        ("one.jsonl", lambda path: _write_jsonl(path, ROWS[:1]), "data: got '1 documents kept, . of them held out'"),
    ],
)
def test_what_cannot_be_cleaned_is_one_line(
    tmp_path: Path, stage: Stage, name: str, damage: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "corpus").mkdir()
    damage(tmp_path / "corpus" / name)
    with pytest.raises(UserError, match=message) as raised:
        clean.run(stage(tmp_path / "corpus"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "reports").exists()


def test_a_disk_that_fills_at_the_figures_is_one_line(
    tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    _write_jsonl(tmp_path / "corpus.jsonl", ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(clean, "write_json", full)
        with pytest.raises(UserError, match=r"^free disk: got 'none left .*the same command goes on from here"):
            clean.run(stage(tmp_path / "corpus.jsonl"))
    assert (tmp_path / "checkpoint").exists()
    clean.run(stage(tmp_path / "corpus.jsonl"))
    assert json.loads((tmp_path / "reports" / "metrics" / "clean.json").read_text())["kept"] == 80


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_gzip(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def _write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _cut(path: Path, write: Callable[[Path, list[dict[str, str]]], None]) -> None:
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
