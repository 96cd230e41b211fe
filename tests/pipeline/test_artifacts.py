"""Outputs are whole or absent, one process writes each, and a full disk is refused before work begins."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from edge_runtime.formats.errors import UserError
from pipeline import artifacts
from pipeline.artifacts import (
    Layout,
    atomic_directory,
    content_digest,
    file_digest,
    fingerprint,
    read_json,
    recorded_fingerprint,
    require_disk,
    sole_writer,
    tree_digest,
    write_atomic,
    write_json,
    write_record,
)

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "total used free")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file.json"
    write_atomic(path, "first")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fails(*_arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fails)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_json_comes_back_and_equal_values_are_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, "ä", None]})
    write_json(tmp_path / "b", {"a": [1.5, "ä", None], "b": 1})
    assert read_json(tmp_path / "a") == {"a": [1.5, "ä", None], "b": 1}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(UserError, match=r"^input: got .*nothing.*run python -m pipeline$"):
        read_json(tmp_path / "nothing")


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "output"
    with atomic_directory(path) as partial:
        (partial / "file").write_text("new")
        assert not path.exists()
    assert (path / "file").read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_directory(tmp_path: Path) -> None:
    path = tmp_path / "output"
    with atomic_directory(path) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(path) as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert (path / "file").read_text() == "old"
    with atomic_directory(path) as partial:
        assert not list(partial.iterdir()), "what the other left is gone"
        (partial / "other").write_text("new")
    assert [file.name for file in path.iterdir()] == ["other"]


class TestRecords:
    @pytest.fixture
    def layout(self, tmp_path: Path) -> Layout:
        output = tmp_path / "artifacts" / "corpus"
        (output / "deep").mkdir(parents=True)
        (output / "train.jsonl").write_text("text")
        (output / "deep" / "file").write_text("more")
        return Layout(tmp_path)

    def test_a_finished_output_is_known_by_its_fingerprint(self, layout: Layout) -> None:
        before = tree_digest(layout.corpus)
        assert recorded_fingerprint(layout, layout.corpus) is None
        write_record(layout, layout.corpus, "f00d", 1.0)
        assert recorded_fingerprint(layout, layout.corpus) == "f00d"
        assert content_digest(layout, layout.corpus) == tree_digest(layout.corpus) == before, "nothing lies inside"

    @pytest.mark.parametrize("change", ["content", "new file", "lost file", "lost record", "cut record", "gone"])
    def test_an_output_changed_by_something_else_is_unknown(self, layout: Layout, change: str) -> None:
        write_record(layout, layout.corpus, "f00d", 1.0)
        record = layout.record(layout.corpus)
        {
            "content": lambda: (layout.corpus / "train.jsonl").write_text("other"),
            "new file": lambda: (layout.corpus / "added").write_text(""),
            "lost file": lambda: (layout.corpus / "deep" / "file").unlink(),
            "lost record": record.unlink,
            "cut record": lambda: record.write_text(record.read_text()[:-5]),
            "gone": lambda: shutil.rmtree(layout.corpus),
        }[change]()
        assert recorded_fingerprint(layout, layout.corpus) is None
        assert content_digest(layout, layout.corpus) == tree_digest(layout.corpus)

    def test_outputs_of_different_submodels_have_records_of_their_own(self, layout: Layout) -> None:
        outputs = [layout.corpus, layout.teacher, layout.targets]
        for name in ("tiny", "base"):
            outputs += [
                getattr(layout, kind)(name) for kind in ("student", "weights", "exports", "evaluation", "package")
            ]
        assert len({layout.record(output) for output in outputs}) == len(outputs) == 13


def test_tree_digest_sees_names_and_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    digests = [tree_digest(tmp_path)]
    (tmp_path / "a" / "x").rename(tmp_path / "x")
    digests.append(tree_digest(tmp_path))
    (tmp_path / "x").write_text("2")
    digests.append(tree_digest(tmp_path))
    assert len(set(digests)) == 3
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"2").hexdigest()


def test_fingerprint_depends_on_settings_code_and_inputs(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("1")
    (code / "notes.txt").write_text("ignored")
    first = fingerprint("stage", {"x": 1, "y": 2}, code=[code], inputs=["digest"])
    (code / "notes.txt").write_text("changed")
    assert fingerprint("stage", {"y": 2, "x": 1}, code=[code], inputs=["digest"]) == first
    others = [
        fingerprint("stage", {"x": 1, "y": 3}, code=[code], inputs=["digest"]),
        fingerprint("stage", {"x": 1, "y": 2}, code=[code], inputs=["other"]),
        fingerprint("other", {"x": 1, "y": 2}, code=[code], inputs=["digest"]),
    ]
    (code / "a.py").write_text("2")
    others.append(fingerprint("stage", {"x": 1, "y": 2}, code=[code], inputs=["digest"]))
    assert len({first, *others}) == 5


def test_one_process_writes_an_output_at_a_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert _lock_from_another_process(tmp_path, "distill", "tiny") == "locked"
    with sole_writer(layout, "distill", "tiny"):
        assert _lock_from_another_process(tmp_path, "distill", "tiny").startswith(
            "stage: got 'distill', allowed: one writer at a time"
        )
        assert _lock_from_another_process(tmp_path, "distill", "base") == "locked"
        assert _lock_from_another_process(tmp_path, "clean", "") == "locked"
    assert _lock_from_another_process(tmp_path, "distill", "tiny") == "locked"


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = f"{_IMPORTS}, os\nwith sole_writer(Layout(Path(sys.argv[1])), 'clean', None): os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    with sole_writer(Layout(tmp_path), "clean", None):
        pass


def test_work_that_does_not_fit_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**12, 0, 5 * 10**9)

    monkeypatch.setattr(artifacts.shutil, "disk_usage", usage)
    require_disk(tmp_path / "not" / "yet", 5 * 10**9)
    with pytest.raises(
        UserError, match=r"^free disk: got '5\.00 GB', allowed: at least 6\.00 GB at .*; free some space"
    ):
        require_disk(tmp_path / "not" / "yet", 6 * 10**9)
    assert asked == [tmp_path, tmp_path]


_IMPORTS = "from pathlib import Path; from pipeline.artifacts import Layout, sole_writer; import sys"
_LOCK = f"""{_IMPORTS}
from edge_runtime.formats.errors import UserError
try:
    with sole_writer(Layout(Path(sys.argv[1])), sys.argv[2], sys.argv[3] or None):
        print("locked")
except UserError as error:
    print(error)
"""


def _lock_from_another_process(root: Path, stage: str, submodel: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _LOCK, str(root), stage, submodel], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
