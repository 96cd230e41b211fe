"""What each student starts from, whom it learns from, and in which order."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.errors import UserError
from pipeline.distillation.chain import ChainStep, Link, Start, describe_chain, plan_chain, require_shrinking
from pipeline.distillation.shapes import StudentShape

CHAIN = [
    Link("3b"),
    Link("1_5b", "3b", learns_from="3b"),
    Link("0_5b", "1_5b", learns_from="1_5b"),
    Link("135m", "0_5b", learns_from="0_5b"),
]


def test_a_whole_teacher_is_cut_from_nothing_and_waits_for_nobody() -> None:
    (whole, small) = plan_chain([Link("whole", whole=True), Link("small")])
    assert (whole.start, whole.initialiser, whole.needs, whole.depth) == (Start.WHOLE, None, (), 0)
    assert describe_chain([whole, small])[0] == "whole: the teacher itself, nothing cut, nothing learned"


def test_each_student_of_a_chain_comes_after_the_one_it_is_cut_from() -> None:
    for order in itertools.permutations(CHAIN):
        steps = plan_chain(order)
        assert [step.name for step in steps] == ["3b", "1_5b", "0_5b", "135m"]
        assert [step.initialiser for step in steps] == ["teacher", "3b", "1_5b", "0_5b"]
        assert [step.learns_from for step in steps] == ["teacher", "3b", "1_5b", "0_5b"]
        assert [step.depth for step in steps] == [1, 2, 3, 4]
        assert [step.measures_anew for step in steps] == [False, True, True, True]
        assert [step.uses_stored_targets for step in steps] == [True, False, False, False]


def test_a_family_cut_from_the_teacher_keeps_its_order() -> None:
    steps = plan_chain([Link("b"), Link("a"), Link("c")])
    assert [step.name for step in steps] == ["b", "a", "c"]
    assert {(step.start, step.initialiser, step.needs, step.depth) for step in steps} == {
        (Start.PRUNED, "teacher", (), 1)
    }


def test_a_checkpoint_needs_nobody_and_may_teach_others() -> None:
    steps = plan_chain([Link("tiny", "small"), Link("small", checkpoint=Path("/models/small")), Link("other")])
    assert steps[0] == ChainStep("small", Start.CHECKPOINT, None, Path("/models/small"), "teacher", (), 0)
    assert (steps[1].name, steps[1].initialiser, steps[1].needs, steps[1].depth) == ("tiny", "small", ("small",), 1)
    assert not steps[0].measures_anew and steps[1].measures_anew


def test_initialiser_and_teacher_may_be_two() -> None:
    steps = plan_chain([Link("c", "a", learns_from="b"), Link("b"), Link("a")])
    assert [step.name for step in steps] == ["b", "a", "c"] and steps[2].needs == ("b", "a")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda n: st.tuples(
            st.permutations(range(n)), *[st.tuples(st.integers(-1, i - 1), st.integers(-1, i - 1)) for i in range(n)]
        )
    )
)
def test_whatever_has_no_cycle_is_ordered(drawn: tuple[object, ...]) -> None:
    order, *parents = drawn
    names = {-1: "teacher"} | {i: f"s{i}" for i in range(len(parents))}
    links = [Link(names[i], names[a], learns_from=names[b]) for i, (a, b) in enumerate(parents)]
    steps = plan_chain([links[i] for i in order])
    done: set[str] = {"teacher"}
    for step in steps:
        assert {step.initialiser, step.learns_from} <= done and set(step.needs) <= done
        done.add(step.name)
    assert len(steps) == len(links)


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([], r"^family: got 'no submodels', allowed: at least one$"),
        ([Link("a", "a")], r"^submodel\.cut_from: got 'a -> a', allowed: a chain that begins at the teacher$"),
        ([Link("ok"), Link("a", "c"), Link("b", "a"), Link("c", "b")], r"got 'a -> c -> b -> a'"),
        ([Link("a", learns_from="b"), Link("b", "a")], r"got 'a -> b -> a'"),
        ([Link("c", "a"), Link("a", "b"), Link("b", "a")], r"got 'a -> b -> a'"),
        ([Link("a"), Link("b", "aa")], r"^submodel b: cut_from: got 'aa', allowed: teacher, a, b; did you mean a\?$"),
        ([Link("a", learns_from="techer")], r"^submodel a: learns_from: got 'techer'.*did you mean teacher\?$"),
        ([Link("a", "zzz")], r"^submodel a: cut_from: got 'zzz', allowed: teacher, a$"),
        ([Link("a"), Link("a")], r"^family: got 'a', allowed: each submodel once$"),
        ([Link("teacher")], r"^submodel\.name: got 'teacher'"),
        (
            [Link("a"), Link("b", "a", Path("x"))],
            r"^submodel b: cut_from: got 'a', allowed: nothing beside checkpoint; choose",
        ),
    ],
)
def test_what_cannot_be_a_chain_is_refused_in_one_line(links: list[Link], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan_chain(links)
    assert "\n" not in str(caught.value)


def test_a_student_larger_than_the_one_it_is_cut_from_is_refused() -> None:
    shapes = {"a": StudentShape(64, 96, 2, 3), "b": StudentShape(64, 96, 2, 3)}
    steps = plan_chain([Link("a"), Link("b", "a")])
    require_shrinking(steps, shapes)
    for field, size in (("hidden_size", 96), ("intermediate_size", 128), ("num_kv_heads", 4), ("num_layers", 4)):
        larger = {name: getattr(shapes["b"], name) for name in StudentShape.__slots__} | {field: size}
        with pytest.raises(
            UserError, match=rf"^submodel b: {field}: got {size}, allowed: at most the \d+ of a; make it"
        ):
            require_shrinking(steps, shapes | {"b": StudentShape(**larger)})
    require_shrinking(plan_chain([Link("a"), Link("b")]), {"a": shapes["a"], "b": StudentShape(96, 96, 2, 3)})


def test_a_dry_run_says_what_each_starts_from() -> None:
    steps = plan_chain([Link("a"), Link("b", "a", learns_from="a"), Link("c", checkpoint=Path("/m/c"))])
    assert describe_chain(steps) == [
        "a: cut from teacher, importance measured on it by stage targets; learns from teacher, its stored draws",
        "b: cut from a, importance measured on it before its training; learns from a, run beside it",
        "c: starts from /m/c, nothing measured; learns from teacher, its stored draws",
    ]
    online = [line.rpartition(", ")[2] for line in describe_chain(steps, stored=False)]
    assert online == ["run beside it"] * 3
