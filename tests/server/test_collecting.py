from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.formats.envelope import Envelope, seal, sha256, unseal
from edge_runtime.formats.messages import Decline, Plan, Reason, Score, Update
from server.aggregation import assign_groups
from server.federation import adapter_digest
from server.rounds import run_federation
from tests.server.simulated import events_of, federate, phones, rounds_of, settings, wire_bytes

LIES = ("phases.schedule=ffa", "codec.up=fp32", "local.weight=sequences", "gates.norm_factor=3", "cohort.size=4")


def altered(reply, payload=None, **fields):
    """An update with other fields, or another payload under its true digest."""
    payload = reply.payload if payload is None else payload
    return seal(replace(unseal(reply, Update), payload_sha256=sha256(payload), **fields), payload)


def values_of(reply):
    return np.frombuffer(reply.payload, "<f4").copy()


def with_first(value):
    def lie(reply, old):
        values = values_of(reply)
        values[0] = value
        return altered(reply, values.tobytes())

    return lie


def header(reply, **fields):
    return Envelope("update", dict(reply.header) | fields, reply.payload)


NOISE = np.random.default_rng(1).bytes(999)
LIARS = {
    "NaN": ("finite", with_first(np.nan)),
    "infinity": ("finite", with_first(-np.inf)),
    "a value of 8": ("range", with_first(8.0)),
    "a huge norm": ("norm", lambda reply, old: altered(reply, (values_of(reply) * 20).tobytes())),
    "a byte short": ("shape", lambda reply, old: altered(reply, reply.payload[:-1])),
    "a value too many": ("shape", lambda reply, old: altered(reply, reply.payload + bytes(4))),
    "no payload": ("shape", lambda reply, old: altered(reply, b"")),
    "another payload": ("digest", lambda reply, old: replace(reply, payload=bytes(len(reply.payload)))),
    "another base": ("base", lambda reply, old: altered(reply, base_digest="1" * 64)),
    "another layout": ("layout", lambda reply, old: altered(reply, layout_digest="1" * 64)),
    "another phase": ("phase", lambda reply, old: header(reply, phase="a")),
    "another rank": ("rank", lambda reply, old: altered(reply, rank=2)),
    "another codec": ("codec", lambda reply, old: header(reply, codec="int8")),
    "more weight than allowed": ("weight", lambda reply, old: altered(reply, weight=65)),
    "no weight": ("malformed", lambda reply, old: header(reply, weight=0)),
    "an old reply": ("stale", lambda reply, old: old),
    "an old reply as a new one": ("replay", lambda reply, old: header(old, round=reply.header["round"])),
    "another message": ("kind", lambda reply, old: seal(Score(3, 1.0, 1))),
    "no message of the protocol": ("kind", lambda reply, old: Envelope("malformed", {})),
    "an update without fields": ("malformed", lambda reply, old: Envelope("update", {}, b"x")),
    "one field too many": ("malformed", lambda reply, old: header(reply, path="/etc/passwd")),
    "random bytes": ("malformed", lambda reply, old: Envelope("update", {"\x00": 1}, NOISE)),
    "a decline without fields": ("malformed", lambda reply, old: Envelope("decline", {"reason": ["factors"]})),
}  # fmt: skip


class Liar:
    """Honest for two rounds, so that it has an old reply and the server a bound on norms."""

    def __init__(self, phone, lie) -> None:
        self.phone, self.lie, self.old = phone, lie, None

    def __call__(self, envelope):
        reply = self.phone(envelope)
        if envelope.kind != "plan":
            return reply
        if envelope.header["round"] < 3:
            self.old = reply
            return reply
        return self.lie(reply, self.old)


def run_with_liar(config, directory, lie, ranks=(4, 4, 4, 4)):
    devices = phones(config, ranks)
    devices[4] = Liar(devices[4], lie)
    run = federate(config, directory, devices)
    run_federation(run)
    return run


@pytest.fixture(scope="module")
def declining(tmp_path_factory):
    """The adapter when the fourth device declines where it would have lied."""
    config = settings(*LIES, "adapter.ranks=[2,4]", "rounds=4")
    directory = tmp_path_factory.mktemp("declining")
    run = run_with_liar(config, directory, lambda reply, old: seal(Decline(Reason.BUSY, "", 0)))
    assert [r["declined"] for r in rounds_of(run)] == [{}, {}, {"busy": 1}, {"busy": 1}]
    return config, adapter_digest(run)


@pytest.mark.parametrize(("reason", "lie"), LIARS.values(), ids=LIARS)
def test_a_lie_is_refused_by_its_name_and_moves_no_bit(tmp_path, declining, reason, lie) -> None:
    config, honest = declining
    run = run_with_liar(config, tmp_path, lie)
    assert [(r["folded"], r["refused"]) for r in rounds_of(run)] == [(4, {})] * 2 + [(3, {reason: 1})] * 2
    assert adapter_digest(run) == honest
    liar = run.devices["simulated-00003"]
    assert (liar.refused, liar.last_outcome, liar.folded) == (2, f"refused:{reason}", 2)
    assert not events_of(run, "abandoned")


def test_a_hostile_scale_is_refused(tmp_path) -> None:
    config = settings("phases.schedule=ffa", "cohort.size=4", "rounds=3")
    run = run_with_liar(config, tmp_path, lambda reply, old: altered(reply, b"\x80\xff" + reply.payload[2:]))
    assert [r["refused"] for r in rounds_of(run)] == [{}, {}, {"scale": 1}]


def test_an_update_sent_twice_in_a_round_is_counted_once(tmp_path) -> None:
    config = settings("rounds=1")
    devices = phones(config)
    run = federate(config, tmp_path, devices)
    pull = run.transport.pull

    def twice(ids):
        arrivals = pull(ids)
        return [*arrivals, *arrivals]

    run.transport.pull = twice
    run_federation(run)
    assert [r["folded"] for r in rounds_of(run)] == [3]


# A robust mean -----------------------------------------------------------------------------------------------------


def robust(tmp_path, name, method, sign):
    config = settings(
        "cohort.size=9", "cohort.quorum=7", f"robust.method={method}", "robust.groups=3", "phases.schedule=ffa",
        "codec.up=fp32", "codec.down=fp32", "rounds=1",
    )  # fmt: skip
    devices = phones(config, [4] * 9)
    honest = devices[5]
    devices[5] = lambda e: honest(e) if sign > 0 or e.kind != "plan" else altered(
        reply := honest(e), (values_of(reply) * sign).tobytes()
    )  # fmt: skip
    run = federate(config, tmp_path / name, devices)
    run_federation(run)
    vectors = {node: values_of(e).astype(np.float64) for node, e in run.transport.received if e.kind == "update"}
    return run, vectors


def test_one_liar_of_nine_moves_the_median_of_means_far_less_than_the_mean(tmp_path) -> None:
    moved = {}
    for method in ("none", "group_median"):
        truth, lied = (robust(tmp_path, f"{method}{sign}", method, sign)[0].state.values["b"] for sign in (1, -100))
        moved[method] = float(np.linalg.norm(lied.astype(np.float64) - truth))
    assert moved["none"] > 20 * moved["group_median"] > 0


def test_the_median_of_means_is_that_of_the_groups(tmp_path) -> None:
    run, vectors = robust(tmp_path, "one", "group_median", -100)
    place = assign_groups(sorted(vectors), 3, run.config.seed + 1)
    means = [np.mean([vectors[node] for node in vectors if place[node] == group], axis=0) for group in range(3)]
    np.testing.assert_allclose(run.state.values["b"], np.median(means, axis=0), rtol=0, atol=2.0**-26)


def test_groups_that_nobody_answered_for_count_against_the_median(tmp_path) -> None:
    """Two of five groups are no majority: the factors stay, and the attempt has no mean of a minority."""
    config = settings(
        "cohort.size=5", "cohort.quorum=5", "cohort.over_selection=4", "robust.method=group_median", "robust.groups=5",
        "phases.schedule=ffa", "rounds=1",
    )  # fmt: skip
    devices = phones(config, [4] * 20)
    place = assign_groups(list(devices), 5, config.seed + 1)
    # Only groups 0 and 1 answer in time; the wanted five replies come from them alone.
    slow = {node: 20.0 for node in devices if place[node] > 1}
    greeted = federate(config, tmp_path, devices)
    greeted.transport.delays_s = {}
    push = greeted.transport.push

    def push_late(messages, ttl_s, group):
        greeted.transport.delays_s = slow if group.startswith("round") else {}
        return push(messages, ttl_s, group)

    greeted.transport.push = push_late
    run_federation(greeted)
    assert rounds_of(greeted)[0]["folded"] == 5
    assert not greeted.state.values["b"].any()


# Held-out loss -----------------------------------------------------------------------------------------------------


def scored(config, directory, scores, **wiring):
    """A round whose devices answer a score plan as given."""

    def answering(device, score):
        return lambda e: score(e) if e.kind == "scoreplan" and e.header["round"] else device(e)

    devices = phones(config, [4] * len(scores))
    devices = {node: answering(device, score) for (node, device), score in zip(devices.items(), scores, strict=True)}
    run = federate(config, directory, devices, **wiring)
    run_federation(run)
    return rounds_of(run)[0]["held_out_loss"]


def test_held_out_loss_is_the_mean_over_the_tokens_of_those_who_answered_what_was_asked(tmp_path) -> None:
    config = settings("rounds=1", "evaluation.every=1", "cohort.size=7", "cohort.shortest_deadline_s=5")

    def gone(envelope):
        raise ConnectionError

    answers = [
        lambda e: seal(Score(1, 30.0, 10)),
        lambda e: seal(Score(1, 10.0, 30)),
        lambda e: seal(Score(0, 9e9, 1)),  # of another round
        lambda e: seal(Decline(Reason.HEAT, "", 0)),
        lambda e: Envelope("score", {"round": 1, "loss_sum": -1.0, "tokens": 1}),
        lambda e: None,
        gone,
    ]
    assert scored(config, tmp_path, answers) == 40.0 / 40
    assert scored(config, tmp_path / "none", [lambda e: seal(Decline(Reason.HEAT, "", 0))] * 7) is None


def test_held_out_loss_does_not_depend_on_the_order_of_answers(tmp_path) -> None:
    config = settings("rounds=1", "evaluation.every=1")
    # 0.06 is less than half of what 1e15 can be told apart by; two of them together are more.
    answers = [lambda e: seal(Score(1, 1e15, 1)), *[lambda e: seal(Score(1, 0.06, 0))] * 2]
    late = {seed: {node: float((node + seed) % 3) for node in (1, 2, 3)} for seed in range(3)}
    losses = {scored(config, tmp_path / str(seed), answers, delays_s=late[seed]) for seed in late}
    assert len(losses) == 1


# What is counted and acknowledged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluated", [0, 1])
def test_bytes_are_those_of_the_envelopes(tmp_path, evaluated) -> None:
    config = settings(
        "rounds=4", f"evaluation.every={evaluated}", "cohort.size=4", "cohort.quorum=2", "codec.down=int4"
    )
    devices = phones(config, [4] * 4)
    forgetful = devices[2]
    answers = {3: lambda e: seal(Decline(Reason.HEAT, "warm", 0)), 4: lambda e: Envelope("update", {"a": 1}, b"123")}

    def answer(envelope):
        forgetful.held = {}
        return forgetful(envelope)

    devices[2] = answer
    for node, lie in answers.items():
        honest = devices[node]
        devices[node] = lambda e, honest=honest, lie=lie: lie(e) if e.kind == "plan" else honest(e)
    run = federate(config, tmp_path, devices)
    counted, totals = [], {"up": 0, "down": 0}

    def check(record):
        sent = [e for _, e in run.transport.sent if e.kind in ("plan", "scoreplan")]
        down = wire_bytes([e for e in sent if e.header["round"] > 0])
        up = wire_bytes([e for _, e in run.transport.received if e.kind != "profile"]) - baseline(run)
        counted.append((record["bytes_up"], record["bytes_down"]))
        assert counted[-1] == (up - totals["up"], down - totals["down"])
        totals.update(up=up, down=down)

    run_federation(run, check)
    assert len(counted) == 4 and len({down for _, down in counted}) > 1


def baseline(run):
    return wire_bytes([e for _, e in run.transport.received if e.kind == "score" and e.header["round"] == 0])


def test_a_folded_reply_is_acknowledged_in_the_next_plan_and_only_then(tmp_path) -> None:
    config = settings("rounds=5", "cohort.size=3")
    devices = phones(config)
    honest = devices[2]
    devices[2] = lambda e: (
        seal(Decline(Reason.BUSY, "", 0)) if e.kind == "plan" and e.header["round"] == 2
        else altered(honest(e), codec="fp32") if e.kind == "plan" and e.header["round"] == 4
        else honest(e)
    )  # fmt: skip
    run = federate(config, tmp_path, devices)
    run_federation(run)
    plans = {n: [unseal(e, Plan) for node, e in run.transport.sent if node == n and e.kind == "plan"] for n in (1, 2)}
    ids = {n: [p.plan_id for p in plans[n]] for n in plans}
    assert [p.folded for p in plans[1]] == ["", *ids[1][:4]]
    assert [p.folded for p in plans[2]] == ["", ids[2][0], ids[2][0], ids[2][2], ids[2][2]]
    assert [r["refused"] for r in rounds_of(run)][3] == {"codec": 1}


def test_error_feedback_loses_nothing_of_what_devices_learned(tmp_path) -> None:
    """With int4 upwards, what was folded plus what devices still keep is what they trained, to float32 rounding."""
    config = settings("rounds=6", "phases.schedule=ffa", "codec.up=int4", "codec.down=fp32", "cohort.size=1", "cohort.quorum=1")  # fmt: skip  # noqa: E501
    devices = phones(config, [4])
    phone, true = devices[1], []
    descend = phone._train

    def train(envelope, plan):
        reply = descend(envelope, plan)
        factors = {name: value.copy() for name, value in phone.starts[plan.plan_id].items()}
        start = phone.layout.flatten(factors, ("b",), 4)
        for _ in range(plan.steps):
            phone._descend(factors, ("b",), plan.learning_rate)
        true.append(phone.layout.flatten(factors, ("b",), 4).astype(np.float64) - start)
        return reply

    phone._train = train
    run = federate(config, tmp_path, devices)
    run_federation(run)
    kept = phone.pending[2].astype(np.float64)
    assert np.abs(kept).max() > 1e-5 and len(true) == 6
    np.testing.assert_allclose(run.state.values["b"] + kept, np.sum(true, axis=0), rtol=0, atol=6 * 2.0**-28)
