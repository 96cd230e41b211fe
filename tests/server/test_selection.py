from __future__ import annotations

from collections import Counter

import pytest
from scipy import stats

from edge_runtime.formats.messages import Profile
from server.fleet import simulated_layout
from server.selection import Device, choose_deadline_s, device_from_profile, select_cohort
from tests.server.simulated import settings

SHA = "ab" * 32


def fleet(count, **fields):
    return [Device(node, f"device-{node:03d}", sequences=1, **fields) for node in range(count)]


def names(cohort):
    return [device.name for device in cohort]


def test_a_cohort_is_the_same_in_any_order_and_changes_with_round_and_seed() -> None:
    config, devices = settings("cohort.size=5"), fleet(30)
    chosen = names(select_cohort(config, 3, devices, 0.0))
    assert len(chosen) == 5 and chosen == names(select_cohort(config, 3, reversed(devices), 0.0))
    assert chosen != names(select_cohort(config, 4, devices, 0.0))
    assert chosen != names(select_cohort(settings("cohort.size=5", "seed=8"), 3, devices, 0.0))


def test_who_else_is_there_does_not_change_the_order_of_two_devices() -> None:
    config, devices = settings("cohort.size=100", "cohort.quorum=1"), fleet(30)
    everyone = names(select_cohort(config, 3, devices, 0.0))
    some = names(select_cohort(config, 3, devices[::3], 0.0))
    assert some == [name for name in everyone if name in some] and len(some) == 10


def test_every_device_has_its_turn_equally_often() -> None:
    config, devices, rounds = settings("cohort.size=5"), fleet(20), 2000
    counts = Counter(name for number in range(rounds) for name in names(select_cohort(config, number, devices, 0.0)))
    assert len(counts) == 20 and sum(counts.values()) == 5 * rounds
    # Drawing without replacement varies less than a multinomial: the p-value is conservative.
    assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert min(counts.values()) > rounds * 0.25 * 0.85


@pytest.mark.parametrize(("size", "factor", "asked"), [(10, 1.0, 10), (10, 1.1, 11), (10, 1.25, 13), (3, 10, 30)])
def test_over_selection_asks_more_by_the_factor_and_no_more(size, factor, asked) -> None:
    config = settings(f"cohort.size={size}", f"cohort.over_selection={factor}")
    assert len(select_cohort(config, 1, fleet(40), 0.0)) == asked == config.cohort.selected


def test_devices_without_data_or_before_their_time_are_never_selected() -> None:
    config, devices = settings("cohort.size=30"), fleet(30)
    for device in devices[:10]:
        device.sequences = 0
    for device in devices[10:20]:
        device.not_before_s = 50.0
    assert set(names(select_cohort(config, 1, devices, 49.9))) == set(names(devices[20:]))
    assert set(names(select_cohort(config, 1, devices, 50.0))) == set(names(devices[10:]))


def test_devices_that_were_asked_more_often_come_later() -> None:
    config, devices = settings("cohort.size=4"), fleet(8)
    order = names(select_cohort(settings("cohort.size=8"), 1, devices, 0.0))
    asked = {order[0]: 2, order[1]: 1, order[2]: 1}
    assert names(select_cohort(config, 1, devices, 0.0, asked)) == order[3:7]
    assert names(select_cohort(settings("cohort.size=8"), 1, devices, 0.0, asked))[5:] == [*order[1:3], order[0]]


@pytest.mark.parametrize(
    ("steps_s", "expected"),
    [((1.0, 2.0), 60.0), ((0.001, 0.002), 30.0), ((1e6,), 3600.0), ((1.0, 0.0), 3600.0), ((), 3600.0)],
)
def test_a_deadline_is_thrice_the_slowest_within_its_bounds(steps_s, expected) -> None:
    config = settings("local.steps=10")
    assert choose_deadline_s(config, (Device(1, "d", step_s=step_s) for step_s in steps_s)) == expected


def profile(**fields):
    known = dict(device="phone", public_key=SHA, base_digest=SHA, layout_digest=SHA, rank=4, trainer="onnx", buckets=(64,), sequences=5, step_s=0.0)  # fmt: skip  # noqa: E501
    return Profile(**(known | fields))


def test_a_device_trains_the_largest_segment_that_it_can() -> None:
    layout = simulated_layout(settings("adapter.ranks=[2,4,16]"))
    ranks = {rank: device_from_profile(1, profile(rank=rank), layout, None).rank for rank in (1, 2, 3, 4, 15, 16, 64)}
    assert ranks == {1: 2, 2: 2, 3: 2, 4: 4, 15: 4, 16: 16, 64: 16}


def test_what_is_remembered_of_a_device_outlives_its_node() -> None:
    layout = simulated_layout(settings())
    known = Device(1, "phone", step_s=2.5, held={"a": 3}, folded_plan="f" * 64, folded=4, not_before_s=9.0)
    device = device_from_profile(77, profile(sequences=8, rank=8), layout, known)
    assert device is known and (device.node, device.sequences, device.step_s, device.rank) == (77, 8, 2.5, 4)
    assert (device.held, device.folded_plan, device.folded, device.not_before_s) == ({"a": 3}, "f" * 64, 4, 9.0)
    assert device_from_profile(77, profile(step_s=1.5), layout, known).step_s == 1.5


def test_outcomes_are_counted() -> None:
    device = Device(1, "phone")
    for number, outcome in enumerate(("folded", "declined:heat", "refused:norm", "lost:deadline", "folded"), 1):
        device.outcome(number, outcome)
    assert (device.folded, device.declined, device.refused, device.lost) == (2, 1, 1, 1)
    assert (device.last_round, device.last_outcome) == (5, "folded")
    assert Device(**device.to_dict()) == device
