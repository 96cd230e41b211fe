from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.formats.envelope import seal, unseal
from edge_runtime.formats.layout import Phase, effective_pairs
from edge_runtime.formats.messages import Decline, Plan, Reason, Score, Update
from server.federation import adapter_digest, open_federation
from server.fleet import simulated_layout
from server.rounds import MOST_ATTEMPTS, FederationError, run_federation
from tests.server.simulated import Clock, Wire, events_of, federate, phones, rounds_of, settings

EXACT = ("codec.up=fp32", "codec.down=fp32", "local.weight=sequences", "adapter.ranks=[2,4]", "rounds=6")
FLOAT32 = 2.0**-24


def replies(wire, number):
    """(start factors, update, delta) of every device that answered a round's plan."""
    found = []
    for node, envelope in wire.received:
        if envelope.kind == "update" and envelope.header["round"] == number:
            update, phone = unseal(envelope, Update), wire.devices[node]
            start, groups = phone.starts[update.plan_id], update.phase.groups
            delta = phone.layout.unflatten(np.frombuffer(envelope.payload, "<f4"), groups, update.rank)
            found.append((start, update, delta))
    return found


def products(layout, factors):
    """Module to lora_B lora_A in float64."""
    pairs = effective_pairs(layout, factors)
    return {module: b.astype(np.float64) @ a.astype(np.float64) for module, (a, b) in pairs.items()}


def trained(start, delta):
    return {name: value.astype(np.float64) + delta.get(name, 0.0) for name, value in start.items()}


def product_errors(config, tmp_path, ranks):
    """Per round: the largest distance of the adapter's product from the mean of the devices' products."""
    run, errors = federate(config, tmp_path, phones(config, ranks)), []

    def check(record):
        answered = replies(run.transport, record["round"])
        weights = [update.weight for _, update, _ in answered]
        theirs = [products(run.layout, trained(start, delta)) for start, _, delta in answered]
        ours = products(run.layout, run.state.factors())
        errors.append(
            max(
                np.abs(ours[module] - np.average([one[module] for one in theirs], axis=0, weights=weights)).max()
                for module in ours
            )
        )

    run_federation(run, check)
    assert len(run.record["versions"]) == 2 and len(set(run.transport.devices[1].starts)) == 6
    return errors


def test_alternating_rounds_give_exactly_the_mean_of_the_devices_products(tmp_path) -> None:
    errors = product_errors(settings(*EXACT), tmp_path, [4, 4, 4])
    assert max(errors) < FLOAT32 / 8 and len(errors) == 6


def test_training_both_factors_together_does_not(tmp_path) -> None:
    assert max(product_errors(settings(*EXACT, "phases.schedule=both"), tmp_path, [4, 4, 4])) > 1e-5


def test_every_rank_segment_is_the_mean_over_the_devices_that_trained_it(tmp_path) -> None:
    config = settings(*EXACT)
    run, before, seen = federate(config, tmp_path, phones(config, [2, 4, 4])), [], []
    before.append(run.state.factors())

    def check(record):
        answered, group = replies(run.transport, record["round"]), record["phase"]
        assert sorted(update.rank for _, update, _ in answered) == [2, 4, 4]
        suffix, now = f".lora_{group.upper()}", run.state.factors()
        for name, value in now.items():
            old = before[-1][name].astype(np.float64)
            if not name.endswith(suffix):
                np.testing.assert_array_equal(value, before[-1][name])
                continue
            for rows in (slice(0, 2), slice(2, 4)):
                cut = (lambda f, rows=rows: f[rows]) if group == "a" else (lambda f, rows=rows: f[:, rows])
                wide = [(delta[name], update.weight) for _, update, delta in answered if update.rank >= rows.stop]
                mean = np.average([cut(delta) for delta, _ in wide], axis=0, weights=[w for _, w in wide])
                np.testing.assert_allclose(cut(value), cut(old) + mean, rtol=0, atol=FLOAT32 / 4)
                seen.append(np.abs(mean).max())
        before.append(now)

    run_federation(run, check)
    assert min(seen) > 1e-3 and len(seen) == 6 * 2 * 2


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam", "nesterov"])
def test_a_segment_that_nobody_trained_stays_bit_for_bit(tmp_path, optimizer) -> None:
    config = settings(*EXACT, "phases.schedule=ffa", f"optimizer.name={optimizer}", "rounds=4", "cohort.quorum=1")
    devices = phones(config, [2, 4])
    wide = devices[2]
    devices[2] = lambda e: seal(Decline(Reason.BUSY, "", 0)) if e.header.get("round", 0) in (3, 4) else wide(e)
    run, kept = federate(config, tmp_path, devices), {}

    def check(record):
        for name, value in run.state.factors().items():
            kept.setdefault(record["round"], {})[name] = value[:, 2:].copy() if "lora_B" in name else value

    run_federation(run, check)
    for name in kept[2]:
        np.testing.assert_array_equal(kept[2][name], kept[4][name])
    assert any(np.abs(kept[2][name]).max() > 0 for name in kept[2] if "lora_B" in name)


ORDERS = ("codec.up=int8", "codec.down=int4", "adapter.ranks=[2,4]", "local.weight=sequences", "evaluation.every=1")


@pytest.mark.parametrize("schedule", ["alternating", "auto", "core"])
def test_the_order_of_arrival_changes_no_bit(tmp_path, schedule) -> None:
    config = settings(*ORDERS, f"phases.schedule={schedule}", "cohort.size=5", "optimizer.name=fedadam", "rounds=4")
    outcomes = []
    for seed in range(3):
        shuffle = np.random.default_rng(seed)
        delays_s = {node: float(shuffle.integers(0, 3)) for node in range(1, 6)}
        devices = phones(config, [2, 4, 4, 2, 4])
        wiring = {"delays_s": delays_s, "shuffle": shuffle, "at_once": 1 + seed} if seed else {}
        run = federate(config, tmp_path / str(seed), devices, **wiring)
        run_federation(run)
        outcomes.append((adapter_digest(run), rounds_of(run)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


# Quorum, surplus, attempts -----------------------------------------------------------------------------------------


def test_a_round_ends_with_the_wanted_number_of_updates(tmp_path) -> None:
    config = settings("cohort.size=2", "cohort.over_selection=2", "rounds=2")
    run = federate(config, tmp_path, phones(config, [None] * 4), delays_s={4: 5.0}, at_once=1)
    run_federation(run)
    for record in rounds_of(run):
        assert (record["planned"], record["folded"], record["lost"]) == (4, 2, 2)
    assert {d.last_outcome for d in run.devices.values()} == {"folded", "lost:surplus"}
    assert sum(d.folded for d in run.devices.values()) == sum(d.lost for d in run.devices.values()) == 4
    assert run.clock.now_s < 1006  # the greeting took 5 s; nobody waited for the slow one


def test_silent_devices_are_lost_at_the_deadline_and_no_sooner(tmp_path) -> None:
    config = settings("rounds=1", "cohort.shortest_deadline_s=40", "cohort.longest_deadline_s=40")
    devices = phones(config)
    first = devices[3]
    devices[3] = lambda envelope: first(envelope) if envelope.kind == "hello" else None
    run = federate(config, tmp_path, devices)
    run_federation(run)
    assert [(r["folded"], r["lost"]) for r in rounds_of(run)] == [(2, 1)]
    assert run.devices["simulated-00002"].last_outcome == "lost:deadline"
    assert 1040 <= run.clock.now_s < 1041


def test_an_attempt_without_quorum_is_abandoned_and_the_next_asks_other_devices_first(tmp_path) -> None:
    config = settings("rounds=1", "cohort.size=2", "cohort.quorum=2")
    devices = phones(config, [None] * 6)
    attempts = []

    def unwilling(device):
        def answer(envelope):
            if envelope.kind != "plan":
                return device(envelope)
            attempts.append(device.name)
            return device(envelope) if len(attempts) > 4 else seal(Decline(Reason.BUSY, "", 0))

        return answer

    run = federate(config, tmp_path, {node: unwilling(device) for node, device in devices.items()})
    run_federation(run)
    assert len(set(attempts)) == len(attempts) == 6
    abandoned = events_of(run, "abandoned")
    assert [(e["round"], e["attempt"]) for e in abandoned] == [(1, 0), (1, 1)]
    assert all("0 of 2 updates" in e["reason"] and "'busy': 2" in e["reason"] for e in abandoned)
    assert [(r["attempt"], r["folded"]) for r in rounds_of(run)] == [(2, 2)]
    ids = {e.header["plan_id"] for _, e in run.transport.sent if e.kind == "plan"}
    assert len(ids) == 6


def test_no_quorum_in_every_attempt_ends_the_run_and_a_later_one_goes_on(tmp_path) -> None:
    config = settings("rounds=1")
    devices = phones(config)
    never = {n: (lambda e, d=d: d(e) if e.kind == "hello" else seal(Decline(Reason.HEAT, "", 0))) for n, d in devices.items()}  # fmt: skip  # noqa: E501
    run = federate(config, tmp_path, never)
    with pytest.raises(FederationError, match=rf"round 1: no quorum in {MOST_ATTEMPTS} attempts .*'heat': 3"):
        run_federation(run)
    assert len(events_of(run, "abandoned")) == MOST_ATTEMPTS and not rounds_of(run)
    again = federate(config, tmp_path, devices)
    run_federation(again)
    assert [r["folded"] for r in rounds_of(again)] == [3]


def test_too_few_devices_are_waited_for_as_long_as_patience_lasts(tmp_path) -> None:
    config = settings("rounds=1", "cohort.patience_s=30")
    run = federate(config, tmp_path, {})
    with pytest.raises(FederationError, match="0 of 2 devices ready"):
        run_federation(run)
    assert 1000 + 30 * (MOST_ATTEMPTS + 1) <= run.clock.now_s < 1000 + 31 * (MOST_ATTEMPTS + 1)


def test_a_device_is_not_called_before_the_time_it_asked_for(tmp_path) -> None:
    config = settings("rounds=2", "cohort.patience_s=600")
    clock, calls = Clock(), []

    def tired(device):
        def answer(envelope):
            if envelope.kind == "plan":
                calls.append((clock(), device.name))
                if len(calls) <= 3:
                    return seal(Decline(Reason.BATTERY, "", 100.0 * len(calls)))
            return device(envelope)

        return answer

    config_devices = {node: tired(device) for node, device in phones(config).items()}
    wire = Wire(config_devices, clock)
    run = open_federation(config, simulated_layout(config), tmp_path, wire, clock=clock, sleep=clock.sleep)
    run_federation(run)
    first = {name: at for at, name in calls[:3]}
    pauses = {name: 100.0 * place for place, (_, name) in enumerate(calls[:3], 1)}
    assert all(at >= first[name] + pauses[name] for at, name in calls[3:])
    # Two make the quorum: the third, who rests longest, is not waited for.
    assert [r["folded"] for r in rounds_of(run)] == [2, 2] and clock() < 1300
    assert {name for _, name in calls[3:]} == {name for name, pause in pauses.items() if pause < 300}


@pytest.mark.parametrize("held", [False, True], ids=["at once", "after a round"])
def test_a_device_that_always_lacks_factors_gets_one_full_plan_a_round_and_hangs_nothing(tmp_path, held) -> None:
    config = settings("rounds=4", "phases.schedule=ffa")
    devices = phones(config)
    honest = devices[3]

    def forgetful(envelope):
        train = envelope.kind == "plan" and not (held and envelope.header["round"] == 1)
        return seal(Decline(Reason.FACTORS, "", 0)) if train else honest(envelope)

    devices[3] = forgetful
    run = federate(config, tmp_path, devices)
    run_federation(run)
    plans = [unseal(e, Plan) for node, e in run.transport.sent if node == 3 and e.kind == "plan"]
    per_round = [[p for p in plans if p.round == number] for number in (1, 2, 3, 4)]
    assert [len(p) for p in per_round] == ([1, 2, 1, 1] if held else [1, 1, 1, 1])
    assert all(len({p.plan_id for p in one}) == 1 for one in per_round)
    assert [r["declined"] for r in rounds_of(run)][1:] == [{"factors": 1}] * 3


def test_a_device_that_lost_its_factors_gets_them_again_under_the_same_plan(tmp_path) -> None:
    config = settings("rounds=4")
    devices = phones(config)
    run = federate(config, tmp_path, devices)

    def lose(record):
        if record["round"] == 3:
            devices[2].held = {}

    run_federation(run, lose)
    plans = [unseal(e, Plan) for node, e in run.transport.sent if node == 2 and e.kind == "plan"]
    left_out = [{part.group for part in plan.parts if part.version and not part.size_bytes} for plan in plans]
    assert [plan.round for plan in plans] == [1, 2, 3, 4, 4] and left_out[3:] == [{"b"}, set()]
    assert plans[3].plan_id == plans[4].plan_id
    assert [(r["folded"], r["declined"]) for r in rounds_of(run)] == [(3, {})] * 4


def test_an_out_of_date_norm_bound_starts_anew(tmp_path) -> None:
    config = settings("rounds=4", "phases.schedule=ffa", "gates.norm_factor=2", "local.steps=1")
    devices = phones(config)

    def faster(device):
        def answer(envelope):
            if envelope.kind == "plan" and envelope.header["round"] >= 3:
                envelope = seal_with(envelope, learning_rate=0.1)
            return device(envelope)

        return answer

    run = federate(config, tmp_path, {node: faster(device) for node, device in devices.items()})
    run_federation(run)
    assert len(rounds_of(run)) == 4
    events = events_of(run, "abandoned")
    assert [(e["round"], "bound on norms starts anew" in e["reason"]) for e in events] == [(3, True)]


def test_a_round_that_raises_held_out_loss_is_undone_as_if_it_had_never_been(tmp_path) -> None:
    gated = settings(
        "rounds=3", "optimizer.name=nesterov", "optimizer.average=6", "gates.loss_rise=0.5", "evaluation.every=1"
    )
    run_federation(quiet := federate(gated, tmp_path / "quiet", phones(gated)))
    devices = phones(gated)

    def worse_once(device):
        asked = []

        def answer(envelope):
            # Of round 1: first its own evaluation, then the gate's of round 2.
            asked.append((envelope.kind, envelope.header.get("round")))
            bad = asked[-1] == ("scoreplan", 1) and asked.count(("scoreplan", 1)) == 2
            return seal(Score(1, 1e6, 1)) if bad else device(envelope)

        return answer

    run = federate(gated, tmp_path / "undone", {node: worse_once(device) for node, device in devices.items()})
    run_federation(run)
    assert [(e["round"], e["attempt"], "'loss': 3" in e["reason"]) for e in events_of(run, "abandoned")] == [
        (2, 0, True)
    ]
    assert [r["attempt"] for r in rounds_of(run)] == [0, 1, 0]
    assert adapter_digest(run) == adapter_digest(quiet)
    mine, theirs = run.optimizer.state(), quiet.optimizer.state()
    assert {name: value.tobytes() for name, value in mine.items()} == {n: v.tobytes() for n, v in theirs.items()}
    # Devices hold what was undone: its version is never used for anything else.
    assert [r["versions"]["b"] for r in rounds_of(run)][:2] == [1, 3]


def seal_with(envelope, **fields):
    return type(envelope)(envelope.kind, dict(envelope.header) | fields, envelope.payload)


def test_a_factor_is_trained_for_as_many_rounds_in_a_row_as_configured(tmp_path) -> None:
    config = settings("rounds=7", "phases.warmup_rounds=1", "phases.turn_rounds=2")
    run = federate(config, tmp_path, phones(config))
    run_federation(run)
    assert [r["phase"] for r in rounds_of(run)] == ["b", "a", "a", "b", "b", "a", "a"]


def test_every_phase_of_the_schedule_is_in_the_ledger_with_its_reason(tmp_path) -> None:
    config = settings("rounds=5")
    run = federate(config, tmp_path, phones(config))
    run_federation(run)
    assert [(r["phase"], r["phase_reason"]) for r in rounds_of(run)] == [
        ("b", "warm-up"), ("b", "warm-up"), ("a", "1 of 1 in turn"), ("b", "1 of 1 in turn"), ("a", "1 of 1 in turn"),
    ]  # fmt: skip
    assert [r["versions"] for r in rounds_of(run)] == [
        {"a": 0, "b": 1}, {"a": 0, "b": 2}, {"a": 3, "b": 2}, {"a": 3, "b": 4}, {"a": 5, "b": 4},
    ]  # fmt: skip
    assert Phase(run.record["phase"]) is run.drift.phase
