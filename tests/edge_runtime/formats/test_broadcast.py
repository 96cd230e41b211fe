from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from edge_runtime.formats.broadcast import Snapshot, initial_vector, pack_parts, take_snapshot, to_factors, unpack_parts
from edge_runtime.formats.codec import Codec, encoded_bytes
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import AdapterLayout, Module, initial_factors
from edge_runtime.formats.messages import Part

LAYOUT = AdapterLayout("ab" * 32, (Module("m.k", 70, 33), Module("m.q", 33, 5)), (2, 5, 9), 18.0)
SEED = 11
GROUPS = ("a", "b", "core")


def snapshots(codec=Codec.INT8, groups=GROUPS, version=4):
    """Snapshots of all groups and what they decode to at r_max."""
    rng, found, values = np.random.default_rng(5), [], {}
    for group in groups:
        start = initial_vector(LAYOUT, group, 9, SEED).astype(np.float64)
        wanted = start + rng.standard_normal(start.size) * 0.03
        snapshot, values[group], _ = take_snapshot(LAYOUT, group, version, [wanted], codec, SEED)
        found.append(snapshot)
    return found, values


def unpack(parts, payload, rank=5, held=()):
    return unpack_parts(LAYOUT, parts, payload, rank, SEED, dict(held))


@pytest.mark.parametrize(("codec", "rank"), list(product(Codec, LAYOUT.ranks)))
def test_a_device_decodes_a_prefix_of_exactly_the_servers_values(codec, rank) -> None:
    packed, values = snapshots(codec)
    parts, payload = pack_parts(LAYOUT, packed, rank, {})
    assert sum(part.size_bytes for part in parts) == len(payload)
    assert len(payload) == sum(encoded_bytes(LAYOUT.segment_sizes((group,), rank), codec) for group in GROUPS)
    vectors = unpack(parts, payload, rank)
    assert list(vectors) == [("a", 4), ("b", 4), ("core", 4)]
    for (group, _), vector in vectors.items():
        assert vector.tobytes() == values[group][: LAYOUT.size((group,), rank)].tobytes()


@pytest.mark.parametrize("codec", list(Codec))
def test_a_snapshot_is_within_the_codecs_error_of_what_was_wanted(codec) -> None:
    rng = np.random.default_rng(6)
    start = initial_vector(LAYOUT, "a", 9, SEED).astype(np.float64)
    difference = rng.uniform(-0.03, 0.03, start.size)
    _, values, missing = take_snapshot(LAYOUT, "a", 1, [start, difference], codec, SEED)
    np.testing.assert_array_equal(missing, (start + difference - values).astype(np.float32))
    half_a_step = {Codec.FP32: 0, Codec.FP16: 2.0**-17, Codec.INT8: 0.015 / 127 * 1.01, Codec.INT4: 0.015 / 7 * 1.01}
    error = np.abs(values - (start + difference)).max()
    assert error <= half_a_step[codec] + 2.0**-26
    assert error >= half_a_step[codec] / 2


def test_only_the_difference_to_the_start_is_encoded() -> None:
    start = initial_vector(LAYOUT, "a", 9, SEED)
    snapshot, values, missing = take_snapshot(LAYOUT, "a", 1, [start], Codec.INT4, SEED)
    assert not missing.any()
    np.testing.assert_array_equal(values, start)
    assert not any(snapshot.raw[:2])


def test_version_0_needs_no_bytes_and_is_the_start_that_everyone_derives() -> None:
    parts, payload = pack_parts(LAYOUT, [Snapshot(g, 0, Codec.INT8, b"") for g in GROUPS], 5, {})
    assert payload == b"" and [part.size_bytes for part in parts] == [0, 0, 0]
    factors = to_factors(LAYOUT, unpack(parts, payload), 5)
    expected = LAYOUT.prefix(initial_factors(LAYOUT, SEED), 5)
    assert set(factors) == {f"{m.name}{s}" for m in LAYOUT.modules for s in (".lora_A", ".lora_B", ".core")}
    for name, value in factors.items():
        np.testing.assert_array_equal(value, expected.get(name, np.zeros((5, 5), np.float32)))
    other = unpack_parts(LAYOUT, parts, payload, 5, SEED + 1, {})
    assert (other["a", 0] != unpack(parts, payload)["a", 0]).any()


@pytest.mark.parametrize("held", [("a",), ("b",), ("a", "b"), ("core",), GROUPS])
def test_what_a_device_holds_is_left_out_and_found_again(held) -> None:
    packed, _ = snapshots()
    full = unpack(*pack_parts(LAYOUT, packed, 5, {}))
    parts, payload = pack_parts(LAYOUT, packed, 5, dict.fromkeys(held, 4))
    assert [part.size_bytes == 0 for part in parts] == [group in held for group in GROUPS]
    found = unpack(parts, payload, held=full.items())
    assert {key: vector.tobytes() for key, vector in found.items()} == {k: v.tobytes() for k, v in full.items()}


def test_another_version_than_the_newest_is_sent() -> None:
    packed, _ = snapshots()
    assert all(part.size_bytes for part in pack_parts(LAYOUT, packed, 5, {"a": 3, "b": 5, "core": 0})[0])


@pytest.mark.parametrize("lacking", ["nothing held", "another version", "another group", "another rank"])
def test_a_part_that_was_left_out_and_is_not_held_is_told(lacking) -> None:
    packed, _ = snapshots(groups=("a", "b"))
    parts, payload = pack_parts(LAYOUT, packed, 5, {"b": 4})
    vector = np.zeros(LAYOUT.size(("b",), 5), np.float32)
    held = {
        "nothing held": {},
        "another version": {("b", 3): vector},
        "another group": {("a", 4): vector},
        "another rank": {("b", 4): np.zeros(LAYOUT.size(("b",), 9), np.float32)},
    }[lacking]
    assert unpack(parts, payload, held=held.items()) is None
    assert unpack(parts, payload, held=[(("b", 4), vector)]) is not None


def hostile():
    (a, b), _ = snapshots(groups=("a", "b"))
    parts, payload = pack_parts(LAYOUT, (a, b), 5, {})
    size = parts[1].size_bytes
    yield "a group twice", (parts[0], parts[0]), payload[: parts[0].size_bytes] * 2
    yield "a group twice beside both", (*parts, parts[1]), payload + payload[-size:]
    yield "no b", parts[:1], payload[: parts[0].size_bytes]
    yield "no a", (parts[1],), payload[-size:]
    yield "only a core", (Part("core", 0, Codec.INT8, 0),), b""
    yield "nothing", (), b""
    yield "a byte short", parts, payload[:-1]
    yield "a byte more", parts, payload + b"\0"
    yield "a size that lies", (parts[0], replace(parts[1], size_bytes=size - 1)), payload[:-1]
    yield "sizes that lie in turn", (
        replace(parts[0], size_bytes=parts[0].size_bytes + 1), replace(parts[1], size_bytes=size - 1),
    ), payload  # fmt: skip
    yield "another codec", (parts[0], replace(parts[1], codec=Codec.INT4)), payload
    yield "another rank's bytes", *pack_parts(LAYOUT, (a, b), 9, {})
    yield "bytes for version 0", (parts[0], replace(parts[1], version=0)), payload
    yield "a negative scale", parts, payload[:-size] + b"\x00\xbf" + payload[-size + 2 :]
    yield "an infinite scale", parts, payload[:-size] + b"\x80\x7f" + payload[-size + 2 :]
    nan = np.full(LAYOUT.size(("b",), 5), np.nan, "<f4").tobytes()
    yield "NaN", (Part("a", 0, Codec.FP32, 0), Part("b", 1, Codec.FP32, len(nan))), nan


@pytest.mark.parametrize(("parts", "payload"), [h[1:] for h in hostile()], ids=[h[0] for h in hostile()])
def test_parts_that_are_not_what_they_say_are_refused(parts, payload) -> None:
    with pytest.raises(MessageError):
        unpack(parts, payload)
