from __future__ import annotations

import pytest

from edge_runtime.formats.envelope import header_text, unseal
from edge_runtime.formats.layout import Phase
from edge_runtime.formats.messages import Plan, ScorePlan
from server.adapter_state import start_state
from server.fleet import simulated_layout
from server.plan import Drift, choose_phase, make_plan, make_score_plan, plan_id
from server.selection import Device
from tests.server.simulated import settings


def phases(config, dispersions=None, rounds=9):
    """(phase, reason) of so many rounds whose deltas disperse as given."""
    last, found = Drift(), []
    for number in range(1, rounds + 1):
        phase, reason, apart = choose_phase(config, number, last)
        streak = last.streak + 1 if last.phase is phase else 1
        last = Drift(phase, (dispersions or [0.5] * rounds)[number - 1], apart, streak)
        found.append((phase.value, reason))
    return found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("phases.schedule=both",), "both both both both both both both both both"),
        (("phases.schedule=ffa",), "b b b b b b b b b"),
        (("phases.schedule=core", "phases.warmup_rounds=3"), "b b b core core core core core core"),
        (("phases.schedule=alternating", "phases.warmup_rounds=2"), "b b a b a b a b a"),
        (("phases.schedule=alternating", "phases.warmup_rounds=0"), "b a b a b a b a b"),
        (("phases.schedule=alternating", "phases.turn_rounds=3"), "b b a a a b b b a"),
        (("phases.schedule=alternating", "phases.warmup_rounds=5", "phases.turn_rounds=2"), "b b b b b a a b b"),
    ],
)
def test_schedules(overrides, expected) -> None:
    assert " ".join(phase for phase, _ in phases(settings(*overrides))) == expected


def test_auto_trains_both_until_updates_disperse_and_apart_ever_after() -> None:
    config = settings("phases.schedule=auto", "phases.dispersion=0.6", "phases.turn_rounds=2")
    found = phases(config, [0.1, 0.6, 0.61, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert " ".join(phase for phase, _ in found) == "both both both b b a a b b"
    assert [reason for _, reason in found[:4]] == [
        "dispersion 0.000 <= 0.6", "dispersion 0.100 <= 0.6", "dispersion 0.600 <= 0.6", "dispersion 0.610 > 0.6",
    ]  # fmt: skip
    assert [reason for _, reason in found[4:6]] == ["2 of 2 in turn", "1 of 2 in turn"]


def test_the_reason_of_a_phase_is_told() -> None:
    assert {reason for _, reason in phases(settings("phases.schedule=core", "phases.warmup_rounds=2"))} == {
        "warm-up",
        "schedule",
    }
    assert {reason for _, reason in phases(settings("phases.schedule=ffa"))} == {"schedule"}


def test_the_same_work_has_the_same_id_and_other_work_another() -> None:
    config = settings()
    layout = simulated_layout(config)
    one = plan_id(config, layout, 3, 0, "phone")
    assert one == plan_id(settings("rounds=99"), layout, 3, 0, "phone") and len(one) == 64
    others = [
        plan_id(config, layout, 4, 0, "phone"),
        plan_id(config, layout, 3, 1, "phone"),
        plan_id(config, layout, 3, 0, "board"),
        plan_id(settings("seed=8"), layout, 3, 0, "phone"),
        plan_id(settings("name=other"), layout, 3, 0, "phone"),
        plan_id(config, simulated_layout(settings("adapter.alpha=4")), 3, 0, "phone"),
    ]
    assert len({one, *others}) == 7


def test_a_plan_says_what_the_configuration_says() -> None:
    config = settings("local.weight=sequences", "local.weight_cap=9", "privacy.clip_norm=0.5", "codec.up=int4")
    state, device = start_state(simulated_layout(config), config.seed, config.codec.down), Device(7, "phone", rank=4)
    device.folded_plan = "f" * 64
    envelope = make_plan(config, state, device, 2, Phase.A, 33.0, attempt=1, noise_std=0.25)
    plan = unseal(envelope, Plan)
    assert (plan.round, plan.phase, plan.rank, plan.deadline_s, plan.noise_std) == (2, Phase.A, 4, 33.0, 0.25)
    assert (plan.weight_cap, plan.clip_norm, plan.codec, plan.folded) == (9, 0.5, "int4", "f" * 64)
    assert plan.plan_id == plan_id(config, state.layout, 2, 1, "phone")
    assert header_text(make_plan(config, state, device, 2, Phase.A, 33.0, attempt=1, noise_std=0.25)) == header_text(
        envelope
    )
    uniform = settings("local.weight=uniform", "local.weight_cap=9")
    assert unseal(make_plan(uniform, state, device, 2, Phase.A, 33.0), Plan).weight_cap == 1


def test_every_device_and_round_shuffles_its_data_in_its_own_way_and_a_repeated_plan_alike() -> None:
    config = settings()
    state = start_state(simulated_layout(config), config.seed, config.codec.down)
    seeds = {
        (name, number, attempt): unseal(
            make_plan(config, state, Device(1, name, rank=4), number, Phase.B, 9.0, attempt=attempt), Plan
        ).data_seed
        for name in ("a", "b")
        for number in (1, 2)
        for attempt in (0, 1)
    }
    assert len(set(seeds.values())) == 4
    assert all(seeds[name, number, 0] == seeds[name, number, 1] for name, number, _ in seeds)


def test_a_score_plan_brings_what_the_device_does_not_hold() -> None:
    config = settings()
    state = start_state(simulated_layout(config), config.seed, config.codec.down)
    state.apply("b", state.residuals["b"] + 0.01)
    device = Device(1, "phone", rank=4)
    plan = unseal(make_score_plan(config, state, device, 5), ScorePlan)
    assert plan.round == 5 and [part.size_bytes > 0 for part in plan.parts] == [False, True]
    device.held = {"a": 0, "b": 1}
    envelope = make_score_plan(config, state, device, 5)
    assert envelope.payload == b"" and [p.size_bytes for p in unseal(envelope, ScorePlan).parts] == [0, 0]
