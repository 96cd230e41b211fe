"""Which sequences a step learns from, and reading them ahead."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import (
    Batch,
    Sequences,
    batch_rows,
    batch_to_device,
    prefetched,
    read_batch,
    split_rows,
    to_device,
)

TOKENS = np.arange(40, dtype=np.int32).reshape(8, 5)


@pytest.mark.parametrize(("sequences", "batch"), [(10, 3), (7, 7), (5, 8), (4, 1)])
def test_every_sequence_once_an_epoch(sequences: int, batch: int) -> None:
    epochs, steps = 6, 6 * sequences
    visited, other_seed = (
        np.concatenate([batch_rows(step, sequences, batch, seed) for step in range(steps)])[:steps].reshape(epochs, -1)
        for seed in (3, 4)
    )
    assert (np.sort(visited, axis=1) == np.arange(sequences)).all()
    assert len({tuple(order) for order in visited.tolist()}) > 1, "each epoch has an order of its own"
    assert not np.array_equal(visited, other_seed)


def test_a_batch_holds_the_rows_that_were_asked_for() -> None:
    counts = TOKENS % 3 == 0
    batch = read_batch(Sequences(TOKENS, counts), np.array([6, 1]), step=9)
    assert batch.tokens.dtype == torch.int64 and batch.tokens.tolist() == [TOKENS[6].tolist(), TOKENS[1].tolist()]
    assert batch.counts.tolist() == [counts[6].tolist(), counts[1].tolist()] and batch.step == 9
    assert bool(read_batch(Sequences(TOKENS), np.array([0])).counts.all()), "without counts everything counts"


@pytest.mark.parametrize(("micro", "sizes"), [(None, [7]), (1, [1] * 7), (3, [3, 3, 1]), (9, [7])])
def test_parts_of_a_batch_are_all_of_it(micro: int | None, sizes: list[int]) -> None:
    parts = split_rows(np.arange(7), micro)
    assert [len(part) for part in parts] == sizes and np.concatenate(parts).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        (np.zeros((0, 5), np.int32), None, "at least one sequence"),
        (np.zeros(5, np.int32), None, "at least one sequence"),
        (TOKENS, np.ones((8, 4), np.bool_), "the shape of the tokens"),
    ],
)
def test_sequences_that_are_none_are_refused(tokens: np.ndarray, counts: np.ndarray | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sequences(tokens, counts)


def test_batches_are_made_ahead_and_come_in_order() -> None:
    made: list[int] = []
    ahead = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        ahead.release()
        return step * 10

    with prefetched(make, range(3, 8)) as results:
        assert next(results) == 30
        assert ahead.acquire(timeout=10) and ahead.acquire(timeout=10), "the next one is made before it is asked for"
        assert made == [3, 4]
        assert list(results) == [40, 50, 60, 70]
    assert made == [3, 4, 5, 6, 7]


def test_an_exception_comes_where_its_batch_would_have_been() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("no such row")
        return step

    seen: list[int] = []
    with pytest.raises(ValueError, match="no such row"), prefetched(make, range(5)) as results:
        seen.extend(results)
    assert seen == [0, 1]


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    with prefetched(lambda step: step, range(1000)) as results:
        next(results)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_no_step_makes_no_batch() -> None:
    with prefetched(lambda step: step, range(4, 4)) as results:
        assert list(results) == []


def test_a_signal_travels_with_its_batch_and_counts_stay_at_home() -> None:
    @dataclass(frozen=True, slots=True)
    class Draws:
        ids: torch.Tensor
        name: str

    batch = Batch(np.array([1]), torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), 4, Draws(torch.ones(2), "x"))
    moved = batch_to_device(batch, torch.device("meta"))
    assert moved.tokens.device.type == moved.signal.ids.device.type == "meta" and moved.signal.name == "x"
    assert moved.counts.device.type == "cpu" and moved.step == 4 and moved.rows.tolist() == [1]
    assert to_device(None, torch.device("meta")) is None
