from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from edge_runtime.formats.envelope import Envelope, seal, unseal
from edge_runtime.formats.messages import Decline, Hello, Profile, Reason, Score, hello
from server.federation import open_federation
from server.fleet import simulated_layout
from server.greeting import ANSWER_S, Greeter
from server.rounds import run_federation
from tests.server.simulated import Clock, Phone, Wire, events_of, federate, phones, rounds_of, settings


def profiled(phone, **fields):
    """A phone whose profile says something else."""

    def answer(envelope):
        reply = phone(envelope)
        return seal(replace(unseal(reply, Profile), **fields)) if envelope.kind == "hello" else reply

    return answer


def hellos(run):
    return [node for node, envelope in run.transport.sent if envelope.kind == "hello"]


TURNED_AWAY = {
    "another base": (lambda p: profiled(p, base_digest="1" * 64), "base: it holds 1111"),
    "another layout": (lambda p: profiled(p, layout_digest="1" * 64), "layout: it read 1111"),
    "too small a rank": (lambda p: profiled(p, rank=1), "rank: it trains 1, the smallest of the federation is 2"),
    "no such sequences": (lambda p: profiled(p, buckets=(16, 32)), "buckets: it trains sequences of \\[16, 32\\]"),
    "another base, it says": (lambda p: lambda e: seal(Decline(Reason.BASE, "mine is 7B", 0)), "base: mine is 7B"),
    "no such adapter, it says": (lambda p: lambda e: seal(Decline(Reason.LAYOUT, "q_proj", 0)), "layout: q_proj"),
    "another message": (lambda p: lambda e: seal(Score(1, 1.0, 1)), "invalid: "),
    "a damaged profile": (lambda p: lambda e: Envelope("profile", {"device": "\n" * 9999}), "invalid: profile: "),
    "a damaged decline": (lambda p: lambda e: Envelope("decline", {"reason": {}}), "invalid: decline: "),
    "a name with a path": (
        lambda p: lambda e: Envelope("profile", dict(p(e).header) | {"device": "../x"}),
        "invalid: ",
    ),
}


@pytest.mark.parametrize(("make", "reason"), TURNED_AWAY.values(), ids=TURNED_AWAY)
def test_who_cannot_take_part_is_told_in_the_ledger_and_never_asked_again(tmp_path, make, reason) -> None:
    config = settings("adapter.ranks=[2,4]", "rounds=3")
    devices = phones(config, [4, 4, 4, 4])
    devices[4] = make(devices[4])
    run = federate(config, tmp_path, devices)
    run_federation(run)
    (event,) = events_of(run, "turned_away")
    assert event["node"] == "4"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(event["reason"])
    assert [e.kind for node, e in run.transport.sent if node == 4] == ["hello"]
    assert [r["planned"] for r in rounds_of(run)] == [3, 3, 3] and len(run.devices) == 3


def test_the_greeting_describes_the_adapter(tmp_path) -> None:
    config = settings("adapter.ranks=[2,4]", "rounds=1")
    run = federate(config, tmp_path, phones(config))
    run_federation(run)
    (greeting,) = {
        e.header["base_digest"]: unseal(e, Hello) for _, e in run.transport.sent if e.kind == "hello"
    }.values()
    assert greeting.layout() == run.layout and greeting.federation == "test"


@pytest.mark.parametrize("wrong", ["key", "name"])
def test_only_devices_whose_name_and_key_were_enrolled_for_their_node_take_part(tmp_path, wrong) -> None:
    config, clock = settings("rounds=1", "cohort.size=2"), Clock()
    devices = phones(config)
    layout = simulated_layout(config)
    told = {n: unseal(d(seal(hello("test", layout))), Profile) for n, d in devices.items()}
    keys = {n: (profile.device, profile.public_key) for n, profile in told.items()}
    # The third has another's key, as the registry sees it, or its own key and another's name.
    enrolled = {1: keys[1], 2: keys[2], 3: (keys[3][0], keys[2][1]) if wrong == "key" else (keys[2][0], keys[3][1])}
    run = open_federation(
        config, layout, tmp_path, Wire(devices, clock), clock=clock, sleep=clock.sleep, enrolled=enrolled.get
    )
    run_federation(run)
    assert [(e["node"], e["reason"][:4]) for e in events_of(run, "turned_away")] == [("3", "key:")]
    assert set(run.devices) == {"simulated-00000", "simulated-00001"}


def test_a_name_cannot_be_taken_with_another_key(tmp_path) -> None:
    config = settings("rounds=1")
    devices = phones(config, [4] * 4)
    devices[4] = profiled(devices[4], device="simulated-00000")
    run = federate(config, tmp_path, devices)
    run_federation(run)
    assert [(e["node"], e["reason"]) for e in events_of(run, "turned_away")] == [
        ("4", "name: simulated-00000 belongs to another key")
    ]
    assert run.devices["simulated-00000"].node == 1 and rounds_of(run)[0]["folded"] == 3


def test_a_node_that_comes_later_is_greeted_and_takes_part(tmp_path) -> None:
    config = settings("rounds=3", "cohort.size=4")
    devices = phones(config, [4] * 4)
    late = devices.pop(4)
    run = federate(config, tmp_path, devices)
    run_federation(run, lambda record: run.transport.devices.update({4: late}))
    assert [r["planned"] for r in rounds_of(run)] == [3, 4, 4] and hellos(run).count(4) == 1
    assert run.devices["simulated-00003"].folded == 2


def test_a_node_that_left_is_not_asked(tmp_path) -> None:
    config = settings("rounds=2")
    run = federate(config, tmp_path, phones(config))
    run_federation(run, lambda record: run.transport.devices.pop(2, None))
    assert [r["planned"] for r in rounds_of(run)] == [3, 2]


def test_a_device_on_a_new_node_is_still_the_same_device(tmp_path) -> None:
    config = settings("rounds=4")
    devices = phones(config)
    run = federate(config, tmp_path, devices)

    def move(record):
        if record["round"] == 2:
            run.transport.devices[44] = run.transport.devices.pop(2)

    run_federation(run, move)
    moved = run.devices["simulated-00001"]
    assert (moved.node, moved.folded) == (44, 4) and len(run.devices) == 3
    plans = [e for node, e in run.transport.sent if node in (2, 44) and e.kind == "plan"]
    assert [bool(e.header["folded"]) for e in plans] == [False, True, True, True]
    assert [part["size_bytes"] > 0 for part in plans[3].header["parts"]] == [True, False]  # it still holds b


def test_a_device_that_is_connected_twice_takes_part_once(tmp_path) -> None:
    """Its old node stays online until its heartbeat is missed."""
    config = settings("rounds=2", "cohort.size=4")
    devices = phones(config)
    devices[9] = devices[3]
    run = federate(config, tmp_path, devices)
    run_federation(run)
    assert [(r["planned"], r["folded"]) for r in rounds_of(run)] == [(3, 3), (3, 3)]
    assert [node for node, e in run.transport.sent if e.kind == "plan" and node in (3, 9)] == [9, 9]


def test_a_node_that_never_answers_holds_up_nobody(tmp_path) -> None:
    config = settings("rounds=3", "cohort.patience_s=600")
    devices = phones(config)
    devices[4] = lambda envelope: None
    run = federate(config, tmp_path, devices)
    run_federation(run)
    assert len(rounds_of(run)) == 3 and hellos(run).count(4) == 1
    assert run.clock.now_s < 1000 + ANSWER_S + 1


def test_a_slow_answer_to_the_greeting_counts_when_it_comes(tmp_path) -> None:
    config = settings("rounds=1", "cohort.size=4", "cohort.quorum=4", "cohort.shortest_deadline_s=60")
    run = federate(config, tmp_path, phones(config, [4] * 4), delays_s={4: 3 * ANSWER_S})
    run_federation(run)
    assert rounds_of(run)[0]["folded"] == 4 and hellos(run).count(4) == 1


@pytest.mark.parametrize("trouble", ["gone", "busy"])
def test_who_cannot_answer_now_is_greeted_again_after_a_pause(tmp_path, trouble) -> None:
    config, clock = settings("cohort.patience_s=60"), Clock()
    layout, asked = simulated_layout(config), []
    phone = Phone(0, layout, config)

    def later(envelope):
        asked.append(clock())
        if len(asked) == 3:
            return phone(envelope)
        if trouble == "gone":
            raise ConnectionError
        return seal(Decline(Reason.BUSY, "disk full", 25.0))

    wire = Wire({1: later}, clock)
    run = open_federation(config, layout, tmp_path, wire, clock=clock, sleep=clock.sleep)
    greeter = Greeter()
    assert [device.name for device in greeter.wait_for(run, 1, 60.0)] == ["simulated-00000"]
    pause_s = ANSWER_S if trouble == "gone" else 25.0
    gaps = [b - a for a, b in pairwise(asked)]
    assert len(asked) == 3 and all(pause_s <= gap < pause_s + 0.5 for gap in gaps)
    assert not greeter.turned_away and not events_of(run, "turned_away")


def test_what_is_known_of_devices_survives_a_restart(tmp_path) -> None:
    config = settings("rounds=2")
    devices = phones(config)
    run_federation(run := federate(config, tmp_path, devices))
    again = federate(settings("rounds=3"), tmp_path, {node + 100: device for node, device in devices.items()})
    assert {name: d.to_dict() for name, d in again.devices.items()} == {
        name: d.to_dict() for name, d in run.devices.items()
    }
    run_federation(again)
    assert sorted(d.node for d in again.devices.values()) == [101, 102, 103]
    assert [d.folded for d in again.devices.values()] == [3, 3, 3]
