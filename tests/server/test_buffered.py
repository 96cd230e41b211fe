from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from edge_runtime.formats.envelope import seal, unseal
from edge_runtime.formats.messages import Decline, Plan, Reason, Score, Update
from server.buffered import MOST_UNDONE, WEIGHT_UNIT, discounted, run_buffered
from server.collecting import Collected
from server.committing import evaluate
from server.federation import adapter_digest
from server.greeting import Greeter
from server.rounds import FederationError, run_federation
from tests.server.simulated import events_of, federate, phones, rounds_of, settings, wire_bytes

BUFFERED = (
    "mode.name=buffered", "mode.buffer=2", "phases.schedule=ffa", "codec.up=fp32", "codec.down=fp32", "rounds=5",
    "local.weight=sequences", "cohort.shortest_deadline_s=100", "cohort.longest_deadline_s=100",
)  # fmt: skip


def run_with(config, directory, delays_s, devices=None, **wiring):
    run = federate(config, directory, devices or phones(config), delays_s=delays_s, **wiring)
    run_federation(run)
    return run


def test_weights_are_discounted_by_staleness_and_stay_whole() -> None:
    assert [discounted(1, s) for s in (0, 1, 3, 8, 10**6)] == [16, 11, 8, 5, 1]
    for weight, staleness in ((1, 0), (7, 2), (64, 5), (1024, 1)):
        exact = weight / sqrt(1 + staleness)
        assert abs(discounted(weight, staleness) / WEIGHT_UNIT - exact) <= 0.5 / WEIGHT_UNIT


def test_every_commit_is_the_discounted_mean_of_its_replies(tmp_path) -> None:
    config = settings(*BUFFERED)
    run = federate(config, tmp_path, phones(config), delays_s={1: 3.0, 2: 4.0, 3: 11.0}, at_once=1)
    before, stale = [run.state.values["b"].astype(np.float64)], []
    taken = [0]

    def check(record):
        updates = [e for _, e in run.transport.received if e.kind == "update"][taken[0] :]
        taken[0] += len(updates)
        assert len(updates) == 2 and all(e.header["phase"] == "b" for e in updates)
        stale.extend(record["round"] - e.header["round"] for e in updates)
        weights = [e.header["weight"] / sqrt(1 + record["round"] - e.header["round"]) for e in updates]
        mean = np.average([np.frombuffer(e.payload, "<f4").astype(np.float64) for e in updates], 0, weights)
        found = run.state.values["b"] - before[-1]
        # Weights are rounded to sixteenths: at most 1/32 of at least 8/sqrt(4) each.
        assert np.abs(found - mean).max() <= np.abs(mean).max() * 0.01 + 1e-8
        before.append(run.state.values["b"].astype(np.float64))

    run_federation(run, check)
    assert max(stale) >= 1 and len(before) == 6
    assert [r["folded"] for r in rounds_of(run)] == [2] * 5


@pytest.mark.parametrize(("most", "refused"), [(0, {"stale": 1}), (1, {})])
def test_replies_staler_than_allowed_are_refused_and_others_count(tmp_path, most, refused) -> None:
    config = settings(*BUFFERED, f"mode.max_staleness={most}", "rounds=2")
    run = run_with(config, tmp_path, {1: 1.0, 2: 1.0, 3: 1.6})  # the third answers the first plan after one commit
    assert [r["refused"] for r in rounds_of(run)] == [{}, refused]


def test_a_reply_whose_frozen_factor_changed_is_refused(tmp_path) -> None:
    config = settings(
        *BUFFERED, "phases.schedule=alternating", "phases.warmup_rounds=1", "phases.turn_rounds=1", "rounds=6"
    )
    run = run_with(config, tmp_path, {1: 1.0, 2: 1.0, 3: 1.6})
    assert [r["phase"] for r in rounds_of(run)] == ["b", "a", "b", "a", "b", "a"]
    refused = [r["refused"] for r in rounds_of(run)]
    assert sum(one.get("version", 0) for one in refused) >= 2 and all(set(one) <= {"version"} for one in refused)


def test_a_reply_of_the_same_phase_whose_frozen_factor_changed_twice_is_refused(tmp_path) -> None:
    """Phase b again, but lora_A moved in between: comparing phases alone would let it in."""
    config = settings(
        *BUFFERED, "phases.schedule=alternating", "phases.warmup_rounds=1", "phases.turn_rounds=1", "rounds=4",
        "mode.max_staleness=9",
    )  # fmt: skip
    devices = phones(config)
    run = federate(config, tmp_path, devices, delays_s={1: 1.0, 2: 1.0, 3: 2.5})
    run_federation(run)
    late = [e for node, e in run.transport.received if node == 3 and e.kind == "update"]
    assert late and late[0].header["round"] == 1 and late[0].header["phase"] == "b"
    assert rounds_of(run)[2]["phase"] == "b" and rounds_of(run)[2]["refused"] == {"version": 1}


def test_overdue_replies_are_lost_and_the_device_is_asked_again(tmp_path) -> None:
    config = settings(*BUFFERED, "cohort.shortest_deadline_s=5", "cohort.longest_deadline_s=5", "rounds=6")
    devices, silent = phones(config), []
    honest = devices[3]

    def deaf_once(envelope):
        if envelope.kind == "plan" and not silent:
            silent.append(envelope.header["plan_id"])
        return None if envelope.header.get("plan_id") in silent else honest(envelope)

    devices[3] = deaf_once
    run = run_with(config, tmp_path, {1: 2.0, 2: 2.0, 3: 0.5}, devices)
    assert sum(r["lost"] for r in rounds_of(run)) == 1
    phone = run.devices["simulated-00002"]
    assert (phone.lost, phone.folded >= 1) == (1, True)


def test_it_ends_when_no_update_comes(tmp_path) -> None:
    config = settings(*BUFFERED, "cohort.patience_s=50")
    devices = {n: (lambda e, d=d: d(e) if e.kind == "hello" else None) for n, d in phones(config).items()}
    run = federate(config, tmp_path, devices)
    assert not run_buffered(run, Greeter())
    assert 1150 < run.clock.now_s < 1152
    with pytest.raises(FederationError, match="round 1: no update that could be committed"):
        run_federation(federate(config, tmp_path, devices))


@pytest.mark.parametrize("answer", ["decline", "garbage", "gone"])
def test_devices_that_never_give_an_update_are_asked_now_and_then_and_not_for_ever(tmp_path, answer) -> None:
    config = settings(*BUFFERED, "cohort.patience_s=50")

    def useless(device):
        def reply(envelope):
            if envelope.kind == "hello":
                return device(envelope)
            if answer == "gone":
                raise ConnectionError
            return seal(Decline(Reason.INVALID, "", 0.0)) if answer == "decline" else envelope

        return reply

    run = federate(config, tmp_path, {node: useless(device) for node, device in phones(config).items()})
    assert not run_buffered(run, Greeter())
    plans = [e for _, e in run.transport.sent if e.kind == "plan"]
    assert 1150 < run.clock.now_s < 1152 and 30 <= len(plans) <= 48


def test_the_same_arrivals_give_the_same_bits_and_order_within_a_commit_none(tmp_path) -> None:
    config = settings(*BUFFERED, "mode.buffer=3", "codec.up=int8", "codec.down=int8")
    digests = set()
    for seed in range(3):
        shuffle = np.random.default_rng(seed)
        run = run_with(config, tmp_path / str(seed), {}, shuffle=shuffle, at_once=3)
        digests.add(adapter_digest(run))
    assert len(digests) == 1


def test_a_federation_in_a_core_trains_the_core(tmp_path) -> None:
    config = settings(*BUFFERED, "phases.schedule=core", "phases.warmup_rounds=2")
    run = run_with(config, tmp_path, {1: 1.0, 2: 1.0, 3: 1.5})
    assert [r["phase"] for r in rounds_of(run)] == ["b", "b", "core", "core", "core"]
    assert set(run.state.versions) == {"a", "b", "core"} and all(r["folded"] >= 2 for r in rounds_of(run))


def test_a_loss_gate_that_undoes_every_commit_ends_the_run(tmp_path) -> None:
    config = settings(*BUFFERED, "gates.loss_rise=0.1", "evaluation.every=1")
    devices, losses = phones(config), iter([10, 10, 10, *range(20, 1000, 10)])

    def worse(device):
        def answer(envelope):
            if envelope.kind != "scoreplan":
                return device(envelope)
            return seal(Score(envelope.header["round"], 100.0 * next(losses), 1))

        return answer

    run = federate(config, tmp_path, {n: worse(d) for n, d in devices.items()})
    before = adapter_digest(run)
    assert not gated_by_baseline(run)
    assert adapter_digest(run) == before and not rounds_of(run)
    asked = [e.header["plan_id"] for _, e in run.transport.sent if e.kind == "plan"]
    assert len(set(asked)) == len(asked) >= 3 * MOST_UNDONE


def gated_by_baseline(run):
    greeter = Greeter()
    run.loss = evaluate(run, greeter.wait_for(run, 3, 60.0), Collected())
    return run_buffered(run, greeter)


def test_a_folded_reply_is_acknowledged_in_the_very_next_plan(tmp_path) -> None:
    """Two plans may lie within one commit; naming the older reply would count its residual twice."""
    config = settings(*BUFFERED, "mode.buffer=3", "cohort.size=3", "cohort.quorum=1", "codec.up=int4")
    run = run_with(config, tmp_path, {1: 1.0}, phones(config, [4]))
    plans = [unseal(e, Plan) for _, e in run.transport.sent if e.kind == "plan"]
    answered = [unseal(e, Update).plan_id for _, e in run.transport.received if e.kind == "update"]
    assert [p.folded for p in plans] == ["", *[p.plan_id for p in plans[:-1]]] and len(set(answered)) == 15


def test_a_device_that_lacks_factors_gets_them(tmp_path) -> None:
    config = settings(*BUFFERED, "phases.schedule=alternating", "phases.turn_rounds=3", "phases.warmup_rounds=1")
    devices = phones(config)
    run = federate(config, tmp_path, devices, delays_s={1: 1.0, 2: 1.0, 3: 1.0})

    def lose(record):
        for device in devices.values():
            device.held = {}

    run_federation(run, lose)
    declines = [e for _, e in run.transport.received if e.kind == "decline"]
    assert declines and {e.header["reason"] for e in declines} == {"factors"}
    assert all(not r["declined"] for r in rounds_of(run)) and len(rounds_of(run)) == 5


def test_bytes_of_every_commit_are_those_of_its_envelopes(tmp_path) -> None:
    config = settings(*BUFFERED)
    run = run_with(config, tmp_path, {1: 1.0, 2: 1.3, 3: 2.9})
    up = [e for _, e in run.transport.received if e.kind == "update"]
    down = [e for _, e in run.transport.sent if e.kind == "plan"]
    assert sum(r["bytes_up"] for r in rounds_of(run)) == wire_bytes(up)
    told = sum(r["bytes_down"] for r in rounds_of(run))
    under_way = wire_bytes(down) - told
    assert 0 <= under_way <= 3 * max(map(lambda e: wire_bytes([e]), down))
    assert [e["round"] for e in events_of(run, "candidate")] == [5]


def test_a_buffered_federation_goes_on_after_its_last_commit(tmp_path) -> None:
    config = settings(*BUFFERED)
    devices = phones(config)
    run = federate(config, tmp_path, devices, delays_s={1: 1.0, 2: 1.0, 3: 1.5})

    def stop(record):
        if record["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(run, stop)
    again = federate(config, tmp_path, devices, delays_s={1: 1.0, 2: 1.0, 3: 1.5})
    run_federation(again)
    assert [r["round"] for r in rounds_of(again)] == [1, 2, 3, 4, 5]
    assert len(events_of(again, "candidate")) == 1
