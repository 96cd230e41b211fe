from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.layout import (
    GROUPS,
    AdapterLayout,
    Module,
    Phase,
    effective_pairs,
    initial_factors,
)

BASE = "ab" * 32
TWO = AdapterLayout(BASE, (Module("m.k", 2, 3), Module("m.q", 1, 2)), (1, 3), 6.0)


def numbered(layout, rank=None):
    """Factors of which every value is different."""
    rank = rank or layout.max_rank
    counter, factors = 0, {}
    for module in layout.modules:
        shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank), "core": (rank, rank)}
        for name, shape in shapes.items():
            factors[f"{module.name}.{name}"] = np.arange(counter, counter + np.prod(shape), dtype=np.float32).reshape(
                shape
            )
            counter += int(np.prod(shape))
    return factors


@st.composite
def layouts(draw):
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True))
    sizes = st.integers(1, 5)
    modules = tuple(Module(name, draw(sizes), draw(sizes)) for name in sorted(names))
    ranks = tuple(sorted(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))))
    return AdapterLayout(BASE, modules, ranks, draw(st.floats(0.5, 64)))


def test_vector_goes_segment_by_segment_then_module_by_module_then_group_by_group() -> None:
    factors = {
        "m.k.lora_A": np.array([[1, 2], [3, 4], [5, 6]], np.float32),
        "m.k.lora_B": np.array([[10, 11, 12], [20, 21, 22], [30, 31, 32]], np.float32),
        "m.q.lora_A": np.array([[7], [8], [9]], np.float32),
        "m.q.lora_B": np.array([[40, 41, 42], [50, 51, 52]], np.float32),
    }
    first = [1, 2, 10, 20, 30, 7, 40, 50]
    second = [3, 4, 5, 6, 11, 21, 31, 12, 22, 32, 8, 9, 41, 51, 42, 52]
    assert TWO.flatten(factors, ("a", "b"), 3).tolist() == first + second
    assert TWO.segment_sizes(("a", "b"), 3) == (8, 16)
    assert TWO.flatten(factors, ("a",), 3).tolist() == [1, 2, 7, 3, 4, 5, 6, 8, 9]


def test_a_segment_of_the_core_is_its_border_rows_first() -> None:
    core = np.arange(9, dtype=np.float32).reshape(3, 3)
    factors = {"m.k.core": core, "m.q.core": core + 100}
    expected = [0, 100, 3, 4, 5, 6, 7, 8, 1, 2, 103, 104, 105, 106, 107, 108, 101, 102]
    assert TWO.flatten(factors, ("core",), 3).tolist() == expected
    assert TWO.segment_sizes(("core",), 3) == (2, 16)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([("a",), ("b",), ("core",), ("a", "b"), GROUPS]))
def test_every_value_has_one_place_and_smaller_ranks_are_prefixes(layout, groups) -> None:
    factors = numbered(layout)
    whole = layout.flatten(factors, groups, layout.max_rank)
    assert len(set(whole.tolist())) == whole.size == layout.size(groups, layout.max_rank)
    for rank in layout.ranks:
        cut = layout.prefix(factors, rank)
        vector = layout.flatten(cut, groups, rank)
        assert np.array_equal(vector, whole[: layout.size(groups, rank)])
        assert np.array_equal(vector, layout.flatten(factors, groups, rank))
        back = layout.unflatten(vector, groups, rank)
        wanted = {"a": "lora_A", "b": "lora_B", "core": "core"}
        assert set(back) == {f"{m.name}.{wanted[g]}" for m, g in product(layout.modules, groups)}
        assert all(value.dtype == np.float32 and np.array_equal(value, cut[name]) for name, value in back.items())
    stops = np.cumsum(layout.segment_sizes(groups, layout.max_rank)).tolist()
    assert stops == [layout.size(groups, rank) for rank in layout.ranks]


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_split_gives_the_vector_of_each_group_alone_and_keeps_the_type(layout) -> None:
    factors = numbered(layout)
    for rank in layout.ranks:
        parts = layout.split(layout.flatten(factors, ("a", "b"), rank).astype(np.float64), ("a", "b"), rank)
        for group, part in parts.items():
            assert part.dtype == np.float64
            assert np.array_equal(part, layout.flatten(factors, (group,), rank))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.integers(0, 2**32))
def test_update_of_a_prefix_is_a_sum_over_its_segments(layout, seed) -> None:
    """Cutting by segments loses nothing: B A is the sum of the segments' products."""
    generator = np.random.default_rng(seed)
    factors = {name: generator.normal(size=value.shape).astype(np.float32) for name, value in numbered(layout).items()}
    for rank in layout.ranks:
        cut = layout.prefix(factors, rank)
        for module in layout.modules:
            lora_a, lora_b = (factors[f"{module.name}.lora_{x}"].astype(np.float64) for x in "AB")
            spans = pairwise((0, *[end for end in layout.ranks if end <= rank]))
            expected = sum(lora_b[:, low:high] @ lora_a[low:high] for low, high in spans)
            got = cut[f"{module.name}.lora_B"].astype(np.float64) @ cut[f"{module.name}.lora_A"].astype(np.float64)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * rank * 10)


def test_prefix_is_a_copy() -> None:
    factors = numbered(TWO)
    for value in TWO.prefix(factors, 1).values():
        value[...] = -1
    assert all((value >= 0).all() for value in factors.values())


@pytest.mark.parametrize("rank", [0, 2, 4, -1])
def test_only_the_end_of_a_segment_is_a_rank(rank) -> None:
    with pytest.raises(ValueError, match="not one of"):
        TWO.segment_sizes(("a",), rank)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_vector_of_another_length_is_refused(extra) -> None:
    with pytest.raises(ValueError, match="values for"):
        TWO.unflatten(np.zeros(TWO.size(("a",), 3) + extra, np.float32), ("a",), 3)


@pytest.mark.parametrize(
    "broken",
    [
        {"modules": ()},
        {"modules": (Module("b", 1, 1), Module("a", 1, 1))},
        {"modules": (Module("a", 1, 1), Module("a", 2, 2))},
        {"ranks": ()},
        {"ranks": (0, 2)},
        {"ranks": (2, 2)},
        {"ranks": (4, 2)},
        {"ranks": (-1,)},
    ],
)
def test_modules_and_ranks_that_make_no_adapter_are_refused(broken) -> None:
    with pytest.raises(ValueError, match=r"modules must|ranks must"):
        replace(TWO, **broken)


def test_digest_is_fixed_and_covers_every_field() -> None:
    text = f'{{"alpha":6.0,"base_digest":"{BASE}","modules":[["m.k",2,3],["m.q",1,2]],"ranks":[1,3]}}'
    assert TWO.digest == hashlib.sha256(text.encode()).hexdigest()
    changed = [
        replace(TWO, base_digest="cd" * 32),
        replace(TWO, modules=TWO.modules[:1]),
        replace(TWO, modules=(Module("m.k", 3, 2), TWO.modules[1])),
        replace(TWO, ranks=(2, 3)),
        replace(TWO, alpha=6.5),
    ]
    assert len({layout.digest for layout in [TWO, *changed]}) == 6
    assert replace(TWO, alpha=6).digest == TWO.digest  # a whole alpha is the same alpha


def test_the_scale_is_that_of_the_largest_rank() -> None:
    assert (TWO.max_rank, TWO.scale) == (3, 2.0)


def test_phases_train_their_groups() -> None:
    assert [phase.groups for phase in Phase] == [("a",), ("b",), ("a", "b"), ("core",)]


def test_initial_factors_are_the_same_bits_everywhere() -> None:
    layout = AdapterLayout(BASE, (Module("m.k", 40, 3), Module("m.q", 9, 2)), (4, 8), 16)
    factors = initial_factors(layout, 2**63 - 1)
    digest = hashlib.sha256(b"".join(factors[name].tobytes() for name in sorted(factors)))
    assert digest.hexdigest() == "45ac87ca2ab34145c2debb5825f7b1a9048e104c7d6b68c17f3a9f28d4ccc449"


def test_initial_factors_follow_peft() -> None:
    """PEFT starts lora_A with kaiming_uniform_(a=sqrt(5)): uniform in ±1/sqrt(in); lora_B with zeros."""
    torch = pytest.importorskip("torch")
    layout = AdapterLayout(BASE, (Module("m.k", 64, 5), Module("m.q", 64, 5)), (1024,), 16)
    factors = initial_factors(layout, 1)
    theirs = torch.empty(1024, 64)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5, generator=torch.Generator().manual_seed(0))
    for name in ("m.k", "m.q"):
        ours = factors[f"{name}.lora_A"]
        assert ours.dtype == np.float32 and np.abs(ours).max() <= 1 / 8
        for moment in (1, 2, 4):  # n = 65,536; the largest deviation of five seeds was a third of the bound
            assert abs((ours**moment).mean() - (theirs.numpy() ** moment).mean()) * 8**moment < 0.012
        assert factors[f"{name}.lora_B"].shape == (5, 1024) and not factors[f"{name}.lora_B"].any()
    assert not np.array_equal(factors["m.k.lora_A"], factors["m.q.lora_A"])
    assert not np.array_equal(factors["m.k.lora_A"], initial_factors(layout, 2)["m.k.lora_A"])


def test_a_core_is_multiplied_into_lora_b() -> None:
    factors = numbered(TWO)
    pairs = effective_pairs(TWO, factors)
    for module in TWO.modules:
        lora_a, lora_b = pairs[module.name]
        assert np.array_equal(lora_a, factors[f"{module.name}.lora_A"])
        assert np.array_equal(lora_b, np.dot(factors[f"{module.name}.lora_B"], factors[f"{module.name}.core"]))
    plain = {name: value for name, value in factors.items() if not name.endswith(".core")}
    assert np.array_equal(effective_pairs(TWO, plain)["m.k"][1], factors["m.k.lora_B"])
