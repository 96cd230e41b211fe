from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.codec import Codec, encode
from edge_runtime.formats.envelope import Envelope, envelope_from_text, header_text, seal, sha256
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from edge_runtime.formats.messages import Decline, Reason, Update
from server.aggregation import Accumulator
from server.gates import Admitted, Expected, NormGate, Refusal, admit

BASE, OTHER, PLAN_ID = "ab" * 32, "cd" * 32, "01" * 32
LAYOUT = AdapterLayout(BASE, (Module("m.k", 12, 9), Module("m.q", 10, 16)), (2, 4, 8), 16.0)
EXPECTED = Expected(LAYOUT, 3, PLAN_ID, Phase.B, 4, Codec.FP32, 10, 2.0)
VECTOR = np.random.default_rng(0).normal(scale=0.1, size=LAYOUT.size(("b",), 4)).astype(np.float32)


def reply(vector=VECTOR, codec=Codec.FP32, payload=None, **changed):
    """A good answer to EXPECTED, but for what is changed."""
    if payload is None:
        payload = encode(vector, LAYOUT.segment_sizes(("b",), 4), codec)
    update = Update(
        PLAN_ID, LAYOUT.digest, BASE, 3, Phase.B, 4, codec, 10, 5, 640, 3.5, 3.2, 1.0, 0.1, sha256(payload)
    )  # fmt: skip
    return seal(replace(update, **changed), payload)


def floats(*values):
    """A payload of which the first values are these."""
    vector = VECTOR.copy()
    vector[: len(values)] = values
    return vector.astype("<f4").tobytes()


@pytest.mark.parametrize("codec", list(Codec))
def test_a_good_update_is_admitted_as_it_decodes(codec) -> None:
    admitted = admit(reply(codec=codec), replace(EXPECTED, codec=codec))
    assert isinstance(admitted, Admitted)
    assert admitted.update.weight == 10 and admitted.vector.dtype == np.float32
    assert np.abs(admitted.vector - VECTOR).max() < 0.06
    assert admitted.norm == pytest.approx(float(np.linalg.norm(admitted.vector.astype(np.float64))), rel=1e-14)
    Accumulator(LAYOUT, ("b",)).fold(admitted.vector, 4, admitted.update.weight)


REFUSED = [
    (Refusal.KIND, seal(Decline(Reason.BUSY, "", 1.0)), {}),
    (Refusal.KIND, Envelope("plan", dict(reply().header), reply().payload), {}),
    (Refusal.KIND, Envelope("Update", dict(reply().header), reply().payload), {}),
    (Refusal.MALFORMED, Envelope("update", {}, reply().payload), {}),
    (Refusal.MALFORMED, Envelope("update", dict(reply().header) | {"extra": 1}, reply().payload), {}),
    (Refusal.MALFORMED, reply(weight=0), {}),
    (Refusal.MALFORMED, reply(loss_after=math.nan), {}),
    (Refusal.MALFORMED, reply(norm=10**400), {}),
    (Refusal.STALE, reply(round=2), {}),
    (Refusal.STALE, reply(round=4, plan_id=OTHER), {}),
    (Refusal.REPLAY, reply(plan_id=OTHER), {}),
    (Refusal.DUPLICATE, reply(), {"answered": True}),
    (Refusal.BASE, reply(base_digest=OTHER), {}),
    (Refusal.LAYOUT, reply(layout_digest=OTHER), {}),
    (Refusal.PHASE, reply(phase=Phase.A), {}),
    (Refusal.RANK, reply(rank=8), {}),
    (Refusal.RANK, reply(rank=2), {}),
    (Refusal.CODEC, reply(codec=Codec.FP16), {}),
    (Refusal.WEIGHT, reply(weight=11), {}),
    (Refusal.DIGEST, reply(payload_sha256=OTHER), {}),
    (Refusal.DIGEST, replace(reply(), payload=reply().payload[:-1]), {}),
    (Refusal.SHAPE, reply(payload=reply().payload[:-1]), {}),
    (Refusal.SHAPE, reply(payload=reply().payload + b"\0\0\0\0"), {}),
    (Refusal.SHAPE, reply(payload=b""), {}),
    (Refusal.SCALE, reply(codec=Codec.INT8, payload=b"\x80\x7f" + reply(codec=Codec.INT8).payload[2:]), {}),
    (Refusal.SCALE, reply(codec=Codec.INT4, payload=b"\x80\xbf" + reply(codec=Codec.INT4).payload[2:]), {}),
    (Refusal.FINITE, reply(codec=Codec.INT8, payload=b"\x7f\x7f" + reply(codec=Codec.INT8).payload[2:]), {}),
    (Refusal.FINITE, reply(payload=floats(math.nan)), {}),
    (Refusal.FINITE, reply(payload=floats(math.inf)), {}),
    (Refusal.FINITE, reply(payload=floats(1, -math.inf)), {}),
    (Refusal.RANGE, reply(payload=floats(8.0)), {}),
    (Refusal.RANGE, reply(payload=floats(1e30)), {}),
    (Refusal.RANGE, reply(payload=floats(0, -8.0)), {"max_norm": 0.0}),
    (Refusal.NORM, reply(VECTOR * 10, norm=0.001), {}),
    (Refusal.NORM, reply(payload=floats(7.99)), {}),
]  # fmt: skip


@pytest.mark.parametrize(("refusal", "envelope", "asked"), REFUSED, ids=lambda value: getattr(value, "value", ""))
def test_every_fault_has_its_name(refusal, envelope, asked) -> None:
    codec = {"int8": Codec.INT8, "int4": Codec.INT4}.get(envelope.header.get("codec"), Codec.FP32)
    assert admit(envelope, replace(EXPECTED, codec=codec, **asked)) is refusal


def test_every_name_has_its_fault() -> None:
    tested = {refusal for refusal, _, _ in REFUSED}
    assert set(Refusal) - tested == {Refusal.VERSION, Refusal.LOSS}  # those are the round loop's


HEADER_FAULTS = [
    (Refusal.STALE, {"round": 2}),
    (Refusal.REPLAY, {"plan_id": OTHER}),
    (Refusal.BASE, {"base_digest": OTHER}),
    (Refusal.LAYOUT, {"layout_digest": OTHER}),
    (Refusal.PHASE, {"phase": Phase.A}),
    (Refusal.RANK, {"rank": 8}),
    (Refusal.CODEC, {"codec": Codec.FP16}),
    (Refusal.WEIGHT, {"weight": 11}),
    (Refusal.DIGEST, {"payload_sha256": OTHER}),
    (Refusal.SHAPE, {"payload": b"short"}),
]


@pytest.mark.parametrize("pair", [*itertools.combinations(HEADER_FAULTS, 2)], ids=lambda p: f"{p[0][0]}-{p[1][0]}")
def test_of_two_faults_the_more_general_one_is_named(pair) -> None:
    (first, one), (_, other) = pair
    assert admit(reply(**(other | one)), EXPECTED) is first


def test_bounds_are_inclusive_for_weight_and_norm_and_exclusive_for_values() -> None:
    norm = float(np.linalg.norm(VECTOR.astype(np.float64)))
    assert isinstance(admit(reply(), replace(EXPECTED, max_norm=norm * (1 + 1e-12))), Admitted)
    assert admit(reply(), replace(EXPECTED, max_norm=norm * (1 - 1e-12))) is Refusal.NORM
    one = np.zeros_like(VECTOR)
    one[0] = 2.0
    assert isinstance(admit(reply(one), EXPECTED), Admitted)
    below = reply(payload=floats(np.nextafter(np.float32(8), np.float32(0))))
    assert isinstance(admit(below, replace(EXPECTED, max_norm=0.0)), Admitted)


def test_the_header_does_not_decide_the_norm() -> None:
    assert isinstance(admit(reply(norm=1e12), EXPECTED), Admitted)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, BASE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


def judge(envelope, codec):
    """The one promise: an answer, not an exception; and what is admitted can be folded."""
    answer = admit(envelope, replace(EXPECTED, codec=codec))
    if isinstance(answer, Refusal):
        return
    assert np.isfinite(answer.vector).all() and answer.norm <= 2.0
    Accumulator(LAYOUT, ("b",)).fold(answer.vector, 4, answer.update.weight)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*reply().header, "x"]), json_values, max_size=3),
    st.text(max_size=6),
    st.booleans(),
)
def test_no_header_raises(odd, kind, keep) -> None:
    judge(Envelope("update" if keep else kind, dict(reply().header) | odd, reply().payload), Codec.FP32)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(Codec)), st.binary(max_size=300), st.integers(0, 400), st.booleans())
def test_no_payload_raises(codec, noise, place, honest) -> None:
    """Bytes of a good payload overwritten, lengthened or cut, with and without the digest that fits."""
    good = reply(codec=codec)
    payload = good.payload[:place] + noise + good.payload[place + len(noise) :]
    judge(reply(codec=codec, payload=payload) if honest else replace(good, payload=payload), codec)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 600), st.integers(1, 255), st.binary(max_size=40))
def test_no_message_raises(place, flip, garbage) -> None:
    text = bytearray(header_text(reply()).encode())
    text[place % len(text)] ^= flip
    for raw in (bytes(text), garbage, bytes(text[:place])):
        try:
            envelope = envelope_from_text(raw.decode("latin-1"), reply().payload)
        except MessageError:
            continue
        judge(envelope, Codec.FP32)


def test_a_header_nested_beyond_the_stack_is_malformed() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for field in reply().header:
        assert admit(Envelope("update", dict(reply().header) | {field: nested}), EXPECTED) is Refusal.MALFORMED


def test_the_norm_gate_follows_the_median() -> None:
    gate = NormGate(factor=3.0, floor=0.5)
    gate.accept("b", [1.0, 2.0, 1.0, 50.0])
    assert gate.bound("b") == 0.0  # four are too few
    gate.accept("b", [3.0])
    assert gate.bound("b") == 6.0  # median of 1 1 2 3 50
    assert gate.bound("a") == 0.0
    gate.accept("a", [0.01] * 5)
    assert gate.bound("a") == 0.5 and gate.bound("b") == 6.0


def test_a_fixed_bound_holds_from_the_start_and_beside_the_running_one() -> None:
    gate = NormGate(3.0, 0.0, max_norm=5.0)
    assert gate.bound("b") == 5.0
    gate.accept("b", [1.0] * 5)
    assert gate.bound("b") == 3.0
    gate.accept("b", [100.0] * 20)
    assert gate.bound("b") == 5.0


def test_without_a_factor_there_is_no_running_bound() -> None:
    gate = NormGate(0.0, 0.5)
    gate.accept("b", [1.0] * 10)
    assert gate.bound("b") == 0.0


def test_old_rounds_are_forgotten_whole() -> None:
    gate = NormGate(1.0, 0.0)
    gate.accept("b", [1.0] * 40)
    gate.accept("b", [2.0] * 63)
    assert gate.state() == {"b": [[1.0] * 40, [2.0] * 63]} and gate.bound("b") == 2.0
    gate.accept("b", [3.0])
    assert gate.state() == {"b": [[2.0] * 63, [3.0]]}
    gate.accept("b", [])
    assert gate.state() == {"b": [[2.0] * 63, [3.0]]}


def test_the_bound_depends_on_no_order_and_a_large_round_keeps_its_median() -> None:
    generator = np.random.default_rng(2)
    norms = generator.lognormal(size=1000).tolist()
    gates = []
    for order in (norms, norms[::-1], sorted(norms)):
        gate = NormGate(2.0, 0.0)
        gate.accept("b", order)
        gates.append(gate)
    assert gates[0].state() == gates[1].state() == gates[2].state()
    assert sum(map(len, gates[0].state()["b"])) == 64
    assert gates[0].bound("b") == pytest.approx(2 * np.median(norms), rel=0.02)


def test_a_large_round_is_thinned_evenly() -> None:
    gate = NormGate(1.0, 0.0)
    gate.accept("b", map(float, range(128)))
    assert gate.state() == {"b": [[float(norm) for norm in range(1, 128, 2)]]}


def test_a_minority_that_grows_round_by_round_does_not_drag_the_bound_along() -> None:
    gate = NormGate(3.0, 0.0)
    gate.accept("b", [1.0] * 10)
    for _ in range(50):
        bound = gate.bound("b")
        gate.accept("b", [1.0] * 7 + [bound] * 3)
    assert gate.bound("b") == 3.0


def test_the_norm_gate_continues_from_json() -> None:
    gate = NormGate(3.0, 0.1)
    for batch in ([1, 2.5], [0.1] * 30, [7.0] * 40):
        gate.accept("b", batch)
        gate.accept("a", [value / 3 for value in batch])
    other = NormGate(3.0, 0.1)
    other.load_state(json.loads(json.dumps(gate.state())))
    for one in (gate, other):
        one.accept("b", [0.3] * 9)
    assert other.state() == gate.state() and other.bound("b") == gate.bound("b")
