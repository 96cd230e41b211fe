"""Training states on disk: whole or not at all, of the right run, and the last good one is never lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from edge_runtime.formats.errors import UserError
from pipeline.distillation import checkpoints
from pipeline.distillation.checkpoints import (
    TrainState,
    discard_checkpoint,
    newest_state,
    open_state,
    state_writer,
    write_state,
)
from pipeline.distillation.objectives import next_token_objective
from pipeline.distillation.trainer import train
from tests.pipeline.conftest import MakeModel
from tests.pipeline.exact_model import PLAN, SEQUENCES, Exact

TENSORS = {
    "parameter.a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "step.a": torch.tensor(7.0),
    "parameter.b": torch.arange(5, dtype=torch.bfloat16),
}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 2.5, "learning_rate": 1e-3}]
    write_state(tmp_path, "run", TrainState(4, history, TENSORS))
    path = newest_state(tmp_path, "run", "test")
    assert path is not None
    with open_state(path) as (step, found, read):
        assert (step, found) == (4, history)
        assert all(torch.equal(read(name), value) for name, value in TENSORS.items())


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        write_state(tmp_path, "run", TrainState(step, [], TENSORS))
    assert _names(tmp_path) == ["state-00000009.safetensors", "state-00000012.safetensors"]
    assert newest_state(tmp_path, "run", "test") == tmp_path / "state-00000012.safetensors"


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "tensor", "history", "appended", "foreign_file"])
def test_a_damaged_state_is_named_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    for step in (3, 6):
        write_state(tmp_path, "run", TrainState(step, [{"step": 3, "loss": 1.5, "learning_rate": 0.1}], TENSORS))
    newest = tmp_path / "state-00000006.safetensors"
    DAMAGES[damage](newest)
    assert newest_state(tmp_path, "run", "distill tiny") == tmp_path / "state-00000003.safetensors"
    printed = " ".join(capsys.readouterr().err.split())
    assert "distill tiny: checkpoint state-00000006.safetensors is damaged" in printed
    write_state(tmp_path, "run", TrainState(4, [], TENSORS))
    assert _names(tmp_path) == ["state-00000003.safetensors", "state-00000004.safetensors"], "the damaged one is gone"


def test_when_all_are_damaged_training_starts_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(tmp_path, "run", TrainState(3, [], TENSORS))
    (tmp_path / "state-00000003.safetensors").write_bytes(b"")
    assert newest_state(tmp_path, "run", "test") is None and "damaged" in capsys.readouterr().err
    assert newest_state(tmp_path / "never", "run", "test") is None


def test_a_state_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_state(tmp_path, "run", TrainState(3, [], TENSORS))
    with pytest.raises(UserError, match=r"checkpoint: got .*allowed: one of the same settings, data and start weights"):
        newest_state(tmp_path, "other", "test")
    assert _names(tmp_path) == ["state-00000003.safetensors"]


@pytest.mark.parametrize("changed", ["plan", "tokens", "counts", "start", "identity", "nothing", "memory"])
def test_what_makes_a_run_another_one(tmp_path: Path, changed: str) -> None:
    plan, sequences, model = replace(PLAN, steps=4), SEQUENCES, Exact()
    train(model, next_token_objective, sequences, plan, tmp_path, "test")
    again, identity = Exact(), ""
    if changed == "plan":
        plan = replace(plan, learning_rate=2e-3)
    if changed == "tokens":
        tokens = SEQUENCES.tokens.copy()
        tokens[9, 15] ^= 1
        sequences = replace(SEQUENCES, tokens=tokens)
    if changed == "counts":
        sequences = replace(SEQUENCES, counts=SEQUENCES.tokens != 5)
    if changed == "start":
        torch.nn.init.constant_(again.head.bias, 0.25)
    if changed == "identity":
        identity = "other targets"
    if changed == "memory":
        plan = replace(plan, micro_sequences=1, checkpoint_every_steps=2)
    if changed in ("nothing", "memory"):
        train(again, next_token_objective, sequences, plan, tmp_path, "test", identity=identity)
        for found, expected in zip(again.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        return
    with pytest.raises(UserError, match=r"delete .* to start again"):
        train(again, next_token_objective, sequences, plan, tmp_path, "test", identity=identity)


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    save, undisturbed, resumed = checkpoints.save_file, Exact(), Exact()
    train(undisturbed, next_token_objective, SEQUENCES, PLAN, tmp_path / "a", "test")

    def fills_up(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if metadata["step"] == "6":
            path.write_bytes(b"as much as there was room for")
            raise fault
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoints, "save_file", fills_up)
    with pytest.raises(UserError) as raised:
        train(Exact(), next_token_objective, SEQUENCES, PLAN, tmp_path / "b", "test")
    assert "no space for the checkpoint of step 6" in str(raised.value) and "free some space" in str(raised.value)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["state-00000003.safetensors"]
    monkeypatch.setattr(checkpoints, "save_file", save)
    train(resumed, next_token_objective, SEQUENCES, PLAN, tmp_path / "b", "test")
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))


def test_other_faults_of_writing_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(checkpoints, "save_file", refuses)
    with pytest.raises(PermissionError), state_writer(tmp_path, "run") as write:
        write(TrainState(3, [], TENSORS))


def test_a_state_is_written_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's tensors are its own: what training does to its parameters meanwhile changes nothing."""
    save, written = checkpoints.save_file, []

    def waits(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append({name: value.clone() for name, value in tensors.items()})
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoints, "save_file", waits)
    stopped = Exact()
    with pytest.raises(KeyboardInterrupt):
        train(stopped, _dies_at(3), SEQUENCES, PLAN, tmp_path / "a", "test")
    train(Exact(), next_token_objective, SEQUENCES, PLAN, tmp_path / "b", "test")
    for name, parameter in stopped.named_parameters():
        assert torch.equal(written[0][f"parameter.{name}"], parameter)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "state-00000006.partial").write_bytes(b"half")
    with state_writer(tmp_path, "run", active=False) as write:
        write(TrainState(3, [], TENSORS))
    assert _names(tmp_path) == ["state-00000006.partial"], "another process's work"
    with state_writer(tmp_path, "run") as write:
        write(TrainState(3, [], TENSORS))
    assert _names(tmp_path) == ["state-00000003.safetensors"]
    discard_checkpoint(tmp_path)
    discard_checkpoint(tmp_path)
    assert not tmp_path.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.distillation import checkpoints
from pipeline.distillation.objectives import next_token_objective
from pipeline.distillation.trainer import train
from tests.pipeline.exact_model import PLAN, SEQUENCES, Exact
replace, at = Path.replace, sys.argv[2]
def dies(self, target):
    if at == "before" and "00000006" in target.name: os.kill(os.getpid(), signal.SIGKILL)
    replace(self, target)
    if at == "after" and "00000006" in target.name: os.kill(os.getpid(), signal.SIGKILL)
Path.replace = dies
model = Exact()
train(model, next_token_objective, SEQUENCES, PLAN, Path(sys.argv[1]), "test")
print([value.hex() for parameter in model.parameters() for value in parameter.flatten().tolist()])
"""


@pytest.mark.parametrize("at", ["before", "after"])
def test_kill_9_while_a_state_is_written(tmp_path: Path, at: str) -> None:
    """All in processes of their own: what other tests leave in this one may change the last bits."""

    def run(name: str, at: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / name), at]
        return subprocess.run(command, check=False, timeout=120, capture_output=True, text=True)

    assert run("b", at).returncode == -signal.SIGKILL
    assert ("state-00000006.safetensors" in _names(tmp_path / "b")) is (at == "after")
    undisturbed, resumed = run("a", "never"), run("b", "never")
    assert undisturbed.returncode == resumed.returncode == 0, undisturbed.stderr + resumed.stderr
    assert undisturbed.stdout == resumed.stdout and len(undisturbed.stdout) > 100
    assert not list((tmp_path / "b").glob("*.partial"))


def _dies_at(step: int) -> Callable[..., object]:
    def objective(model: object, batch: object) -> object:
        if batch.step == step:
            raise KeyboardInterrupt
        return next_token_objective(model, batch)

    return objective


def _rewrite_header(path: Path, change: Callable[[dict], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "tensor": _flip_last_byte,
    "history": lambda path: _rewrite_header(path, lambda header: header["__metadata__"].update(history="[]")),
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "foreign_file": lambda path: _rewrite_header(path, lambda header: header.pop("__metadata__")),
}


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
