from __future__ import annotations

import io
import json
import logging
import math
import struct
from dataclasses import dataclass
from enum import StrEnum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.envelope import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Envelope,
    boolean,
    check_payload,
    checked,
    choice,
    envelope_from_text,
    header_text,
    integer,
    listing,
    number,
    optional,
    read_envelope,
    read_fields,
    record,
    seal,
    sha256,
    text,
    unseal,
    write_fields,
)
from edge_runtime.formats.errors import MessageError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Inner:
    size: int = checked(integer(1, 9))


@dataclass(frozen=True, slots=True)
class Sample:
    name: str = checked(text(r"[a-z]{1,4}"))
    count: int = checked(integer(-3, 3))
    ratio: float = checked(number(-1, 2.5))
    colour: Colour = checked(choice(Colour))
    maybe: Inner | None = checked(optional(record(Inner)))
    sizes: tuple[int, ...] = checked(listing(integer(0, 5), 3))
    on: bool = checked(boolean)


GOOD = {"name": "ab", "count": 3, "ratio": 2, "colour": "red", "maybe": {"size": 9}, "sizes": [0, 5], "on": True}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.integers(10**308, 10**312),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def reader(raw):
    stream = io.BytesIO(raw)

    def receive(count):
        got = stream.read(count)
        if len(got) != count:
            raise EOFError
        return got

    return receive, stream


def test_a_message_survives_the_wire() -> None:
    message = Sample("ab", -3, 2.5, Colour.BLUE, Inner(1), (1, 2, 3), False)
    sent = seal(message, b"payload")
    assert sent.kind == "sample"
    receive, stream = reader(sent.to_bytes() + b"next")
    received = read_envelope(receive)
    assert (received, stream.read()) == (sent, b"next")
    assert unseal(received, Sample) == message
    assert unseal(envelope_from_text(header_text(sent), b"payload"), Sample) == message


def test_values_are_read_as_the_dataclass_holds_them() -> None:
    sample = read_fields(Sample, GOOD)
    assert sample == Sample("ab", 3, 2.0, Colour.RED, Inner(9), (0, 5), True)
    assert type(sample.ratio) is float and sample.colour is Colour.RED and type(sample.sizes) is tuple
    assert write_fields(sample) == GOOD
    assert read_fields(Sample, GOOD | {"maybe": None}).maybe is None


def test_header_text_is_one_canonical_ascii_line() -> None:
    envelope = Envelope("k", {"b": 1, "a": "ü\n", "c": [1.5, None, True]})
    assert header_text(envelope) == '["k",{"a":"\\u00fc\\n","b":1,"c":[1.5,null,true]}]'
    assert envelope.to_bytes() == struct.pack("<4sIQ", b"S7M1", 48, 0) + header_text(envelope).encode()
    with pytest.raises(ValueError, match="Out of range"):
        header_text(Envelope("k", {"a": math.nan}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in ("", "abcde", "A", "ab\n", "a\nb", "ä", 5, None, ["a"], "ª")),
        *(("count", value) for value in (-4, 4, 1.0, True, "1", None, [], 10**400)),
        *(("ratio", value) for value in (-1.01, 2.51, math.nan, math.inf, -math.inf, True, "1", None, 10**400)),
        *(("colour", value) for value in ("RED", "", "green", None, 1, ["red"], {"red": 1})),
        *(("maybe", value) for value in ({}, {"size": 0}, {"size": 1, "x": 1}, 3, [1], False)),
        *(("sizes", value) for value in ([0] * 4, [6], [-1], ["1"], "12", {"0": 1}, None, (1,))),
        *(("on", value) for value in (0, 1, "true", None)),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(field, value) -> None:
    with pytest.raises(MessageError, match=rf"^sample: {field}: got .* allowed: ") as caught:
        unseal(Envelope("sample", GOOD | {field: value}), Sample)
    assert len(str(caught.value)) < 200 and str(caught.value).isascii() and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", list(GOOD))
def test_missing_and_unknown_fields_are_refused(field) -> None:
    for header in ({key: value for key, value in GOOD.items() if key != field}, GOOD | {f"{field}2": 1}):
        with pytest.raises(MessageError, match=f"exactly the fields .*{field}"):
            unseal(Envelope("sample", header), Sample)


@pytest.mark.parametrize("header", [None, [], "name", 3, [["name", 1]]])
def test_a_header_that_is_no_object_is_refused(header) -> None:
    with pytest.raises(MessageError, match="exactly the fields"):
        unseal(Envelope("sample", header), Sample)


@pytest.mark.parametrize("kind", ["", "Sample", "sample ", "inner", "a\nb", "\ud800" * 1000])
def test_another_kind_is_refused(kind) -> None:
    with pytest.raises(MessageError, match="expected 'sample'") as caught:
        unseal(Envelope(kind, GOOD), Sample)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_refusals_can_be_logged_whatever_the_other_side_wrote(caplog, tmp_path) -> None:
    handler = logging.FileHandler(tmp_path / "log", encoding="utf-8", errors="strict")
    for hostile in ({"\ud800\n\x1b[31m": 1}, {"x" * 10_000: 1}, GOOD | {"name": "\ud800\n" * 5000}):
        with pytest.raises(MessageError) as caught:
            unseal(envelope_from_text(json.dumps(["sample", hostile]), b""), Sample)
        handler.handle(logging.LogRecord("n", 30, "f", 1, "%s", (caught.value,), None))
    handler.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 3 and all(line.isprintable() and len(line) < 250 for line in lines)


@pytest.mark.parametrize("field", list(GOOD))
def test_deep_nesting_is_refused_however_little_stack_is_left(field) -> None:
    """Parsed near the top of the stack, checked further down: showing the value must not recurse into it."""
    nested = "[" * 900 + "]" * 900
    raw = json.dumps(["sample", GOOD | {field: "@"}]).replace('"@"', nested)
    envelope = Envelope("sample", json.loads(raw)[1])

    def deeper(frames):
        return unseal(envelope, Sample) if frames == 0 else deeper(frames - 1)

    with pytest.raises(MessageError, match=f"{field}: got "):
        deeper(120)


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "x",
        "[]",
        "{}",
        '["k"]',
        '["k",{},1]',
        "[1,{}]",
        '["k",[]]',
        "[" * 5000,
        "1" * 5000,
        '["k",{"a":' + "9" * 5000,
        '["k",{"a":NaN}]',
        '["k",{"a":[1,-Infinity]}]',
        '["k",{"a":{"b":1e999}}]',
        '["k",{"a":' + "[" * 15 + "]" * 15 + "}]",
    ],
)
def test_headers_of_another_form_are_refused(raw) -> None:
    with pytest.raises(MessageError, match=r"^message: "):
        envelope_from_text(raw, b"")


def test_a_header_that_was_read_can_be_written_again() -> None:
    raw = '["k",{"a":' + "[" * 14 + "1.5" + "]" * 14 + "}]"
    assert header_text(envelope_from_text(raw, b"")) == raw


def test_headers_and_payloads_are_bounded() -> None:
    fitting = f'["k",{{"a":"{"x" * (MAX_HEADER_BYTES - 14)}"}}]'
    assert len(fitting) == MAX_HEADER_BYTES
    assert envelope_from_text(fitting, b"").kind == "k"
    with pytest.raises(MessageError, match="more than allowed"):
        envelope_from_text(fitting + " ", b"")

    class Long(bytes):
        more = 0

        def __len__(self):
            return MAX_PAYLOAD_BYTES + self.more

    payload = Long()
    assert envelope_from_text('["k",{}]', payload).payload is payload
    payload.more = 1
    with pytest.raises(MessageError, match="more than allowed"):
        envelope_from_text('["k",{}]', payload)


def test_a_stream_may_announce_the_largest_message() -> None:
    head = struct.pack("<4sIQ", b"S7M1", MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES)
    answers = {16: head, MAX_HEADER_BYTES: b'["k",{}]', MAX_PAYLOAD_BYTES: b"as good as long"}
    assert read_envelope(lambda count: answers[count]).payload == b"as good as long"


@pytest.mark.parametrize(
    "head",
    [
        (b"S7M2", 2, 0),
        (b"\0\0\0\0", 2, 0),
        (b"S7M1", MAX_HEADER_BYTES + 1, 0),
        (b"S7M1", 2, MAX_PAYLOAD_BYTES + 1),
        (b"S7M1", 2**32 - 1, 2**64 - 1),
    ],
)
def test_nothing_is_read_after_a_head_that_is_refused(head) -> None:
    receive, stream = reader(struct.pack("<4sIQ", *head) + b"[]" * 10)
    with pytest.raises(MessageError, match="not of this protocol"):
        read_envelope(receive)
    assert stream.tell() == 16


def test_a_stream_with_a_header_that_is_not_ascii_is_refused() -> None:
    raw = '["k",{"a":"ü"}]'.encode()
    with pytest.raises(MessageError, match="ASCII"):
        read_envelope(reader(struct.pack("<4sIQ", b"S7M1", len(raw), 0) + raw)[0])


def test_a_payload_is_what_its_digest_says() -> None:
    # FIPS 180-4: the digest of "abc"
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(b"abc") == digest
    assert check_payload(Envelope("k", {}, b"abc"), digest) == b"abc"
    with pytest.raises(MessageError, match="sha256"):
        check_payload(Envelope("k", {}, b"abd"), digest)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "x"]), json_values))
def test_any_header_is_a_message_or_a_refusal(odd) -> None:
    raw = json.dumps(["sample", GOOD | odd])
    try:
        sample = unseal(envelope_from_text(raw, b""), Sample)
    except MessageError as error:
        assert str(error).isascii()
        return
    assert read_fields(Sample, json.loads(json.dumps(write_fields(sample)))) == sample


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_an_envelope_or_a_refusal(raw, headed) -> None:
    raw = struct.pack("<4sIQ", b"S7M1", len(raw), 0) + raw if headed else raw
    try:
        read_envelope(reader(raw)[0])
    except (MessageError, EOFError):
        return
