from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest

from edge_runtime.formats.codec import Codec
from edge_runtime.formats.envelope import MAX_PAYLOAD_BYTES, Envelope, envelope_from_text, header_text, seal, unseal
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from edge_runtime.formats.messages import (
    MAX_MODULES,
    MAX_ROUND,
    MAX_WEIGHT,
    Decline,
    Hello,
    MaskPlan,
    Part,
    Plan,
    Profile,
    Reason,
    Score,
    ScorePlan,
    Update,
    hello,
)

SHA = "0123456789abcdef" * 4
LAYOUT = AdapterLayout(
    SHA, (Module("model.layers.0.q_proj", 64, 32), Module("model.layers.1.q_proj", 64, 32)), (4, 8), 16.0
)
MASK = MaskPlan(SHA, 24, (1e-3, 2e-3), 1000)
PART = Part("a", 3, Codec.INT8, 100)
PLAN = Plan(
    "demo", SHA, 3, SHA, Phase.B, 8, 10, 4, 128, 1e-3, 2e-3, 0.0, 1, 2, Codec.INT8, 0.9, 10, 1.0, 0.0, "", 60.0,
    None, (PART,), SHA,
)  # fmt: skip
UPDATE = Update(SHA, SHA, SHA, 3, Phase.B, 8, Codec.INT8, 10, 10, 5120, 3.5, 3.25, 0.5, 1.25, SHA)
MESSAGES = [
    hello("demo", LAYOUT),
    Profile("phone-1", SHA, SHA, SHA, 8, "onnx", (128, 256), 100, 0.5),
    PLAN,
    replace(PLAN, mask=MASK, folded=SHA),
    UPDATE,
    Decline(Reason.BATTERY, "12 % left", 600.0),
    ScorePlan("demo", SHA, 0, 8, 1, 128, 32, (PART, replace(PART, group="b")), SHA),
    Score(3, 1234.5, 400),
]

# Field values that no message may hold, by the kind of the field.
BAD_SHA = (SHA[:-1], SHA + "0", SHA.upper(), "g" * 64, SHA + "\n", 0, None)
BAD_NAME = ("", "-a", ".a", "../x", "a/b", "a b", "a" * 65, "a\n", 1)
BAD_COUNT = (True, 1.0, "1", None, -1)
BAD_NUMBER = (math.nan, math.inf, -math.inf, True, "1", None, -1e-9)
BAD = {
    "federation": BAD_NAME,
    "device": BAD_NAME,
    "trainer": BAD_NAME,
    "public_key": BAD_SHA,
    "base_digest": BAD_SHA,
    "layout_digest": BAD_SHA,
    "plan_id": BAD_SHA,
    "payload_sha256": BAD_SHA,
    "session": BAD_SHA,
    "folded": (*BAD_SHA, "0"),
    "protocol": (*BAD_COUNT, 0, 2**16 + 1),
    "round": (*BAD_COUNT, MAX_ROUND + 1),
    "version": (*BAD_COUNT, MAX_ROUND + 1),
    "rank": (*BAD_COUNT, 0, 1025),
    "steps": (*BAD_COUNT, 100_001),
    "batch_sequences": (*BAD_COUNT, 0, 4097),
    "sequence_tokens": (*BAD_COUNT, 7, 2**17 + 1),
    "most_sequences": (*BAD_COUNT, 0, 4097),
    "seed": (*BAD_COUNT, 2**63),
    "data_seed": (*BAD_COUNT, 2**63),
    "weight": (*BAD_COUNT, 0, MAX_WEIGHT + 1),
    "weight_cap": (*BAD_COUNT, 0, MAX_WEIGHT + 1),
    "tokens": (*BAD_COUNT, 2**53 + 1),
    "sequences": (*BAD_COUNT, 2**31 + 1),
    "size_bytes": (*BAD_COUNT, MAX_PAYLOAD_BYTES + 1),
    "bits": (*BAD_COUNT, 7, 33),
    "largest_code": (*BAD_COUNT, 0, 2**23 + 1),
    "phase": ("A", "ab", "", None, 1, ["a"]),
    "codec": ("INT8", "int2", "", None, 8),
    "reason": ("BATTERY", "tired", "", None),
    "group": ("A", "ab", "a|b", "", "core ", None),
    "detail": ("a\nb", "ü", "x" * 201, None, "\x1b[31m"),
    "learning_rate": (*BAD_NUMBER, 10.1),
    "learning_rate_b": (*BAD_NUMBER, 10.1),
    "weight_decay": (*BAD_NUMBER, 1.1),
    "residual_decay": (*BAD_NUMBER, 1.1),
    "clip_norm": (*BAD_NUMBER, 1.1e6),
    "noise_std": (*BAD_NUMBER, 1.1e6),
    "deadline_s": (*BAD_NUMBER, 0.5, 30 * 86400 + 1),
    "retry_after_s": (*BAD_NUMBER, 30 * 86400 + 1),
    "step_s": (*BAD_NUMBER, 86401),
    "loss_before": (*BAD_NUMBER, 1.1e6),
    "loss_after": (*BAD_NUMBER, 1.1e6),
    "loss_sum": (*BAD_NUMBER, 1.1e15),
    "norm": (*BAD_NUMBER, 1.1e12),
    "alpha": (*BAD_NUMBER, 0, 1.1e6),
    "ranks": (None, 4, "4", [0], [1025], [1.0], [1] * 17, {"4": 1}),
    "buckets": (None, 128, [7], [2**17 + 1], [128] * 17),
    "scales": (None, 1.0, [0], [math.inf], [1e7], [1.0] * 17),
    "modules": (None, "m", {}, ["m"], [["m", 1]] * (MAX_MODULES + 1), [["m", 1, 1, 1]]),
    "parts": (None, [None], [{}], [{"group": "a"}], "a"),
    "mask": (0, False, [], {}, {"session": SHA}),
}
FIELDS = [(message, field.name) for message in MESSAGES for field in fields(message)]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message) -> None:
    text = header_text(seal(message, b"x"))
    received = unseal(envelope_from_text(text, b"x"), type(message))
    if isinstance(message, Hello):
        assert received.layout() == message.layout() == LAYOUT
    else:
        assert received == message
    assert header_text(seal(received)) == text


def test_an_updates_header_is_fixed() -> None:
    assert header_text(seal(UPDATE)) == (
        f'["update",{{"base_digest":"{SHA}","codec":"int8","layout_digest":"{SHA}","loss_after":3.25,'
        f'"loss_before":3.5,"norm":0.5,"payload_sha256":"{SHA}","phase":"b","plan_id":"{SHA}","rank":8,"round":3,'
        '"step_s":1.25,"steps":10,"tokens":5120,"weight":10}]'
    )


@pytest.mark.parametrize(("message", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", str(value)[:20]))
def test_every_field_is_bounded(message, field) -> None:
    kind, header = json.loads(header_text(seal(message)))
    for value in BAD[field]:
        hostile = Envelope(kind, header | {field: value})
        with pytest.raises(MessageError, match=rf"^{kind}: "):
            unseal(hostile, type(message)) if field != "modules" else unseal(hostile, Hello).layout()


@pytest.mark.parametrize("name", [field.name for field in fields(MaskPlan)])
def test_every_field_of_a_mask_plan_is_bounded(name) -> None:
    kind, header = json.loads(header_text(seal(replace(PLAN, mask=MASK))))
    for value in BAD[name]:
        hostile = Envelope(kind, header | {"mask": header["mask"] | {name: value}})
        with pytest.raises(MessageError, match=rf"^plan: mask: .*{name}: "):
            unseal(hostile, Plan)


@pytest.mark.parametrize("name", [field.name for field in fields(Part)])
def test_every_field_of_a_part_is_bounded(name) -> None:
    kind, header = json.loads(header_text(seal(PLAN)))
    for value in BAD[name]:
        hostile = json.dumps([kind, header | {"parts": [header["parts"][0] | {name: value}]}])
        with pytest.raises(MessageError, match=rf"^plan: parts: .*{name}: "):
            unseal(envelope_from_text(hostile, b""), Plan)


def test_a_plan_brings_at_most_three_parts() -> None:
    assert unseal(seal(replace(PLAN, parts=(PART,) * 3)), Plan).parts == (PART,) * 3
    with pytest.raises(MessageError, match="at most 3"):
        unseal(seal(replace(PLAN, parts=(PART,) * 4)), Plan)


@pytest.mark.parametrize("message", [PLAN, UPDATE])
def test_work_starts_with_round_one(message) -> None:
    with pytest.raises(MessageError, match="round"):
        unseal(seal(replace(message, round=0)), type(message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_bounds_are_inclusive(message) -> None:
    """The largest values that a table above refuses one beyond are allowed themselves."""
    largest = {
        "round": MAX_ROUND, "rank": 1024, "steps": 100_000, "weight": MAX_WEIGHT, "weight_cap": MAX_WEIGHT,
        "tokens": 2**53, "seed": 2**63 - 1, "data_seed": 2**63 - 1, "sequence_tokens": 2**17, "norm": 1e12,
        "deadline_s": 30 * 86400.0, "loss_before": 1e6, "sequences": 2**31, "folded": SHA, "detail": "~" * 200,
    }  # fmt: skip
    names = {field.name for field in fields(message)}
    edge = replace(message, **{name: value for name, value in largest.items() if name in names})
    assert header_text(seal(unseal(seal(edge), type(message)))) == header_text(seal(edge))


@pytest.mark.parametrize(
    "changed",
    [
        {"modules": (("b", 1, 1), ("a", 1, 1))},
        {"modules": (("a", 1, 1), ("a", 1, 1))},
        {"modules": ()},
        {"modules": (("a", 0, 1),)},
        {"modules": (("a", 1, 2**20 + 1),)},
        {"modules": (("a", 1.0, 1),)},
        {"modules": (("../a", 1, 1),)},
        {"modules": (({}, 1, 1),)},
        {"modules": (("a" * 201, 1, 1),)},
        {"ranks": ()},
        {"ranks": (4, 4)},
        {"ranks": (8, 4)},
    ],
)
def test_a_greeting_that_makes_no_adapter_is_refused(changed) -> None:
    greeting = replace(hello("demo", LAYOUT), **changed)
    with pytest.raises(MessageError, match="hello"):
        unseal(seal(greeting), Hello).layout()


def test_a_greeting_carries_the_digest_of_the_adapter() -> None:
    for layout in (LAYOUT, replace(LAYOUT, alpha=16), replace(LAYOUT, alpha=0.1)):
        received = unseal(envelope_from_text(header_text(seal(hello("demo", layout))), b""), Hello)
        assert received.layout().digest == layout.digest
