"""What survives a crash, and what a damaged file costs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from edge_runtime.federated.identity import (
    DEVICE_KEY_FILE,
    NODE_KEY_FILE,
    device_key,
    enrolment,
    node_key,
    write_enrolment,
)
from edge_runtime.federated.state import KEPT_ASIDE, KEPT_REPLIES, DeviceState, open_state
from edge_runtime.formats.envelope import Envelope
from edge_runtime.formats.errors import UserError

VECTOR = np.arange(100, dtype=np.float32)
REPLY = Envelope("update", {"weight": 3}, b"payload")
WORK = "ab" * 32


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def state(tmp_path: Path, lines: list[str]) -> DeviceState:
    return DeviceState(tmp_path, lines.append)


def test_everything_comes_back_in_a_new_process(state: DeviceState) -> None:
    state.save_greeting("demo", Envelope("hello", {"alpha": 8.0}))
    state.save_reply("demo", "1" * 64, WORK, REPLY)
    state.save_vector("demo", "held.a", VECTOR, {"version": "3", "layout": "x"})
    state.save_json("speed.json", {"step_s": 0.5})
    state.save_bytes("inbox", b"noted")
    again = DeviceState(state.directory, state.log)
    assert again.load_greeting("demo") == Envelope("hello", {"alpha": 8.0})
    assert again.load_reply("demo", "1" * 64, WORK) == REPLY
    stored = again.load_vector("demo", "held.a", {"version": "3"})
    assert stored is not None and stored.vector.tobytes() == VECTOR.tobytes() and stored.labels["layout"] == "x"
    assert again.load_json("speed.json") == {"step_s": 0.5}
    assert again.load_bytes("inbox") == b"noted"
    again.forget("inbox")
    assert again.load_bytes("inbox") is None


def test_what_was_never_stored_is_absent(state: DeviceState, lines: list[str]) -> None:
    assert state.load_greeting("demo") is None
    assert state.load_reply("demo", "1" * 64, WORK) is None
    assert state.load_vector("demo", "held.a", {}) is None
    assert state.load_json("speed.json") == {} and state.load_bytes("inbox") is None
    assert lines == []


def test_a_reply_belongs_to_its_plan_its_work_and_its_federation(state: DeviceState) -> None:
    state.save_reply("demo", "1" * 64, WORK, REPLY)
    assert state.load_reply("demo", "2" * 64, WORK) is None
    assert state.load_reply("demo", "1" * 64, "cd" * 32) is None
    assert state.load_reply("other", "1" * 64, WORK) is None


def test_the_last_replies_are_kept_and_no_more(state: DeviceState) -> None:
    for number in range(7):
        state.save_reply("demo", f"{number:064x}", WORK, REPLY)
        os.utime(state.directory / "federations/demo/replies" / f"{number:064x}", (number, number))
    kept = [n for n in range(7) if state.load_reply("demo", f"{n:064x}", WORK) is not None]
    assert len(kept) == KEPT_REPLIES and kept == [3, 4, 5, 6]


def test_a_vector_with_other_labels_is_not_used(state: DeviceState) -> None:
    state.save_vector("demo", "residual.a", VECTOR, {"layout": "x", "rank": "4"})
    assert state.load_vector("demo", "residual.a", {"layout": "x", "rank": "4"}) is not None
    assert state.load_vector("demo", "residual.a", {"layout": "y"}) is None
    assert state.load_vector("demo", "residual.a", {"seed": "1"}) is None


@pytest.mark.parametrize(
    ("kind", "damage"),
    [("vector", "label")]
    + [(k, d) for k in ("reply", "vector", "greeting", "json", "bytes") for d in ("flip", "cut", "empty", "noise")],
)
def test_a_damaged_file_is_set_aside_with_one_line_and_never_raises(
    state: DeviceState, lines: list[str], kind: str, damage: str
) -> None:
    state.save_greeting("demo", Envelope("hello", {"alpha": 8.0}))
    state.save_reply("demo", "1" * 64, WORK, REPLY)
    state.save_vector("demo", "held.a", VECTOR, {"version": "3"})
    state.save_json("speed.json", {"step_s": 0.5})
    state.save_bytes("inbox", b"noted")
    paths = {
        "reply": "federations/demo/replies/" + "1" * 64,
        "vector": "federations/demo/held.a",
        "greeting": "federations/demo/hello.json",
        "json": "speed.json",
        "bytes": "inbox",
    }
    path = state.directory / paths[kind]
    raw = path.read_bytes()
    damaged = {
        "flip": raw[:-1] + bytes([raw[-1] ^ 0x80]),
        "cut": raw[: len(raw) // 2],
        "empty": b"",
        "noise": bytes(range(256)) * 2,
        "label": raw.replace(b'"version":"3"', b'"version":"4"'),
    }[damage]
    assert damaged != raw
    path.write_bytes(damaged)
    loaded: dict[str, object] = {
        "reply": state.load_reply("demo", "1" * 64, WORK),
        "vector": state.load_vector("demo", "held.a", {}),
        "greeting": state.load_greeting("demo"),
        "json": state.load_json("speed.json") or None,
        "bytes": state.load_bytes("inbox"),
    }
    assert loaded.pop(kind) is None
    assert None not in loaded.values()
    assert len(lines) == 1 and "damaged" in lines[0] and not path.exists()
    assert len(list((state.directory / "set_aside").iterdir())) == 1


def test_what_is_set_aside_does_not_fill_the_disk(state: DeviceState) -> None:
    for number in range(KEPT_ASIDE + 5):
        (state.directory / f"f{number}").write_bytes(b"x")
        assert state.load_bytes(f"f{number}") is None
    assert len(list((state.directory / "set_aside").iterdir())) == KEPT_ASIDE


def test_files_are_the_owners_alone(state: DeviceState) -> None:
    state.save_vector("demo", "held.a", VECTOR, {})
    device_key(state.directory), node_key(state.directory)
    for path in state.directory.rglob("*"):
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_one_process_has_a_state_directory_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from edge_runtime.federated.state import open_state\n"
        "with open_state(Path(sys.argv[1]), print): print('open', flush=True); time.sleep(600)"
    )
    root = Path(__file__).resolve().parents[3]
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=root, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="no other client"), open_state(tmp_path, print):
            pass
    finally:
        other.kill()
        other.communicate()
    with open_state(tmp_path, print):
        pass


def test_keys_are_made_once_and_in_the_forms_that_flower_and_the_registry_read(tmp_path: Path) -> None:
    first = enrolment(tmp_path, "kitchen")
    assert first == enrolment(tmp_path, "kitchen")
    raw = (tmp_path / NODE_KEY_FILE).read_bytes()
    loaded = serialization.load_ssh_private_key(raw, None)
    assert loaded.curve.name == "secp384r1"  # type: ignore[union-attr]
    public = serialization.load_ssh_public_key(first["node_key"].encode())
    assert public == loaded.public_key()
    assert bytes.fromhex(first["public_key"]) == device_key(tmp_path).public_key().public_bytes_raw()
    assert write_enrolment(tmp_path, "kitchen").name == "device.json"


@pytest.mark.parametrize("name", [NODE_KEY_FILE, DEVICE_KEY_FILE])
def test_a_damaged_or_open_key_is_for_a_person_to_decide(tmp_path: Path, name: str) -> None:
    load = node_key if name == NODE_KEY_FILE else device_key
    load(tmp_path)
    (tmp_path / name).chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        load(tmp_path)
    (tmp_path / name).write_bytes(b"-----BEGIN NOTHING-----")
    (tmp_path / name).chmod(0o600)
    with pytest.raises(UserError, match="enrol the device again"):
        load(tmp_path)


def test_the_wrong_kind_of_key_is_refused(tmp_path: Path) -> None:
    node_key(tmp_path), device_key(tmp_path)
    os.replace(tmp_path / DEVICE_KEY_FILE, tmp_path / NODE_KEY_FILE)
    with pytest.raises(UserError):
        node_key(tmp_path)
