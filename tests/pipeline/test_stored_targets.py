"""Recording and reading the teacher's signal: unbiased, the same bytes after any interruption, every damage found."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.distillation import stored_targets
from pipeline.distillation.batches import Batch
from pipeline.distillation.stored_targets import StoredTargets, bound_bytes, record_targets, shard_path
from pipeline.distillation.target_codec import TargetKind
from pipeline.distillation.teachers import TeacherSource, load_checkpoint
from tests.pipeline.conftest import VOCABULARY, MakeModel

SEQUENCES, TOKENS, DRAWS, SHARD = 27, 6, 5, 8
SETTINGS: dict[str, Any] = {"draws": DRAWS, "seed": 11, "bf16": False, "shard_sequences": SHARD, "batch_sequences": 3}
NAMES = ["000000.targets", "000001.targets", "000002.targets", "000003.targets"]


@pytest.fixture(scope="module")
def teacher(make_model: MakeModel) -> Any:
    return make_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def sequences() -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, TOKENS)).astype(np.int32)


@pytest.fixture(scope="module")
def recorded(teacher: Any, sequences: NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    assert list(_record(teacher, sequences, folder)) == [8, 16, 24, 27]
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def test_weights_are_counts_over_draws(recorded: Path) -> None:
    signal = StoredTargets.open(recorded).read(np.arange(SEQUENCES))
    assert signal.ids.shape == signal.weights.shape == (SEQUENCES, TOKENS, DRAWS)
    assert (signal.ids.dtype, signal.weights.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(signal.weights.sum(-1), torch.ones(SEQUENCES, TOKENS))
    counts = signal.weights * DRAWS
    torch.testing.assert_close(counts, counts.round())


def test_rows_come_in_the_order_asked_for(recorded: Path) -> None:
    targets = StoredTargets.open(recorded)
    every = targets.read(np.arange(SEQUENCES))
    rows = np.array([26, 0, 8, 7, 26])
    tokens = torch.zeros(5, TOKENS, dtype=torch.int64)
    signal = targets.signal(Batch(rows, tokens, tokens.bool()))
    assert torch.equal(signal.ids, every.ids[rows]) and torch.equal(signal.weights, every.weights[rows])


@pytest.mark.parametrize("kind", list(TargetKind))
def test_only_draws_estimate_the_dense_loss_and_its_gradient(
    teacher: Any, make_model: MakeModel, tmp_path: Path, kind: TargetKind
) -> None:
    """1,024 recordings of the same six positions, through disk: 4 standard errors, which a top-k exceeds by far."""
    same = np.tile(np.array([[9, 1, 200, 4, 77, 31]], np.int32), (1024, 1))
    list(record_targets(teacher, same, tmp_path, **(SETTINGS | {"kind": kind, "draws": 4, "batch_sequences": 64})))
    signal = StoredTargets.open(tmp_path).read(np.arange(1024))
    tokens = torch.from_numpy(same[:1].astype(np.int64))
    with torch.no_grad():
        p = torch.softmax(teacher(input_ids=tokens).logits[0].double(), -1)
        student = make_model("qwen2", num_hidden_layers=1)(input_ids=tokens).logits[0].double()
    log_q = torch.log_softmax(student, -1)
    dense = -(p * log_q).sum(-1)  # (T,)
    stored = torch.zeros(1024, TOKENS, VOCABULARY, dtype=torch.float64)
    stored.scatter_add_(-1, signal.ids, signal.weights.double())
    losses = -(stored * log_q).sum(-1)
    deviations = [_deviation(losses.sum(-1), dense.sum())]
    # The gradient at the logits is q - p, in expectation q - stored: seen along random directions and each position.
    directions = torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction, position in itertools.product(directions, range(TOKENS)):
        gradient = (log_q[position].exp() - stored[:, position]) @ direction
        deviations.append(_deviation(gradient, (log_q[position].exp() - p[position]) @ direction))
    worst = max(deviations)
    if kind is TargetKind.DRAWS:
        assert worst < 4
    else:
        assert deviations[0] > 40 and worst > 100


def test_shards_have_random_streams_of_their_own_and_seeds_differ(teacher: Any, tmp_path: Path) -> None:
    same = np.tile(np.arange(TOKENS, dtype=np.int32), (2 * SHARD, 1))
    ids = []
    for seed in (11, 12):
        list(record_targets(teacher, same, tmp_path / str(seed), **(SETTINGS | {"seed": seed})))
        ids.append(StoredTargets.open(tmp_path / str(seed)).read(np.arange(2 * SHARD)).ids)
    assert not torch.equal(ids[0][:SHARD], ids[0][SHARD:]) and not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0][0], ids[0][1])


def test_batches_and_chunks_change_no_draw(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path
) -> None:
    list(_record(teacher, sequences, tmp_path, batch_sequences=1, chunk_positions=4))
    _assert_same(recorded, tmp_path)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_run_that_stops_after_a_shard_ends_with_the_same_bytes(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path, shards: int
) -> None:
    run = _record(teacher, sequences, tmp_path)
    for _ in range(shards):
        next(run)
    run.close()
    assert list(_record(teacher, sequences, tmp_path)) == [8, 16, 24, 27]
    _assert_same(recorded, tmp_path)


@pytest.mark.parametrize("moment", range(0, 16, 3))
def test_a_run_killed_at_any_write_ends_with_the_same_bytes(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path, moment: int, monkeypatch: Any
) -> None:
    """Killed before, within and after a write, a flush or a rename: nothing that lies there is half."""
    calls = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == moment:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored_targets, "last_hidden", dying(stored_targets.last_hidden))
        patch.setattr(stored_targets.os, "fsync", dying(stored_targets.os.fsync))
        patch.setattr(Path, "replace", dying(Path.replace))
        list(_record(teacher, sequences, tmp_path))
    for path in tmp_path.glob("*.targets"):
        assert path.read_bytes() == (recorded / path.name).read_bytes()
    list(_record(teacher, sequences, tmp_path))
    _assert_same(recorded, tmp_path)


@pytest.mark.parametrize("cut", [0, 50, 119, 120, 170, -1])
def test_a_cut_shard_is_named_and_only_it_is_recorded_again(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, copy: Path, cut: int
) -> None:
    path = copy / NAMES[1]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"000001\.targets has"):
        StoredTargets.open(copy)
    assert _recorded_again(teacher, sequences, copy) == {NAMES[1]}
    _assert_same(recorded, copy)


@pytest.mark.parametrize("place", [2, 20, 90, 125, 180, -1])
def test_a_changed_shard_is_named_and_only_it_is_recorded_again(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, copy: Path, place: int
) -> None:
    path = copy / NAMES[2]
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"000002\.targets"):
        StoredTargets.open(copy)
    assert _recorded_again(teacher, sequences, copy) == {NAMES[2]}
    _assert_same(recorded, copy)


@pytest.mark.parametrize("lost", [["000000.targets"], ["000003.targets"], ["000000.targets", "000002.targets"]])
def test_missing_shards_are_named_and_only_they_are_recorded_again(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, copy: Path, lost: list[str]
) -> None:
    for name in lost:
        (copy / name).unlink()
    with pytest.raises(UserError) as caught:
        StoredTargets.open(copy)
    assert all(f"{name} is missing" in str(caught.value) for name in lost) and caught.value.next_step
    assert _recorded_again(teacher, sequences, copy) == set(lost)
    _assert_same(recorded, copy)


def test_a_shard_in_anothers_place_or_of_another_recording_is_found(
    teacher: Any, sequences: NDArray[np.int32], copy: Path, tmp_path: Path
) -> None:
    shutil.copy(copy / NAMES[0], copy / NAMES[1])
    with pytest.raises(UserError, match="not in its place"):
        StoredTargets.open(copy)
    list(_record(teacher, sequences, tmp_path / "other", draws=4))
    shutil.copy(tmp_path / "other" / NAMES[1], copy / NAMES[1])
    with pytest.raises(UserError, match="another recording"):
        StoredTargets.open(copy)
    assert _recorded_again(teacher, sequences, copy) == {NAMES[1]}


@pytest.mark.parametrize(
    "change", [{"seed": 12}, {"draws": 6}, {"bf16": True}, {"teacher_digest": "other"}, {"kind": TargetKind.TOP_K}]
)
def test_other_settings_record_everything_again(
    teacher: Any, sequences: NDArray[np.int32], copy: Path, change: dict[str, Any]
) -> None:
    assert _recorded_again(teacher, sequences, copy, **change) == set(NAMES)


def test_other_text_records_only_its_shard_and_less_text_drops_the_rest(
    teacher: Any, sequences: NDArray[np.int32], copy: Path
) -> None:
    changed = sequences.copy()
    changed[9, 3] = (changed[9, 3] + 1) % VOCABULARY
    assert _recorded_again(teacher, changed, copy) == {NAMES[1]}
    list(_record(teacher, changed[:10], copy))
    assert sorted(path.name for path in copy.iterdir()) == NAMES[:2]
    assert StoredTargets.open(copy).header.total_sequences == 10


def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    teacher: Any, sequences: NDArray[np.int32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored_targets.os, "fsync", full)
    with pytest.raises(UserError, match="free disk"):
        list(_record(teacher, sequences, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(
    teacher: Any, make_model: MakeModel, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path
) -> None:
    for token in (-1, VOCABULARY):
        with pytest.raises(UserError, match=f"token {token}"):
            list(_record(teacher, np.full((1, 4), token, np.int32), tmp_path))
    broken = make_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[300] = torch.nan  # seen by a later token than the first ones
    with pytest.raises(UserError, match="not finite"):
        list(_record(broken, np.full((1, 4), 300, np.int32), tmp_path))
    with pytest.raises(UserError, match="run the targets stage"):
        StoredTargets.open(tmp_path)
    targets, tokens = StoredTargets.open(recorded), torch.zeros(1, TOKENS, dtype=torch.int64)
    for row in (-1, SEQUENCES):
        with pytest.raises(UserError, match=f"sequence {row}"):
            targets.read(np.array([row]))
    with pytest.raises(UserError, match="sequence_tokens"):
        targets.signal(Batch(np.array([0]), tokens[:, 1:], tokens[:, 1:].bool()))


def test_a_shard_damaged_after_it_was_opened_is_one_line(copy: Path) -> None:
    targets = StoredTargets.open(copy)
    path = copy / NAMES[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"000000\.targets"):
        targets.read(np.arange(SHARD))


@pytest.mark.parametrize("load", ["bf16", "int8", "int4"])
def test_teachers_of_fewer_bits_are_recorded(
    make_model: MakeModel, sequences: NDArray[np.int32], tmp_path: Path, load: str
) -> None:
    """Draws of the loaded teacher itself: their mean log-probability is minus its entropy, within 4 standard errors."""
    make_model("llama", intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    teacher = load_checkpoint(TeacherSource(str(tmp_path / "model"), load, None, "here"))
    list(_record(teacher, sequences, tmp_path / "targets", draws=32, bf16=True))
    signal = StoredTargets.open(tmp_path / "targets").read(np.arange(SEQUENCES))
    with torch.no_grad():
        tokens = torch.from_numpy(sequences.astype(np.int64))
        log_p = teacher(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p.square()).sum(-1) - entropy.square()
    found = -(log_p.gather(-1, signal.ids) * signal.weights).sum(-1)
    assert abs(float((found - entropy).sum())) < 4 * float(variance.sum().div(32).sqrt())


def test_mapped_sequences_are_read_shard_by_shard(
    teacher: Any, sequences: NDArray[np.int32], recorded: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "train.npy", sequences)
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r")
    list(_record(teacher, mapped, tmp_path / "targets"))
    _assert_same(recorded, tmp_path / "targets")


def test_a_plan_can_bound_the_bytes(recorded: Path) -> None:
    bodies = sum(path.stat().st_size for path in recorded.iterdir())
    overhead = len(NAMES) * 200 + SEQUENCES * 9
    assert bodies - overhead <= bound_bytes(SEQUENCES * TOKENS, VOCABULARY, DRAWS) < 1.2 * bodies
    assert bound_bytes(1000, 152_064, 32) == 76_000


def _record(teacher: Any, sequences: NDArray[np.int32], folder: Path, **change: Any) -> Iterator[int]:
    return record_targets(teacher, sequences, folder, **(SETTINGS | change))


def _recorded_again(teacher: Any, sequences: NDArray[np.int32], folder: Path, **change: Any) -> set[str]:
    """Shards that a second run writes."""
    before = {path.name: path.stat().st_ino for path in folder.glob("*.targets")}
    list(_record(teacher, sequences, folder, **change))
    return {path.name for path in folder.iterdir() if path.stat().st_ino != before.get(path.name)}


def _assert_same(expected: Path, found: Path) -> None:
    assert sorted(path.name for path in found.iterdir()) == NAMES
    for number in range(len(NAMES)):
        assert shard_path(found, number).read_bytes() == shard_path(expected, number).read_bytes()


def _deviation(values: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard errors the mean of values (N,) is away from what is expected."""
    error = values.std() / len(values) ** 0.5
    return float((values.mean() - expected).abs() / error.clamp_min(1e-9))
