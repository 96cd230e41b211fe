from __future__ import annotations

import itertools
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.layout import AdapterLayout, Module, Phase, initial_factors
from server.aggregation import (
    FRACTION_BITS,
    LARGEST_TOTAL_WEIGHT,
    Accumulator,
    fold_core,
    refactor_for_core,
    squared_norm,
    stack,
)

BASE = "ab" * 32
LAYOUT = AdapterLayout(BASE, (Module("m.k", 12, 9), Module("m.q", 10, 16)), (2, 4, 8), 16.0)
BELOW = np.float32(8 - 2.0**-21)  # the largest float32 below 8


def draw_factors(layout, generator, size=0.5):
    """Factors of every group, core included, as they are in the middle of a federation."""
    factors = initial_factors(layout, 7)
    for module in layout.modules:
        factors[f"{module.name}.core"] = np.zeros((layout.max_rank, layout.max_rank), np.float32)
    return {
        name: (value + generator.normal(scale=size, size=value.shape)).astype(np.float32)
        for name, value in factors.items()
    }


def place(layout, vector, groups):
    """A vector (N,) at r_max as factors, in its own precision."""
    places = layout.unflatten(np.arange(vector.size, dtype=np.float32), groups, layout.max_rank)
    return {name: vector[where.astype(np.int64)] for name, where in places.items()}


def partition(phase, factors, module, low, high):
    """What the ranks (low, high] of a module's factors add to B core A (to B A outside the core phase)."""
    lora_a, lora_b = factors[f"{module.name}.lora_A"], factors[f"{module.name}.lora_B"]
    if phase is not Phase.CORE:
        return lora_b[:, low:high] @ lora_a[low:high]
    border = np.zeros_like(factors[f"{module.name}.core"])
    border[:high, :high] = factors[f"{module.name}.core"][:high, :high]
    border[:low, :low] = 0
    return lora_b @ border @ lora_a


def double(factors):
    return {name: value.astype(np.float64) for name, value in factors.items()}


clients = st.lists(st.tuples(st.sampled_from(LAYOUT.ranks), st.integers(1, 1024)), min_size=1, max_size=7)


@pytest.mark.parametrize("phase", [Phase.A, Phase.B, Phase.CORE])
@settings(max_examples=25, deadline=None)
@given(cohort=clients, seed=st.integers(0, 2**32), drift=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_the_mean_update_is_the_mean_of_the_products(phase, cohort, seed, drift) -> None:
    """Exactness: within each rank partition, over the devices that trained it, against np.average."""
    generator = np.random.default_rng(seed)
    start = draw_factors(LAYOUT, generator)
    accumulator = Accumulator(LAYOUT, phase.groups)
    trained = []
    for rank, weight in cohort:
        delta = generator.normal(scale=drift, size=LAYOUT.size(phase.groups, rank)).astype(np.float32)
        accumulator.fold(delta, rank, weight)
        padded = np.zeros(LAYOUT.size(phase.groups, LAYOUT.max_rank))
        padded[: delta.size] = delta
        own = double(start)
        for name, change in place(LAYOUT, padded, phase.groups).items():
            own[name] = own[name] + change
        trained.append(own)
    mean = accumulator.mean()
    ours = double(start)
    for name, change in place(LAYOUT, mean.vector, phase.groups).items():
        ours[name] = ours[name] + change
    for module in LAYOUT.modules:
        for index, (low, high) in enumerate(pairwise((0, *LAYOUT.ranks))):
            got = partition(phase, ours, module, low, high)
            there = [(own, weight) for own, (rank, weight) in zip(trained, cohort, strict=True) if rank >= high]
            assert mean.contributors[index] == len(there)
            if not there:
                assert np.array_equal(got, partition(phase, double(start), module, low, high))
                continue
            products = [partition(phase, own, module, low, high) for own, _ in there]
            expected = np.average(products, axis=0, weights=[weight for _, weight in there])
            # 2**-37 of fixed point in every trained value, through the frozen factors; and float64 itself
            frozen = {name: np.abs(value) for name, value in double(start).items()}
            for group in phase.groups:
                name = {"a": "lora_A", "b": "lora_B", "core": "core"}[group]
                frozen[f"{module.name}.{name}"] = np.full_like(frozen[f"{module.name}.{name}"], 2.0**-37)
            scale = np.abs(products).max() + 1
            assert (np.abs(got - expected) <= partition(phase, frozen, module, low, high) + 64 * scale * 2.0**-52).all()


@pytest.mark.parametrize("phase", [Phase.A, Phase.B])
def test_values_on_the_grid_are_exact_to_float64(phase) -> None:
    """A float32 of 2**-13 or more lies on the grid of 2**-36: nothing is left but the last float64 division."""
    generator = np.random.default_rng(3)
    weights = [3, 1000, 77, 12]
    deltas = generator.uniform(2.0**-13, 7.9, (4, LAYOUT.size(phase.groups, 8))).astype(np.float32)
    accumulator = Accumulator(LAYOUT, phase.groups)
    for delta, weight in zip(deltas, weights, strict=True):
        accumulator.fold(delta, 8, weight)
    exact = np.average(deltas.astype(np.longdouble), axis=0, weights=np.array(weights, np.longdouble))
    assert (np.abs(accumulator.mean().vector - exact) <= np.spacing(exact.astype(np.float64))).all()


def test_both_factors_at_once_is_not_exact() -> None:
    """The reason for phases: the mean of A and the mean of B, multiplied, is another update."""
    generator = np.random.default_rng(4)
    deltas = [generator.normal(size=LAYOUT.size(("a", "b"), 8)).astype(np.float32) for _ in range(8)]
    accumulator = Accumulator(LAYOUT, ("a", "b"))
    for delta in deltas:
        accumulator.fold(delta, 8, 1)
    module = LAYOUT.modules[0]
    products = [partition(Phase.BOTH, place(LAYOUT, delta, ("a", "b")), module, 0, 8) for delta in deltas]
    got = partition(Phase.BOTH, place(LAYOUT, accumulator.mean().vector, ("a", "b")), module, 0, 8)
    assert np.linalg.norm(got - np.mean(products, axis=0)) > 0.4 * np.linalg.norm(np.mean(products, axis=0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6), st.data())
def test_order_and_grouping_change_no_bit(seed, count, data) -> None:
    generator = np.random.default_rng(seed)
    updates = []
    for _ in range(count):
        rank = int(generator.choice(LAYOUT.ranks))
        size = LAYOUT.size(("a",), rank)
        sizes = 10.0 ** generator.uniform(-9, 0.9, size)
        updates.append(
            ((sizes * generator.choice([-1, 1], size)).astype(np.float32), rank, int(generator.integers(1, 99)))
        )
    one = Accumulator(LAYOUT, ("a",))
    for update in updates:
        one.fold(*update)
    other = [Accumulator(LAYOUT, ("a",)) for _ in range(3)]
    for update in data.draw(st.permutations(updates)):
        other[data.draw(st.integers(0, 2))].fold(*update)
    other[2].merge(other[0])
    other[1].merge(other[2])
    assert one.mean().vector.tobytes() == other[1].mean().vector.tobytes()
    assert one.mean()[1:] == other[1].mean()[1:]
    assert one.dispersion() == other[1].dispersion()
    assert other[1].count == count


def test_a_plain_float_sum_would_depend_on_the_order() -> None:
    values = np.array([7.9, 1e-7, -7.9, 3e-8], np.float32)
    assert len({float(np.cumsum(order, dtype=np.float32)[-1]) for order in itertools.permutations(values)}) > 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_values_and_weights_fit(sign) -> None:
    accumulator = Accumulator(LAYOUT, ("b",))
    vector = np.full(LAYOUT.size(("b",), 8), sign * BELOW)
    for _ in range(2):
        accumulator.fold(vector, 8, LARGEST_TOTAL_WEIGHT // 2)
    mean = accumulator.mean()
    assert np.array_equal(mean.vector, vector) and set(mean.weights) == {LARGEST_TOTAL_WEIGHT}
    with pytest.raises(ValueError, match="weight"):
        accumulator.fold(vector[: LAYOUT.size(("b",), 2)], 2, 1)


def test_the_smallest_values_are_rounded_half_to_even() -> None:
    unit = 2.0**-FRACTION_BITS
    accumulator = Accumulator(LAYOUT, ("b",))
    vector = np.zeros(LAYOUT.size(("b",), 2), np.float32)
    vector[:6] = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.51]) * unit
    accumulator.fold(vector, 2, 3)
    assert (accumulator.mean().vector[:6] / unit).tolist() == [0, 2, 2, 0, -2, 1]


def flat(value=0.0, rank=8, groups=("b",)):
    return np.full(LAYOUT.size(groups, rank), value, np.float32)


@pytest.mark.parametrize(
    ("vector", "rank", "weight"),
    [
        (flat(np.nan), 8, 1),
        (flat(np.inf), 8, 1),
        (flat(-np.inf), 8, 1),
        (flat(8.0), 8, 1),
        (flat(-8.0), 8, 1),
        (np.where(np.arange(flat().size) == flat().size - 1, np.nan, 0).astype(np.float32), 8, 1),
        (flat()[:-1], 8, 1),
        (np.append(flat(), np.float32(0)), 8, 1),
        (flat(rank=4), 8, 1),
        (flat()[:, None], 8, 1),
        (flat().astype(np.float64), 8, 1),
        (flat().astype(np.float16), 8, 1),
        (flat(), 3, 1),
        (flat(), 8, 0),
        (flat(), 8, -1),
        (flat(), 8, True),
        (flat(), 8, 1.0),
        (flat(), 8, np.int64(1)),
        (flat(), 8, LARGEST_TOTAL_WEIGHT - 4),
    ],
)
def test_what_cannot_be_folded_leaves_no_trace(vector, rank, weight) -> None:
    accumulator = Accumulator(LAYOUT, ("b",))
    accumulator.fold(flat(1.0), 8, 5)
    with pytest.raises(ValueError, match=r"float32|finite|weight|rank"):
        accumulator.fold(vector, rank, weight)
    mean = accumulator.mean()
    assert accumulator.count == 1 and set(mean.weights) == {5} and (mean.vector == 1.0).all()
    assert accumulator.dispersion() == 0.0


def test_only_sums_of_the_same_kind_merge() -> None:
    accumulator = Accumulator(LAYOUT, ("b",))
    other_alpha = AdapterLayout(BASE, LAYOUT.modules, LAYOUT.ranks, 8.0)
    for other in (Accumulator(LAYOUT, ("a",)), Accumulator(other_alpha, ("b",))):
        with pytest.raises(ValueError, match="different"):
            accumulator.merge(other)
    other = Accumulator(LAYOUT, ("b",))
    accumulator.fold(flat(1.0), 8, LARGEST_TOTAL_WEIGHT)
    accumulator.merge(other)  # nothing in it: the largest weight is still allowed
    other.fold(flat(3.0), 8, 1)
    with pytest.raises(ValueError, match="more than"):
        accumulator.merge(other)
    assert accumulator.mean().vector[0] == 1.0 and accumulator.count == 1


def test_each_segment_counts_its_own_contributors() -> None:
    accumulator = Accumulator(LAYOUT, ("b",))
    assert accumulator.mean()[1:] == ((0, 0, 0), (0, 0, 0)) and not accumulator.mean().vector.any()
    accumulator.fold(flat(1.0, 2), 2, 30)
    accumulator.fold(flat(4.0, 4), 4, 10)
    vector, weights, contributors = accumulator.mean()
    assert (weights, contributors) == ((40, 10, 0), (2, 1, 0))
    two, four = LAYOUT.size(("b",), 2), LAYOUT.size(("b",), 4)
    assert set(vector[:two]) == {1.75} and set(vector[two:four]) == {4.0} and set(vector[four:]) == {0.0}


@settings(max_examples=30, deadline=None)
@given(clients, st.integers(0, 2**32), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_dispersion_is_the_share_of_the_squares_that_the_mean_loses(cohort, seed, size) -> None:
    generator = np.random.default_rng(seed)
    accumulator = Accumulator(LAYOUT, ("a",))
    updates = [
        (generator.normal(scale=size, size=LAYOUT.size(("a",), rank)).astype(np.float32), rank, weight)
        for rank, weight in cohort
    ]
    for update in updates:
        accumulator.fold(*update)
    agreed = spread = 0.0
    for low, high in pairwise((0, *LAYOUT.ranks)):
        start = LAYOUT.size(("a",), low) if low else 0
        stop = LAYOUT.size(("a",), high)
        there = [(vector[start:stop].astype(np.float64), weight) for vector, rank, weight in updates if rank >= high]
        if there:
            parts, weights = zip(*there, strict=True)
            agreed += (np.average(parts, axis=0, weights=weights) ** 2).sum()
            spread += np.average([(part**2).sum() for part in parts], weights=weights)
    # 2**-37 of fixed point in every value against the size of the updates
    assert accumulator.dispersion() == pytest.approx(1 - agreed / spread, abs=2.0**-34 / size + 1e-12)


def test_dispersion_is_zero_for_agreement_and_one_for_cancellation() -> None:
    accumulator = Accumulator(LAYOUT, ("b",))
    assert accumulator.dispersion() == 0.0
    accumulator.fold(flat(0.0), 8, 1)
    assert accumulator.dispersion() == 0.0
    same, opposed = Accumulator(LAYOUT, ("b",)), Accumulator(LAYOUT, ("b",))
    for sign in (1, -1):
        same.fold(flat(0.3), 8, 7)
        opposed.fold(flat(sign * 0.3), 8, 7)
    assert same.dispersion() == pytest.approx(0, abs=1e-15) and opposed.dispersion() == 1.0


def test_folding_needs_little_memory_beyond_the_sums() -> None:
    layout = AdapterLayout(BASE, (Module("m", 1 << 18, 8),), (8,), 16.0)
    accumulator = Accumulator(layout, ("a",))
    vector = np.ones(layout.size(("a",), 8), np.float32)  # 2 M values, 8 MB
    tracemalloc.start()
    accumulator.fold(vector, 8, 2)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 << 20


def test_a_core_between_orthonormal_bases_is_the_same_update() -> None:
    generator = np.random.default_rng(5)
    factors = draw_factors(LAYOUT, generator)
    plain = {name: value for name, value in factors.items() if not name.endswith(".core")}
    for start in (plain, factors):
        changed = refactor_for_core(start)
        assert {name: value.shape for name, value in changed.items()} == {n: v.shape for n, v in factors.items()}
        for module in LAYOUT.modules:
            before, after = product(start, module), product(changed, module)
            assert np.abs(after - before).max() < 4e-7 * np.linalg.norm(before)
            for basis in (changed[f"{module.name}.lora_A"], changed[f"{module.name}.lora_B"].T):
                assert np.abs(basis.astype(np.float64) @ basis.T - np.eye(8)).max() < 2e-7
        assert all(value.dtype == np.float32 for value in changed.values())


def test_a_prefix_of_the_core_is_the_projection_on_its_span() -> None:
    start = draw_factors(LAYOUT, np.random.default_rng(6))
    changed, module = refactor_for_core(start), LAYOUT.modules[1]
    cut = LAYOUT.prefix(changed, 4)
    left = np.linalg.svd(start["m.q.lora_B"][:, :4].astype(np.float64), full_matrices=False)[0]
    right = np.linalg.svd(start["m.q.lora_A"][:4].astype(np.float64), full_matrices=False)[2]
    whole = product(start, module)
    assert np.abs(product(cut, module) - left @ left.T @ whole @ right.T @ right).max() < 1e-6 * np.linalg.norm(whole)


def test_leaving_the_core_keeps_the_update() -> None:
    start = draw_factors(LAYOUT, np.random.default_rng(7))
    folded = fold_core(start)
    assert set(folded) == {name for name in start if not name.endswith(".core")}
    for module in LAYOUT.modules:
        before = product(start, module)
        assert np.abs(product(folded, module) - before).max() < 1e-6 * np.linalg.norm(before)
        assert np.array_equal(folded[f"{module.name}.lora_A"], start[f"{module.name}.lora_A"])
    again = fold_core(folded)
    assert all(np.array_equal(again[name], folded[name]) and again[name] is not folded[name] for name in folded)


def test_a_rank_above_a_module_has_no_core() -> None:
    factors = {"m.lora_A": np.ones((4, 9), np.float32), "m.lora_B": np.ones((3, 4), np.float32)}
    with pytest.raises(ValueError, match="m: rank 4"):
        refactor_for_core(factors)
    with pytest.raises(ValueError, match="m: rank 4"):
        refactor_for_core({"m.lora_A": np.ones((4, 3), np.float32), "m.lora_B": np.ones((9, 4), np.float32)})
    assert set(refactor_for_core({"m.lora_A": np.ones((3, 9), np.float32), "m.lora_B": np.ones((3, 3), np.float32)}))


def test_stacking_is_the_mean_of_the_products_at_the_sum_of_the_ranks() -> None:
    generator = np.random.default_rng(8)
    pairs = [
        (generator.normal(size=(rank, 10)).astype(np.float32), generator.normal(size=(7, rank)).astype(np.float32))
        for rank in (2, 8, 4)
    ]
    lora_a, lora_b = stack(pairs, [1, 5, 2])
    assert lora_a.shape == (14, 10) and lora_b.shape == (7, 14) and lora_b.dtype == np.float32
    expected = np.average([b.astype(np.float64) @ a for a, b in pairs], axis=0, weights=[1, 5, 2])
    assert np.abs(lora_b.astype(np.float64) @ lora_a - expected).max() < 1e-6


def test_norms_are_those_of_exact_arithmetic() -> None:
    generator = np.random.default_rng(9)
    vector = generator.normal(size=300_000).astype(np.float32)
    assert squared_norm(vector) == pytest.approx(float((vector.astype(np.longdouble) ** 2).sum()), rel=1e-14)


def product(factors, module):
    lora_a, lora_b = (factors[f"{module.name}.lora_{x}"].astype(np.float64) for x in "AB")
    core = factors.get(f"{module.name}.core")
    return lora_b @ lora_a if core is None else lora_b @ core.astype(np.float64) @ lora_a
