"""The teacher's signal on disk: the same bytes whether or not the run was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.distillation import recording
from pipeline.distillation.recording import record_draws, teacher_logits
from pipeline.distillation.signals import last_hidden
from tests.pipeline.conftest import VOCABULARY, MakeModel

FILES = ["held_out_draws.npy", "held_out_log_p.npy", "held_out_top1.npy"]


@pytest.fixture(scope="module")
def teacher(make_model: MakeModel) -> Any:
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def sequences() -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (150, 6)).astype(np.int32)  # two whole shards and a part


@pytest.fixture(scope="module")
def recorded(teacher: Any, sequences: NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    assert list(_record(teacher, sequences, folder)) == [64, 128, 150]
    return folder


def test_shapes_types_and_values(teacher: Any, sequences: NDArray[np.int32], recorded: Path) -> None:
    draws, log_p, top1 = (np.load(recorded / name) for name in FILES)
    assert (draws.shape, draws.dtype) == ((150, 6, 5), np.uint16)
    assert (log_p.shape, log_p.dtype) == ((150, 6, 5), np.float32)
    assert (top1.shape, top1.dtype) == ((150, 6), np.int32)
    with torch.no_grad():
        logits = teacher(input_ids=torch.from_numpy(sequences.astype(np.int64))).logits
    expected = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(draws.astype(np.int64)))
    np.testing.assert_allclose(log_p, expected.numpy(), rtol=0, atol=2e-6)
    assert (top1 == logits.argmax(-1).numpy()).mean() > 0.999  # ties within rounding aside


def test_draws_are_the_teachers(teacher: Any, sequences: NDArray[np.int32], recorded: Path) -> None:
    """Mean log-probability of the draws against the negative entropy, within four standard errors."""
    log_p = np.load(recorded / "held_out_log_p.npy").astype(np.float64)
    logits = teacher_logits(teacher, sequences, bf16=False).double()
    exact = torch.log_softmax(logits, -1)
    entropy = -(exact.exp() * exact).sum(-1)
    variance = (exact.exp() * exact.square()).sum(-1) - entropy.square()
    error = float(variance.sum().div(5).sqrt()) / entropy.numel()
    assert abs(log_p.mean() + float(entropy.mean())) < 4 * error


def test_shards_have_random_streams_of_their_own(teacher: Any, tmp_path: Path) -> None:
    same = np.tile(np.arange(6, dtype=np.int32), (128, 1))
    list(_record(teacher, same, tmp_path))
    draws = np.load(tmp_path / "held_out_draws.npy")
    assert not np.array_equal(draws[:64], draws[64:]) and not np.array_equal(draws[0], draws[1])


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_that_stops_after_a_shard_ends_with_the_same_bytes(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path, shards: int
) -> None:
    run = _record(teacher, sequences, tmp_path)
    for _ in range(shards):
        next(run)
    run.close()
    assert list(_record(teacher, sequences, tmp_path)) == [64, 128, 150][shards:]
    _assert_same(recorded, tmp_path)


def test_a_run_that_dies_before_a_files_header_is_written_starts_again(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, **_: Any) -> None:
        path.touch()
        raise SystemExit

    with monkeypatch.context() as dying, pytest.raises(SystemExit):
        dying.setattr(np.lib.format, "open_memmap", die)
        next(_record(teacher, sequences, tmp_path))
    assert list(_record(teacher, sequences, tmp_path)) == [64, 128, 150]
    _assert_same(recorded, tmp_path)


def test_a_run_that_dies_within_a_shard_ends_with_the_same_bytes(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def dying(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:  # the fourth batch of the second shard
            raise KeyboardInterrupt
        return last_hidden(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "last_hidden", dying)
        with pytest.raises(KeyboardInterrupt):
            list(_record(teacher, sequences, tmp_path))
    assert list(_record(teacher, sequences, tmp_path)) == [128, 150]
    _assert_same(recorded, tmp_path)


@pytest.mark.parametrize("lost", FILES)
def test_a_file_lost_after_it_was_finished_is_recorded_again(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path, lost: str
) -> None:
    """The stage moves finished files away; killed right then, it must not find zeros marked as done."""
    list(_record(teacher, sequences, tmp_path))
    (tmp_path / lost).unlink()
    list(_record(teacher, sequences, tmp_path))
    _assert_same(recorded, tmp_path)


def test_a_finished_recording_is_left_alone(teacher: Any, sequences: NDArray[np.int32], tmp_path: Path) -> None:
    list(_record(teacher, sequences, tmp_path))
    assert list(_record(teacher, sequences, tmp_path)) == []


def test_a_large_vocabulary_takes_four_bytes_an_id(make_model: MakeModel, tmp_path: Path) -> None:
    teacher = make_model("llama", vocab_size=65_600, hidden_size=32, num_hidden_layers=1)
    list(
        record_draws(
            teacher, np.full((1, 64), 3, np.int32), tmp_path, "train", draws=64, seed=1, log_p=False, bf16=False
        )
    )
    draws = np.load(tmp_path / "train_draws.npy")
    assert draws.dtype == np.uint32 and draws.max() > 32768
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.done", "train_draws.npy"]


def _record(teacher: Any, sequences: NDArray[np.int32], folder: Path) -> Any:
    return record_draws(teacher, sequences, folder, "held_out", draws=5, seed=11, log_p=True, bf16=False)


def _assert_same(expected: Path, found: Path) -> None:
    for name in FILES:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
