from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.layout import AdapterLayout, Module
from server.aggregation import Accumulator, assign_groups, group_median

LAYOUT = AdapterLayout("ab" * 32, (Module("m.k", 12, 9), Module("m.q", 10, 16)), (2, 4, 8), 16.0)


def flat(value=0.0, rank=8):
    return np.full(LAYOUT.size(("b",), rank), value, np.float32)


def group_of(deltas, layout=LAYOUT):
    accumulator = Accumulator(layout, ("b",))
    for delta, rank in deltas:
        accumulator.fold(delta, rank, 1)
    return accumulator


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32))
def test_group_median_is_numpys_median_of_the_means(groups, seed) -> None:
    generator = np.random.default_rng(seed)
    accumulators = []
    for _ in range(groups):
        accumulator = Accumulator(LAYOUT, ("a", "b"))
        for _ in range(generator.integers(1, 4)):
            vector = generator.normal(size=LAYOUT.size(("a", "b"), 8)).astype(np.float32)
            accumulator.fold(vector, 8, int(generator.integers(1, 9)))
        accumulators.append(accumulator)
    got = group_median(accumulators)
    assert np.array_equal(got.vector, np.median([one.mean().vector for one in accumulators], axis=0))
    assert got.weights == tuple(np.sum([one.mean().weights for one in accumulators], axis=0))
    assert got.contributors == tuple(np.sum([one.mean().contributors for one in accumulators], axis=0))


@pytest.mark.parametrize(
    ("present", "groups", "kept"), [(1, 1, True), (1, 2, False), (2, 3, True), (2, 4, False), (3, 4, True)]
)
def test_a_segment_without_a_majority_of_the_groups_stays(present, groups, kept) -> None:
    """A few devices of a large rank, honest or not, cannot be outvoted there: nobody moves it."""
    accumulators = [
        group_of([(flat(1.0, 4), 4), *([(flat(5.0), 8)] if one < present else [])]) for one in range(groups)
    ]
    got = group_median(accumulators)
    four = LAYOUT.size(("b",), 4)
    assert got.contributors == (groups + present, groups + present, present if kept else 0)
    assert got.weights == got.contributors
    assert (got.vector[four:] == (5.0 if kept else 0.0)).all() and (got.vector[:four] > 0).all()


def test_empty_groups_count_against_the_majority() -> None:
    got = group_median([group_of([(flat(1.0), 8)]), group_of([]), group_of([])])
    assert got.weights == (0, 0, 0) and not got.vector.any()


def test_groups_of_one_round_only() -> None:
    with pytest.raises(ValueError, match="one accumulator a group"):
        group_median([])
    with pytest.raises(ValueError, match="one accumulator a group"):
        group_median([Accumulator(LAYOUT, ("a",)), Accumulator(LAYOUT, ("b",))])


def errors_with_liars(lie, groups):
    """(plain mean's, group median's) relative error; 40 devices of which eight multiply their update by ``lie``."""
    generator = np.random.default_rng(11)
    size = LAYOUT.size(("b",), 8)
    truth = generator.normal(scale=0.1, size=size)
    deltas = [truth + generator.normal(scale=0.03, size=size) for _ in range(40)]
    honest = np.mean(deltas, axis=0)
    dealt = assign_groups(range(40), groups, seed=5)
    accumulators = [Accumulator(LAYOUT, ("b",)) for _ in range(groups)]
    for node, delta in enumerate(deltas):
        accumulators[dealt[node]].fold((delta * (lie if node < 8 else 1)).astype(np.float32), 8, 1)
    robust = group_median(accumulators).vector
    for other in accumulators[1:]:
        accumulators[0].merge(other)
    plain = accumulators[0].mean().vector
    return [np.linalg.norm(vector - honest) / np.linalg.norm(honest) for vector in (plain, robust)]


@pytest.mark.parametrize(("lie", "plain"), [(-1.0, 0.35), (10.0, 1.8), (-10.0, 2.2)])
@pytest.mark.parametrize(("groups", "robust"), [(40, 0.12), (20, 0.21)])
def test_a_fifth_of_liars_spoils_the_mean_and_not_the_median(lie, plain, groups, robust) -> None:
    plain_error, robust_error = errors_with_liars(lie, groups)
    assert plain_error > plain and robust_error < robust


def test_liars_in_half_of_the_groups_win() -> None:
    """The limit of the method, so that nobody counts on more: eight liars are in every one of five groups."""
    plain_error, robust_error = errors_with_liars(-10.0, 5)
    assert robust_error > 0.5 * plain_error


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=40, unique=True), st.integers(1, 9), st.integers(0, 2**63))
def test_groups_are_even_and_depend_on_the_seed_and_the_nodes_alone(nodes, groups, seed) -> None:
    dealt = assign_groups(nodes, groups, seed)
    assert dealt == assign_groups(nodes[::-1], groups, seed) and set(dealt) == set(nodes)
    sizes = np.bincount(list(dealt.values()), minlength=groups)
    assert sizes.size == groups and sizes.max() - sizes.min() <= 1


def test_another_seed_deals_other_groups() -> None:
    deals = [assign_groups(range(40), 4, seed) for seed in range(20)]
    assert len({tuple(sorted(deal.items())) for deal in deals}) == 20
    together = np.mean([deal[0] == deal[1] for deal in deals])
    assert 0 < together < 0.6  # a pair meets in a quarter of the rounds, not in all
