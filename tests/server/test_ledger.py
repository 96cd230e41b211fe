from __future__ import annotations

import hashlib
import json
import logging
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.errors import UserError
from server import ledger as ledger_module
from server.ledger import MAX_RECORD_BYTES, Ledger, load_checkpoint, read_records, save_checkpoint

RECORDS = [{"event": "round", "round": n, "declined": {"heat": n}, "text": "ü\n\u2028", "x": 0.1 * n} for n in range(4)]


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_records_come_back_as_they_were_written(tmp_path) -> None:
    ledger = Ledger(tmp_path / "new" / "run")
    assert ledger.records() == []
    for record in RECORDS:
        ledger.append(record)
    assert ledger.records() == RECORDS == Ledger(tmp_path / "new" / "run").records()
    lines = (tmp_path / "new" / "run" / "ledger.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_a_record_is_on_the_disk_when_append_returns(tmp_path, monkeypatch) -> None:
    ledger = Ledger(tmp_path)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle)))
    ledger.append({"a": 1})
    assert synced == [len(b'{"a":1}\n')]


def test_the_name_of_a_new_ledger_is_on_the_disk_too(tmp_path, monkeypatch) -> None:
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    Ledger(tmp_path / "run")
    assert synced == [(tmp_path / "run").stat().st_ino]


def test_a_line_cut_at_any_byte_is_dropped(tmp_path, caplog) -> None:
    ledger = Ledger(tmp_path)
    for record in RECORDS:
        ledger.append(record)
    whole = ledger.path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        ledger.path.write_bytes(whole[:end])
        caplog.clear()
        assert read_records(ledger.path) == RECORDS[:-1]
        assert Ledger(tmp_path).records() == RECORDS[:-1]
        assert ledger.path.read_bytes() == whole[:last]
        assert len(caplog.records) == (end > last)
        Ledger(tmp_path).append(RECORDS[-1])
        assert ledger.path.read_bytes() == whole


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 50, b"\0" * 50 + b"\n", b'{"a":1', b'{"a":\n', b"[1]\n", b"\xff\xfe\n", b"\n"]
)
def test_rubbish_at_the_end_is_dropped(tmp_path, rubbish) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(RECORDS[0])
    with ledger.path.open("ab") as file:
        file.write(rubbish)
    assert Ledger(tmp_path).records() == RECORDS[:1]
    ledger.append(RECORDS[1])
    assert ledger.path.read_bytes().count(b"\n") == 2 and ledger.records() == RECORDS[:2]


def test_a_ledger_of_one_cut_line_is_empty_afterwards(tmp_path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(b'{"event":"st')
    assert Ledger(tmp_path).records() == []
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_left_out_and_said(tmp_path, caplog) -> None:
    ledger = Ledger(tmp_path)
    for record in RECORDS:
        ledger.append(record)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    lines[1] = b"x" * 20 + b"\n"
    ledger.path.write_bytes(b"".join(lines))
    with caplog.at_level(logging.WARNING):
        assert Ledger(tmp_path).records() == [RECORDS[0], *RECORDS[2:]]
    assert "1 of 4 lines are damaged" in caplog.text


def test_an_append_that_the_disk_cut_is_repaired_by_the_next_one(tmp_path, monkeypatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(RECORDS[0])
    write = os.write

    def full_disk(handle, content):
        write(handle, bytes(content[:7]))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            ledger.append(RECORDS[1])
    ledger.append(RECORDS[2])
    assert ledger.records() == [RECORDS[0], RECORDS[2]]


def test_short_writes_are_continued(tmp_path, monkeypatch) -> None:
    write = os.write
    ledger = Ledger(tmp_path)
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, bytes(content[:3])))
    for record in RECORDS:
        ledger.append(record)
    assert ledger.records() == RECORDS


def test_what_is_no_plain_json_or_too_long_is_not_written(tmp_path) -> None:
    ledger = Ledger(tmp_path)
    for record, error in [
        ({"x": float("nan")}, ValueError),
        ({"x": "y" * MAX_RECORD_BYTES}, ValueError),
        ({"x": {1}}, TypeError),
    ]:
        with pytest.raises(error):
            ledger.append(record)
    assert ledger.path.read_bytes() == b""
    longest = {"x": "y" * (MAX_RECORD_BYTES - 9)}
    for _ in range(3):
        ledger.append(longest)
    with ledger.path.open("ab") as file:
        file.write(b'{"x":"' + b"y" * (MAX_RECORD_BYTES - 20))
    assert Ledger(tmp_path).records() == [longest] * 3


def test_reading_is_bounded_to_whole_records_of_the_tail(tmp_path) -> None:
    ledger = Ledger(tmp_path)
    for record in RECORDS:
        ledger.append(record)
    sizes = [len(line) for line in ledger.path.read_bytes().splitlines(keepends=True)]
    for count in range(5):
        tail = sum(sizes[4 - count :])
        assert ledger.records(tail) == RECORDS[4 - count :]
        assert ledger.records(tail + 1) == RECORDS[4 - count :]
        if count:
            assert ledger.records(tail - 1) == RECORDS[5 - count :]
    assert read_records(tmp_path / "none.jsonl") == []


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_file_keeps_a_ledger_from_opening(tmp_path_factory, content) -> None:
    directory = tmp_path_factory.mktemp("ledger")
    (directory / "ledger.jsonl").write_bytes(content)
    before = len(Ledger(directory).records())
    Ledger(directory).append({"a": 1})
    assert Ledger(directory).records()[before:] == [{"a": 1}]


ARRAYS = {
    "factors.a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "residual": np.array([np.nan, -0.0, 1e-320]),
    "raw": np.frombuffer(b"bytes", np.uint8),
    "count": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float16),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "truth": np.array([True, False]),
    "signed": np.array([-128, 127], np.int8),
    "short": np.array([-(2**31)], np.int32),
    "every other": np.arange(6, dtype=np.float64)[::2],
}
META = {"seed": 2**63 - 1, "devices": [{"name": "ü", "none": None}], "x": 0.1}


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 12, ARRAYS, META)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    number, arrays, meta = found
    assert (number, meta, set(arrays)) == (12, META, set(ARRAYS))
    for name, value in ARRAYS.items():
        assert arrays[name].dtype == value.dtype and arrays[name].shape == value.shape
        assert arrays[name].tobytes() == value.tobytes()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert files(tmp_path / "checkpoints") == [f"0000000012-{digest}.safetensors"]


def test_other_tools_read_a_checkpoint(tmp_path) -> None:
    from safetensors import safe_open

    with safe_open(save_checkpoint(tmp_path, 1, ARRAYS, META), "np") as file:
        assert set(file.keys()) == set(ARRAYS)
        assert np.array_equal(file.get_tensor("turned"), ARRAYS["turned"])


def test_the_same_state_is_the_same_file(tmp_path) -> None:
    assert {save_checkpoint(tmp_path, 3, ARRAYS, META).name for _ in range(5)} == {files(tmp_path)[0]}
    backwards = dict(reversed(ARRAYS.items()))
    assert save_checkpoint(tmp_path, 3, backwards, dict(reversed(META.items()))).name == files(tmp_path)[0]


def test_the_one_before_is_kept_and_no_more(tmp_path) -> None:
    for number in range(5):
        save_checkpoint(tmp_path, number, {"x": np.full(3, number)}, {})
        assert [int(name[:10]) for name in files(tmp_path)] == [*range(max(number - 1, 0), number + 1)]
    assert load_checkpoint(tmp_path)[0] == 4


def test_there_is_none_at_first(tmp_path) -> None:
    assert load_checkpoint(tmp_path / "checkpoints") is None
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".0000000001-half").write_text("")
    assert load_checkpoint(tmp_path) is None


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "cut":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = bytearray()
    elif how == "longer":
        raw += b"\0"
    else:
        raw[{"header": 20, "values": -1}[how]] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["cut", "empty", "longer", "header", "values"])
def test_a_damaged_newest_gives_way_to_the_one_before_and_is_overtaken(tmp_path, caplog, how) -> None:
    save_checkpoint(tmp_path, 1, {"x": np.ones(3)}, {"good": True})
    newest = save_checkpoint(tmp_path, 2, {"x": np.ones(3)}, {})
    damage(newest, how)
    number, _, meta = load_checkpoint(tmp_path)
    assert (number, meta) == (1, {"good": True})
    assert [record.message for record in caplog.records] == [
        f"checkpoint {newest} is damaged; the one before it is used"
    ]
    again = save_checkpoint(tmp_path, 2, {"x": np.zeros(3)}, {})
    assert [name[:10] for name in files(tmp_path)] == ["0000000001", "0000000002"] and again.exists()
    assert load_checkpoint(tmp_path).arrays["x"].tolist() == [0, 0, 0]


def test_a_round_done_again_wins_over_its_damaged_first_try_before_that_is_removed(tmp_path) -> None:
    save_checkpoint(tmp_path, 1, {}, {})
    first = save_checkpoint(tmp_path, 2, {"x": np.zeros(1)}, {})
    damage(first, "cut")
    kept = first.read_bytes()
    save_checkpoint(tmp_path, 2, {"x": np.ones(1)}, {})
    first.write_bytes(kept)  # as if the crash came before the removal
    assert load_checkpoint(tmp_path).arrays["x"] == 1


def test_a_whole_file_under_another_digests_name_is_damaged(tmp_path) -> None:
    path = save_checkpoint(tmp_path, 1, {}, {})
    path.rename(path.with_name(f"0000000001-{'0' * 64}.safetensors"))
    with pytest.raises(UserError, match="at least one whole checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\2\0\0\0\0\0\0\0{}", b"\xff" * 40])
def test_a_file_with_the_right_digest_that_is_no_checkpoint_is_damaged(tmp_path, content) -> None:
    (tmp_path / f"0000000001-{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="checkpoints"):
        load_checkpoint(tmp_path)


def test_a_file_beyond_any_checkpoint_is_not_read(tmp_path, monkeypatch) -> None:
    path = save_checkpoint(tmp_path, 1, {"x": np.zeros(100)}, {})
    monkeypatch.setattr(ledger_module, "MAX_CHECKPOINT_BYTES", path.stat().st_size)
    assert load_checkpoint(tmp_path) is not None
    monkeypatch.setattr(ledger_module, "MAX_CHECKPOINT_BYTES", path.stat().st_size - 1)
    with pytest.raises(UserError, match="checkpoints"):
        load_checkpoint(tmp_path)


def test_all_damaged_is_no_fresh_start(tmp_path) -> None:
    for number in (1, 2):
        damage(save_checkpoint(tmp_path, number, {}, {}), "values")
    with pytest.raises(UserError, match="restore one"):
        load_checkpoint(tmp_path)


class Killed(BaseException):
    """As kill -9: nothing of ours runs after it."""


STEPS = ["fsync", "replace", "unlink"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_step_leaves_a_whole_checkpoint(tmp_path, monkeypatch, after) -> None:
    """Every call that touches the disk is the last one once; then a resume reads, and the round is done again."""
    first = {"x": np.zeros(3)}, {"state": "old"}
    second = {"x": np.ones(3)}, {"state": "new"}
    seen = []
    for victim in itertools_count():
        directory = tmp_path / str(victim)
        save_checkpoint(directory, 1, *first)
        save_checkpoint(directory, 2, *first)
        calls = []
        with monkeypatch.context() as patch:
            kill_at(patch, calls, victim, after)
            try:
                save_checkpoint(directory, 3, *second)
            except Killed:
                pass
            else:
                break
        seen.append(calls[-1])
        found = load_checkpoint(directory)
        assert found is not None and (found.round, found.meta["state"]) in [(2, "old"), (3, "new")]
        renamed = "replace" in calls[:-1] or (after and calls[-1] == "replace")
        assert (found.round == 3) == renamed
        save_checkpoint(directory, 3, *second)
        assert load_checkpoint(directory).meta == {"state": "new"}
        assert [name[:10] for name in files(directory)] == ["0000000002", "0000000003"]
    assert seen == ["fsync", "replace", "fsync", "unlink"]


def itertools_count():
    import itertools

    return itertools.count()


def kill_at(patch, calls, victim, after):
    """Make the victim-th call of STEPS the last thing that happens."""
    dead = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def step(*args, **kwargs):
            if dead:  # clean-up code that a killed process would not run
                return None
            if name == "unlink" and str(args[0]).split("/")[-1].startswith("."):
                return original(*args, **kwargs)  # the temporary file: gone already, or not ours to count
            calls.append(name)
            fatal = len(calls) == victim + 1
            if fatal and not after:
                dead.append(True)
                raise Killed
            result = original(*args, **kwargs)
            if fatal:
                dead.append(True)
                raise Killed
            return result

        patch.setattr(owner, name, step)

    wrap(os, "fsync")
    wrap(os, "replace")
    wrap(type(ledger_module.Path()), "unlink")


def test_a_disk_error_is_raised_and_the_one_before_stays(tmp_path, monkeypatch) -> None:
    save_checkpoint(tmp_path, 1, {}, {"state": "old"})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                save_checkpoint(tmp_path, 2, {}, {})
        assert load_checkpoint(tmp_path).meta == {"state": "old"} and len(files(tmp_path)) == 1


def test_writing_copies_no_array(tmp_path) -> None:
    arrays = {"x": np.ones(1 << 20, np.float64), "y": np.ones((1 << 10, 1 << 10), np.float32)}  # 12 MB
    tracemalloc.start()
    save_checkpoint(tmp_path, 1, arrays, {})
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([None]), np.zeros(2, ">f4"), np.zeros(2, np.complex64)])
def test_only_plain_numbers_are_kept(tmp_path, array) -> None:
    with pytest.raises(ValueError, match=r"x: .* arrays are not kept"):
        save_checkpoint(tmp_path, 1, {"x": array}, {})
    assert files(tmp_path) == []


@pytest.mark.parametrize(("number", "meta"), [(-1, {}), (10**10, {}), (1, {"x": float("nan")})])
def test_what_cannot_be_written_is_refused(tmp_path, number, meta) -> None:
    with pytest.raises(ValueError, match=r"round|Out of range"):
        save_checkpoint(tmp_path, number, {}, meta)
    assert files(tmp_path) == []
    assert save_checkpoint(tmp_path, 10**10 - 1, {}, {}).name.startswith("9" * 10)
