"""Masked rounds: the unmasked sum is NumPy's plain sum, or there is none."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.formats.envelope import Envelope, header_text, seal, unseal
from edge_runtime.formats.masking import unpack_bits
from edge_runtime.formats.masking_keys import sign_keys
from edge_runtime.formats.masking_messages import MaskInvite, MaskKeys, MaskReveal
from edge_runtime.formats.messages import MaskPlan, Plan, Reason, Update
from server.secure_sum import Abandoned, SecureSum, choose_scales
from server.transport import Arrival
from tests.server.masked_cohort import (
    LAYOUT,
    SCALES,
    SETTINGS,
    SIZES,
    Cohort,
    decline,
    make_devices,
    plain_sum,
    run,
)

COHORTS = ([8, 8], [8] * 3, [2, 4, 8, 8, 4, 8], [8] * 9, [2] * 4 + [4] * 3 + [8] * 5, [4] * 16)
# The first message that a device no longer answers, and whether its update is in the sum then.
STAGES = {"maskroster": False, "maskdelivery": False, "plan": False, "maskunmask": True}


@pytest.mark.parametrize("ranks", COHORTS)
@pytest.mark.parametrize("order", range(3))
def test_the_sum_is_exact(ranks: list[int], order: int) -> None:
    devices = make_devices(ranks, seed=order)
    result = run(Cohort(devices, shuffle=order))
    assert isinstance(result, SecureSum)
    expected_counts = [sum(rank >= end for rank in ranks) for end in LAYOUT.ranks]
    opened = [count >= SETTINGS.min_cohort for count in expected_counts]
    assert np.array_equal(result.sums, plain_sum(devices, opened))
    assert list(result.contributors) == [count * flag for count, flag in zip(expected_counts, opened, strict=True)]
    for segment, end in enumerate(LAYOUT.ranks):
        if opened[segment]:
            assert result.weights[segment] == sum(device.weight for device in devices if device.rank >= end)
    assert list(result.updates) == [device.node for device in devices]


@pytest.mark.parametrize("count", [3, 6, 9, 10, 17])
@pytest.mark.parametrize("stage", STAGES)
def test_a_third_may_be_lost_at_any_stage_and_one_more_is_never_summed(count: int, stage: str) -> None:
    for lost in (count // 3, count // 3 + 1):
        devices = make_devices([8] * count, seed=count)
        dropped = np.random.default_rng(count).permutation(count)[:lost].tolist()
        result = run(Cohort(devices, silent=dict.fromkeys(dropped, stage), shuffle=lost))
        if lost > count // 3:
            assert isinstance(result, Abandoned)
            continue
        assert isinstance(result, SecureSum)
        left = [device for index, device in enumerate(devices) if index not in dropped or STAGES[stage]]
        assert np.array_equal(result.sums, plain_sum(left))
        assert result.contributors == (len(left),) * 3
        assert set(result.tally.lost) == {device.node for device in devices} - {device.node for device in left}


def test_losses_at_every_stage_together() -> None:
    devices = make_devices([8] * 11 + [4] * 3)
    cohort = Cohort(devices, silent={0: "maskinvite", 1: "maskroster", 2: "maskdelivery", 5: "plan", 7: "maskunmask"})
    result = run(cohort)
    assert isinstance(result, SecureSum)
    survivors = [device for index, device in enumerate(devices) if index not in (0, 1, 2, 5)]
    assert result.contributors == (10, 10, 7)
    assert np.array_equal(result.sums, plain_sum(survivors))
    stages = {100: "keys", 107: "shares", 114: "delivery", 135: "update"}
    assert result.tally.lost == stages


@pytest.mark.parametrize(
    ("ranks", "lost", "opened"),
    [
        ([2] * 9 + [8] * 3, [9], (True, True, True)),  # 2 of 3 are two thirds
        ([2] * 9 + [8] * 3, [9, 10], (True, False, False)),  # one alone would be seen
        ([2] * 6 + [4] * 3 + [8] * 6, [9, 10, 11], (True, True, False)),  # 3 of 6 are not two thirds
        ([2] * 8 + [4], [], (True, False, False)),
    ],
)
def test_a_segment_that_too_few_survive_is_not_opened(
    ranks: list[int], lost: list[int], opened: tuple[bool, ...]
) -> None:
    devices = make_devices(ranks)
    result = run(Cohort(devices, silent=dict.fromkeys(lost, "plan")))
    assert isinstance(result, SecureSum)
    left = [device for index, device in enumerate(devices) if index not in lost]
    assert np.array_equal(result.sums, plain_sum(left, opened))
    assert tuple(weight > 0 for weight in result.weights) == opened


def test_a_segment_under_the_minimum_cohort_is_not_even_sent() -> None:
    devices = make_devices([2] * 3 + [8] * 2)
    cohort = Cohort(devices)
    result = run(cohort, replace(SETTINGS, min_cohort=3))
    assert isinstance(result, SecureSum)
    assert result.scales == SCALES[:1]
    masks = [unseal(envelope, Plan).mask for _, envelope in cohort.sent if envelope.kind == "plan"]
    assert all(mask is not None and mask.scales == SCALES[:1] for mask in masks)
    assert np.array_equal(result.sums, plain_sum(devices, (True, False, False)))


def test_too_small_a_cohort_is_told_nothing_but_the_invitation() -> None:
    cohort = Cohort(make_devices([8] * 3), silent={1: "maskinvite"})
    result = run(cohort, replace(SETTINGS, min_cohort=3))
    assert isinstance(result, Abandoned) and result.stage == "keys"
    assert {envelope.kind for _, envelope in cohort.sent} == {"maskinvite"}


def test_an_abandoned_attempt_is_followed_by_one_with_other_keys_and_masks() -> None:
    devices = make_devices([8] * 4)
    first, second = Cohort(devices, silent={0: "plan", 1: "plan"}), Cohort(devices)
    assert isinstance(run(first, session_seed=b"attempt 1"), Abandoned)
    result = run(second, session_seed=b"attempt 2")
    assert isinstance(result, SecureSum) and np.array_equal(result.sums, plain_sum(devices))
    keys = [
        {envelope.header["mask_key"] for _, envelope in cohort.received if envelope.kind == "maskkeys"}
        for cohort in (first, second)
    ]
    assert keys[0].isdisjoint(keys[1])


def test_a_field_is_as_wide_as_the_sum_and_no_wider() -> None:
    devices = make_devices([8] * 5, weight_cap=1)
    cohort = Cohort(devices)
    result = run(cohort, replace(SETTINGS, weight_cap=1))
    assert isinstance(result, SecureSum)
    mask = next(unseal(envelope, Plan).mask for _, envelope in cohort.sent if envelope.kind == "plan")
    assert mask is not None and mask.bits == 11  # +-635
    payload = next(envelope.payload for _, envelope in cohort.received if envelope.kind == "update")
    assert len(payload) == sum(-(-size * 11 // 8) for size in SIZES)


def test_extreme_codes_do_not_wrap() -> None:
    devices = make_devices([8] * 4)
    for sign in (1, -1):
        for device in devices:
            device.codes[:], device.weight = sign * 127, SETTINGS.weight_cap
        result = run(Cohort(devices), session_seed=str(sign).encode())
        assert isinstance(result, SecureSum)
        assert set(result.sums) == {sign * 127 * SETTINGS.weight_cap * 4}


def test_the_mean_is_that_of_the_dequantized_deltas() -> None:
    devices = make_devices([2, 4, 8, 8, 8, 8])
    result = run(Cohort(devices))
    assert isinstance(result, SecureSum)
    scale = np.repeat(SCALES, SIZES)
    for start, stop in ((0, SIZES[0]), (sum(SIZES[:2]), sum(SIZES))):
        rows = [device for device in devices if device.codes.size >= stop]
        deltas = [device.codes[start:stop] * scale[start:stop] for device in rows]
        expected = np.average(deltas, axis=0, weights=[device.weight for device in rows])
        assert np.allclose(result.mean(SIZES)[start:stop], expected, rtol=1e-14, atol=0)


def test_declines_and_bad_updates_are_counted_and_the_round_goes_on() -> None:
    devices = make_devices([8] * 9)

    def change(node: int, envelope: Envelope) -> Envelope | None:
        if envelope.kind == "update" and node == 100:
            return decline(Reason.HEAT)
        if envelope.kind == "update" and node == 107:
            return replace(envelope, payload=envelope.payload[:-1] + b"\x00")
        if envelope.kind == "update" and node == 114:
            return seal(replace(unseal(envelope, Update), weight=SETTINGS.weight_cap + 1), envelope.payload)
        return envelope

    result = run(Cohort(devices, change=change))
    assert isinstance(result, SecureSum)
    assert np.array_equal(result.sums, plain_sum(devices[3:]))
    assert {node: declined.reason for node, declined in result.tally.declined.items()} == {100: Reason.HEAT}
    assert result.tally.refused == {107: "digest", 114: "weight"}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("round", 2, "stale"),
        ("plan_id", "0" * 64, "replay"),
        ("base_digest", "0" * 64, "base"),
        ("layout_digest", "0" * 64, "layout"),
        ("rank", 4, "rank"),
        ("weight", 0, "malformed"),
        ("payload_sha256", "0" * 64, "digest"),
    ],
)
def test_an_update_whose_header_lies_is_left_out(name: str, value: object, reason: str) -> None:
    devices = make_devices([8] * 4)

    def change(node: int, envelope: Envelope) -> Envelope:
        if envelope.kind == "update" and node == 100:
            return replace(envelope, header={**envelope.header, name: value})
        return envelope

    result = run(Cohort(devices, change=change))
    assert isinstance(result, SecureSum)
    assert np.array_equal(result.sums, plain_sum(devices[1:]))
    assert result.tally.refused == {100: reason}


def test_a_device_without_the_factors_gets_its_plan_again_once() -> None:
    devices, asked = make_devices([8] * 4), []
    cohort = Cohort(devices)
    answer = devices[0].answer

    def hesitate(envelope: Envelope) -> Envelope:
        if envelope.kind != "plan":
            return answer(envelope)
        asked.append(envelope)
        return decline(Reason.FACTORS) if len(asked) == 1 else answer(envelope)

    devices[0].answer = hesitate  # type: ignore[method-assign]
    result = run(cohort)
    assert isinstance(result, SecureSum) and len(asked) == 2
    assert np.array_equal(result.sums, plain_sum(devices))


def test_a_device_that_never_has_the_factors_is_asked_twice() -> None:
    devices, asked = make_devices([8] * 4), []
    cohort = Cohort(devices)
    answer = devices[0].answer

    def refuse(envelope: Envelope) -> Envelope:
        if envelope.kind != "plan":
            return answer(envelope)
        asked.append(envelope)
        assert len(asked) <= 2
        return decline(Reason.FACTORS)

    devices[0].answer = refuse  # type: ignore[method-assign]
    result = run(cohort)
    assert isinstance(result, SecureSum) and len(asked) == 2
    assert result.tally.declined[100].reason is Reason.FACTORS
    assert np.array_equal(result.sums, plain_sum(devices[1:]))


@pytest.mark.parametrize("kind", ["maskkeys", "maskshares", "maskready", "maskreveal"])
@pytest.mark.parametrize("fault", ["cut", "grown", "session", "kind", "field"])
def test_a_malformed_reply_costs_its_sender_only(kind: str, fault: str) -> None:
    devices = make_devices([8] * 6)

    def change(node: int, envelope: Envelope) -> Envelope:
        if envelope.kind != kind or node != 107:
            return envelope
        header = {**envelope.header, "session": "0" * 64} if fault == "session" else dict(envelope.header)
        header |= {"extra": 1} if fault == "field" else {}
        payload = {"cut": envelope.payload[:-1], "grown": envelope.payload + b"\x00"}.get(fault, envelope.payload)
        return Envelope("score" if fault == "kind" else kind, header, payload)

    result = run(Cohort(devices, change=change))
    assert isinstance(result, SecureSum)
    whole = kind == "maskreveal" or (fault in ("cut", "grown") and kind in ("maskkeys", "maskready"))
    assert np.array_equal(result.sums, plain_sum(devices if whole else devices[:1] + devices[2:]))


def test_a_forged_signature_keeps_its_device_out() -> None:
    devices = make_devices([8] * 4)

    def change(node: int, envelope: Envelope) -> Envelope:
        if envelope.kind == "maskkeys" and node == 100:
            return replace(envelope, header={**envelope.header, "share_key": "11" * 32})
        return envelope

    result = run(Cohort(devices, change=change))
    assert isinstance(result, SecureSum)
    assert result.tally.refused == {100: "signature"}
    assert np.array_equal(result.sums, plain_sum(devices[1:]))


@pytest.mark.parametrize(("silent", "noticed"), [({}, "another seed"), ({3: "plan"}, "another key")])
def test_wrong_shares_end_the_round_and_never_change_the_sum(silent: dict[int, str], noticed: str) -> None:
    devices = make_devices([8] * 4)

    def change(node: int, envelope: Envelope) -> Envelope:
        if envelope.kind == "maskreveal" and node == 100:
            return replace(envelope, payload=envelope.payload[:-1] + bytes([envelope.payload[-1] ^ 1]))
        return envelope

    seen = [
        run(Cohort(devices_of, silent=silent, change=change, shuffle=order))
        for order, devices_of in enumerate([make_devices([8] * 4) for _ in range(6)])
    ]
    assert any(isinstance(result, Abandoned) for result in seen)
    for result in seen:
        if isinstance(result, Abandoned):
            assert result.stage == "unmask" and noticed in result.reason
        else:  # it was not among the first to answer
            assert np.array_equal(result.sums, plain_sum(devices[:3] if silent else devices))


def test_a_sum_beyond_every_honest_one_is_refused() -> None:
    devices = make_devices([8] * 5, weight_cap=1)
    devices[2].sessions.mask = lambda *args: bytes(  # type: ignore[method-assign]
        sum(-(-size * 11 // 8) for size in SIZES)
    )  # no masks at all: the others' do not cancel
    result = run(Cohort(devices), replace(SETTINGS, weight_cap=1))
    assert isinstance(result, Abandoned) and "out of range" in result.reason


def test_the_sum_closes_early_when_enough_are_in() -> None:
    devices = make_devices([8] * 9)
    cohort = Cohort(devices)
    result = run(cohort, replace(SETTINGS, enough=7))
    assert isinstance(result, SecureSum)
    folded = [device for device in devices if device.node in result.updates]
    assert len(folded) == 7
    assert np.array_equal(result.sums, plain_sum(folded))


def test_closing_early_waits_until_every_segment_can_be_opened() -> None:
    devices = make_devices([2] * 9 + [8] * 3)
    for order in range(4):
        result = run(Cohort(devices, shuffle=order), replace(SETTINGS, enough=1), session_seed=bytes([order]))
        assert isinstance(result, SecureSum)
        assert min(result.contributors) >= 2 and len(result.updates) >= 8
        assert np.array_equal(result.sums, plain_sum([device for device in devices if device.node in result.updates]))


def test_noise_of_all_devices_adds_up_and_has_room() -> None:
    devices = make_devices([8] * 16, weight_cap=1)
    for device in devices:
        device.codes[:] = 0
    settings = replace(SETTINGS, weight_cap=1, noise_std=4.0)
    result = run(Cohort(devices), settings)
    assert isinstance(result, SecureSum)
    for segment, scale in enumerate(SCALES):
        part = result.sums[sum(SIZES[:segment]) : sum(SIZES[: segment + 1])]
        expected = 4.0 / scale * 4
        assert abs(part.std() / expected - 1) < 4 / np.sqrt(2 * part.size)


def test_bytes_are_counted_in_both_directions() -> None:
    cohort = Cohort(make_devices([8] * 3))
    result = run(cohort)
    assert isinstance(result, SecureSum)
    up, down = (
        sum(len(header_text(envelope)) + len(envelope.payload) for _, envelope in messages)
        for messages in (cohort.received, cohort.sent)
    )
    late = sum(e.kind == "maskreveal" for _, e in cohort.received)
    assert late == 2  # the third was not waited for
    assert (result.tally.bytes_up, result.tally.bytes_down) == (up, down)


def test_misuse_is_an_exception() -> None:
    devices = make_devices([8] * 3)
    with pytest.raises(ValueError, match="different nodes"):
        run(Cohort([*devices, devices[0]]))
    with pytest.raises(ValueError, match="not 32"):
        run(Cohort(devices), replace(SETTINGS, largest_code=2**23, weight_cap=1024))


def test_masked_values_look_uniform_whatever_they_hide() -> None:
    stats = pytest.importorskip("scipy.stats")
    for fill in (0, 127):
        values = []
        for seed in range(6):
            devices = make_devices([8] * 3, seed=seed)
            devices[0].codes[:] = fill
            cohort = Cohort(devices)
            assert isinstance(run(cohort, session_seed=str(seed).encode()), SecureSum)
            payload = next(e.payload for node, e in cohort.received if e.kind == "update" and node == 100)
            mask = next(unseal(e, Plan).mask for _, e in cohort.sent if e.kind == "plan")
            assert isinstance(mask, MaskPlan)
            start = 0
            for size in SIZES:
                length = -(-size * mask.bits // 8)
                values.append(unpack_bits(payload[start : start + length], size, mask.bits) >> (mask.bits - 4))
                start += length
        counts = np.bincount(np.concatenate(values), minlength=16)
        assert len(counts) == 16 and stats.chisquare(counts).pvalue > 1e-3


def test_no_share_of_an_unopened_segment_is_revealed() -> None:
    devices = make_devices([2] * 9 + [8] * 3)
    cohort = Cohort(devices, silent={9: "plan", 10: "plan"})
    assert isinstance(run(cohort), SecureSum)
    reveal = next(envelope for _, envelope in cohort.received if envelope.kind == "maskreveal")
    unseal(reveal, MaskReveal)
    assert len(reveal.payload) == 33 * 12  # one segment's seed of ten survivors, the key of two lost


def test_scales_follow_the_last_mean_and_never_exceed_the_bound() -> None:
    assert choose_scales((), None, SIZES, 127, 0.254) == (0.002,) * 3
    mean = np.zeros(sum(SIZES))
    mean[3], mean[SIZES[0] + 1], mean[-1] = -0.00635, 0.0254 / 8, 10.0
    scales = choose_scales((0.0002, 0.002, 0.002), mean, SIZES, 127, 0.254)
    assert scales == pytest.approx((0.0002, 0.001, 0.002))
    silent = choose_scales((0.001, 0.001, 0.001), np.zeros(sum(SIZES)), SIZES, 127, 0.254)
    assert silent == (0.001,) * 3
    assert choose_scales((0.001,), mean, SIZES, 127, 0.254)[2] == 0.002


def test_scales_keep_noise_between_2_and_1024_codes() -> None:
    assert choose_scales((), None, SIZES, 127, 0.254, noise_std=0.001) == (0.0005,) * 3
    assert choose_scales((), None, SIZES, 127, 0.254, noise_std=4.096) == (0.004,) * 3
    tiny = np.full(sum(SIZES), 1e-30)
    scales: tuple[float, ...] = ()
    for _ in range(100):
        scales = choose_scales(scales, tiny, SIZES, 127, 0.254)
    assert scales == (0.002 * 2.0**-16,) * 3


def test_a_device_that_sends_anothers_key_is_left_out() -> None:
    devices = make_devices([8] * 4)
    first: list[str] = []

    def change(node: int, envelope: Envelope) -> Envelope:
        if envelope.kind != "maskkeys":
            return envelope
        keys = unseal(envelope, MaskKeys)
        first.append(keys.mask_key)
        invite = next(unseal(e, MaskInvite) for n, e in reversed(cohort.sent) if n == node and e.kind == "maskinvite")
        copied = replace(keys, mask_key=first[0])
        signed = sign_keys(
            invite, 8, *map(bytes.fromhex, (copied.mask_key, copied.share_key)), devices[cohort.nodes().index(node)].key
        )
        return seal(replace(copied, signature=signed.hex())) if len(first) == 2 else envelope

    cohort = Cohort(devices, change=change)
    result = run(cohort)
    assert isinstance(result, SecureSum)
    assert list(result.tally.refused.values()) == ["duplicate"]
    left = [device for device in devices if device.node not in result.tally.refused]
    assert np.array_equal(result.sums, plain_sum(left)) and len(left) == 3


def test_a_reply_that_arrives_twice_or_unasked_is_counted_once() -> None:
    class Stutter(Cohort):
        def pull(self, message_ids: Collection[str]) -> list[Arrival]:
            arrived = super().pull(message_ids)
            return [*arrived, *arrived, *(replace(arrival, message_id="unasked") for arrival in arrived)]

    devices = make_devices([8] * 4)
    result = run(Stutter(devices))
    assert isinstance(result, SecureSum) and np.array_equal(result.sums, plain_sum(devices))


def test_a_node_that_is_gone_is_lost_at_once() -> None:
    class Broken(Cohort):
        def pull(self, message_ids: Collection[str]) -> list[Arrival]:
            arrived = super().pull(message_ids)
            if arrived and arrived[0].node == 107 and arrived[0].envelope.kind == "update":  # type: ignore[union-attr]
                return [replace(arrived[0], envelope=None, error="node unavailable")]
            return arrived

    devices = make_devices([8] * 4)
    cohort = Broken(devices)
    result = run(cohort)
    assert isinstance(result, SecureSum) and cohort.now_s == 0
    assert result.tally.lost == {107: "update: node unavailable"}
    assert np.array_equal(result.sums, plain_sum([devices[0], *devices[2:]]))
