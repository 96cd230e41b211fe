"""What a resident answers: plans, residuals, repetitions, refusals - and never an exception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.federated.resident import Resident
from edge_runtime.federated.updates import clip_norm
from edge_runtime.formats.broadcast import take_snapshot
from edge_runtime.formats.codec import Codec, decode
from edge_runtime.formats.envelope import Envelope, seal, sha256, unseal
from edge_runtime.formats.errors import BackendError
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from edge_runtime.formats.messages import (
    Decline,
    Hello,
    MaskPlan,
    Plan,
    Profile,
    Reason,
    Score,
    Update,
)
from tests.edge_runtime.federated.device import (
    SEED,
    Device,
    LinearTrainer,
    greet,
    make_plan,
    make_score_plan,
    small_layout,
    small_manifest,
    start_snapshots,
)

LAYOUT = small_layout()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


@pytest.fixture
def resident(device: Device) -> Resident:
    started = device.start()
    assert started.handle(greet(LAYOUT)).kind == "profile"
    return started


def delta_of(reply: Envelope) -> np.ndarray:
    update = unseal(reply, Update)
    assert update.payload_sha256 == sha256(reply.payload)
    return decode(reply.payload, LAYOUT.segment_sizes(update.phase.groups, update.rank), update.codec)


def reason_of(reply: Envelope) -> Reason:
    return unseal(reply, Decline).reason


# Greeting ----------------------------------------------------------------------------------------------------------


def test_a_greeting_is_answered_with_what_the_device_can_do(device: Device) -> None:
    profile = unseal(device.start().handle(greet(LAYOUT)), Profile)
    assert (profile.device, profile.rank, profile.trainer, profile.buckets) == ("kitchen", 4, "linear", (8, 16))
    assert profile.layout_digest == LAYOUT.digest and profile.base_digest == LAYOUT.base_digest
    assert profile.sequences > 100 and profile.step_s == 0.0 and len(profile.public_key) == 64


def test_another_base_is_declined_at_enrolment_with_both_digests(device: Device) -> None:
    decline = unseal(device.start().handle(greet(small_layout(base_digest="cd" * 32))), Decline)
    assert decline.reason is Reason.BASE
    assert "cd" * 32 in decline.detail and "ab" * 32 in decline.detail


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ((Module("model.layers.0.self_attn.q_proj", 32, 16),), "32 to 32"),
        ((Module("model.layers.9.self_attn.q_proj", 32, 32),), "layers.9"),
        ((Module("somewhere", 4, 4),), "somewhere"),
        ((Module("model.layers.0.mlp.up_proj", 32, 64),), "q_proj v_proj only"),
    ],
)
def test_a_layout_that_the_package_cannot_take_is_declined(
    device: Device, modules: tuple[Module, ...], says: str
) -> None:
    decline = unseal(device.start().handle(greet(AdapterLayout("ab" * 32, modules, (4,), 8.0))), Decline)
    assert decline.reason is Reason.LAYOUT and says in decline.detail


def test_the_rank_is_the_largest_segment_that_device_and_files_allow(device: Device) -> None:
    layout = small_layout(ranks=(2, 4, 32))
    for most, expected in ((None, 32), (31, 4), (3, 2)):
        device.most_rank = most
        assert unseal(device.start().handle(greet(layout)), Profile).rank == expected
    device.most_rank = 1
    assert reason_of(device.start().handle(greet(layout))) is Reason.LAYOUT
    device.most_rank, device.trainer.max_rank = 31, 3
    assert unseal(device.start().handle(greet(layout)), Profile).rank == 2


def test_another_protocol_is_declined(device: Device) -> None:
    hello = greet(LAYOUT)
    newer = Envelope("hello", {**hello.header, "protocol": 2})
    assert reason_of(device.start().handle(newer)) is Reason.LAYOUT


# Plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("phase", list(Phase))
def test_an_update_has_the_delta_of_the_phases_groups_at_the_plans_rank(
    resident: Resident, phase: Phase, rank: int
) -> None:
    reply = resident.handle(
        make_plan(LAYOUT, phase=phase, rank=rank, snapshots=start_snapshots(LAYOUT, moved=True), codec=Codec.FP32)
    )
    update, delta = unseal(reply, Update), delta_of(reply)
    assert delta.size == LAYOUT.size(phase.groups, rank)
    assert (update.round, update.phase, update.rank, update.steps, update.weight) == (1, phase, rank, 3, 1)
    assert update.loss_after < update.loss_before and update.tokens > 0
    assert update.norm == pytest.approx(float(np.linalg.norm(delta)), rel=1e-6)


def test_training_moves_the_loss_of_the_data_down(resident: Resident) -> None:
    before = unseal(resident.handle(make_score_plan(LAYOUT)), Score)
    reply = resident.handle(make_plan(LAYOUT, phase=Phase.B, steps=30, codec=Codec.FP32))
    changed = np.zeros(LAYOUT.size(("b",), 4)) + delta_of(reply)
    snapshot, *_ = take_snapshot(LAYOUT, "b", 1, [changed], Codec.FP32, SEED)
    parts = make_plan(LAYOUT, snapshots=[start_snapshots(LAYOUT)[0], snapshot])
    asked = make_score_plan(LAYOUT, parts=unseal(parts, Plan).parts, payload_sha256=sha256(parts.payload))
    after = unseal(resident.handle(replace(asked, payload=parts.payload)), Score)
    assert after.tokens == before.tokens and after.loss_sum < 0.99 * before.loss_sum


def test_a_repeated_plan_gets_the_same_bytes_before_and_after_a_restart(device: Device, resident: Resident) -> None:
    plan = make_plan(LAYOUT)
    first, steps = resident.handle(plan), len(device.trainer.calls)
    assert resident.handle(plan) == first
    assert device.start().handle(plan) == first
    # Sent again, it may have another deadline and leave out what the device holds by now.
    assert device.start().handle(make_plan(LAYOUT, deadline_s=77.0, folded="f" * 64)) == first
    assert len(device.trainer.calls) == steps


def test_the_same_id_for_other_work_is_not_answered_from_memory(device: Device, resident: Resident) -> None:
    first = resident.handle(make_plan(LAYOUT))
    moved = resident.handle(make_plan(LAYOUT, snapshots=start_snapshots(LAYOUT, moved=True)[:2]))
    faster = resident.handle(make_plan(LAYOUT, learning_rate_b=0.5))
    assert len({reply.payload for reply in (first, moved, faster)}) == 3


def test_after_a_crash_before_the_reply_was_stored_the_answer_is_the_same(
    device: Device, resident: Resident, tmp_path: Path
) -> None:
    plan = make_plan(LAYOUT, codec=Codec.INT4)
    first = resident.handle(plan)
    (tmp_path / "state/federations/demo/replies" / ("1" * 64)).unlink()
    assert device.start().handle(plan) == first


def test_parts_that_are_left_out_are_taken_from_the_disk(device: Device, resident: Resident) -> None:
    snapshots = start_snapshots(LAYOUT, moved=True)
    whole = resident.handle(make_plan(LAYOUT, snapshots=snapshots))
    held = {"a": 1, "b": 1, "core": 1}
    short = make_plan(LAYOUT, snapshots=snapshots, held=held, plan_id="2" * 64)
    assert short.payload == b""
    again = device.start().handle(short)
    assert again.payload == whole.payload and unseal(again, Update).plan_id == "2" * 64
    # Another version, seed, rank or federation is not what the device holds.
    newer = [replace(snapshot, version=2) for snapshot in snapshots]  # type: ignore[type-var]
    for plan in (
        make_plan(LAYOUT, snapshots=newer, held={"a": 2, "b": 2, "core": 2}),
        make_plan(LAYOUT, snapshots=snapshots, held=held, seed=12),
        make_plan(LAYOUT, snapshots=snapshots, held=held, rank=2),
    ):
        assert reason_of(resident.handle(plan)) is Reason.FACTORS


def test_a_device_with_a_damaged_state_asks_for_the_factors_and_goes_on(
    device: Device, resident: Resident, tmp_path: Path
) -> None:
    snapshots = start_snapshots(LAYOUT, moved=True)
    resident.handle(make_plan(LAYOUT, snapshots=snapshots))
    for path in (tmp_path / "state").rglob("*"):
        if path.is_file() and path.name not in ("hello.json",):
            path.write_bytes(path.read_bytes()[:-3])
    again = device.start()
    held = {"a": 1, "b": 1, "core": 1}
    assert reason_of(again.handle(make_plan(LAYOUT, snapshots=snapshots, held=held))) is Reason.FACTORS
    assert again.handle(make_plan(LAYOUT, snapshots=snapshots)).kind == "update"


# Residuals ---------------------------------------------------------------------------------------------------------


def run_rounds(resident: Resident, folded: Callable[[int], str], count: int, **changes: object) -> list[np.ndarray]:
    return [
        delta_of(
            resident.handle(
                make_plan(LAYOUT, round=n, plan_id=f"{n:064x}", folded=folded(n), codec=Codec.INT4, **changes)
            )
        )
        for n in range(1, count + 1)
    ]


def exact_delta(device: Device) -> np.ndarray:
    """What the plan trains, before it is encoded, from a device of its own."""
    fresh = Device(device.directory / "exact").start()
    fresh.handle(greet(LAYOUT))
    return delta_of(fresh.handle(make_plan(LAYOUT, codec=Codec.FP32)))


def test_what_four_bits_lose_is_sent_later_when_replies_are_folded(device: Device, resident: Resident) -> None:
    exact = exact_delta(device)
    sent = run_rounds(resident, lambda n: f"{n - 1:064x}" if n > 1 else "", 12)
    single = np.abs(sent[0] - exact).max()
    # The sum of n rounds is off by one round's rounding, not by n times it.
    assert np.abs(sum(sent) - 12 * exact).max() <= 1.5 * single
    assert np.abs(12 * sent[0] - 12 * exact).max() > 10 * single


def test_a_residual_counts_only_once_its_reply_was_folded(device: Device, resident: Resident) -> None:
    first, second, third = run_rounds(resident, lambda n: f"{1:064x}" if n == 3 else "", 3)
    exact = exact_delta(device)
    np.testing.assert_array_equal(second, first)
    # Round 2's own residual replaced round 1's as pending, so naming round 1 now commits nothing.
    np.testing.assert_array_equal(third, first)
    resident.handle(make_plan(LAYOUT, round=4, plan_id=f"{4:064x}", folded=f"{3:064x}", codec=Codec.INT4))
    stored = resident.state.load_vector("demo", "residual.b", {})
    assert stored is not None
    np.testing.assert_allclose(stored.vector, exact - third, rtol=0, atol=1e-8)


def test_alternating_phases_keep_one_residual_a_group(resident: Resident) -> None:
    resident.handle(make_plan(LAYOUT, phase=Phase.B, plan_id="b" * 64, codec=Codec.INT4))
    both = start_snapshots(LAYOUT, moved=True)[:2]
    resident.handle(
        make_plan(LAYOUT, phase=Phase.A, plan_id="a" * 64, folded="b" * 64, snapshots=both, codec=Codec.INT4)
    )
    resident.handle(
        make_plan(LAYOUT, phase=Phase.B, plan_id="c" * 64, folded="a" * 64, snapshots=both, codec=Codec.INT4)
    )
    for group, plan_id in (("b", "b"), ("a", "a")):
        stored = resident.state.load_vector("demo", f"residual.{group}", {})
        assert stored is not None and stored.labels["plan_id"] == plan_id * 64
    pending = resident.state.load_vector("demo", "pending.b", {})
    assert pending is not None and pending.labels["plan_id"] == "c" * 64


def test_the_residual_decays_as_the_plan_says(device: Device, resident: Resident) -> None:
    first, second = run_rounds(resident, lambda n: f"{n - 1:064x}" if n > 1 else "", 2, residual_decay=0.0)
    np.testing.assert_array_equal(first, second)


def test_a_federation_of_another_seed_starts_without_a_residual(resident: Resident) -> None:
    run_rounds(resident, lambda n: f"{n - 1:064x}" if n > 1 else "", 2)
    with_other = resident.handle(make_plan(LAYOUT, seed=99, plan_id="9" * 64, codec=Codec.FP32))
    assert with_other.kind == "update"
    labels = {"seed": "99"}
    assert resident.state.load_vector("demo", "residual.b", labels) is None


# Privacy -----------------------------------------------------------------------------------------------------------


def test_clipping_bounds_everything_the_device_adds_residual_included(resident: Resident) -> None:
    for n, folded in ((1, ""), (2, f"{1:064x}"), (3, f"{2:064x}")):
        reply = resident.handle(
            make_plan(LAYOUT, plan_id=f"{n:064x}", folded=folded, codec=Codec.INT4, clip_norm=0.05, round=n)
        )
        assert unseal(reply, Update).norm <= 0.05
        # Four bits round each block of 64 by at most half a step.
        assert np.linalg.norm(delta_of(reply)) <= 0.05 * 1.25


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_a_clipped_norm_is_never_above_the_bound(values: list[float], most: float) -> None:
    vector = np.asarray(values, np.float32)
    clipped = clip_norm(vector, most)
    norm = float(np.sqrt(np.sum(np.square(clipped, dtype=np.float64))))
    assert norm <= most
    if np.linalg.norm(vector.astype(np.float64)) > most:
        assert norm == pytest.approx(most, rel=2e-6)
    else:
        assert clipped is vector


def test_noise_has_the_plans_deviation_over_the_weight_and_no_part_in_the_residual(
    device: Device, resident: Resident
) -> None:
    exact = exact_delta(device)
    changes = {"noise_std": 2.0, "clip_norm": 1e6, "codec": Codec.FP32}
    quiet = delta_of(resident.handle(make_plan(LAYOUT, plan_id="1" * 64, weight_cap=1, **changes)))
    loud = resident.handle(make_plan(LAYOUT, plan_id="2" * 64, weight_cap=8, **changes))
    assert unseal(loud, Update).weight == 8
    # 384 draws: the deviation of the estimate is 2 / sqrt(2 * 384), 3.6 %; five of them.
    assert (quiet - exact).std() == pytest.approx(2.0, rel=0.18)
    assert (delta_of(loud) - exact).std() == pytest.approx(0.25, rel=0.18)
    assert abs(np.corrcoef(quiet - exact, delta_of(loud) - exact)[0, 1]) < 0.26
    pending = resident.state.load_vector("demo", "pending.b", {})
    assert pending is not None and np.abs(pending.vector).max() < 1e-6


def test_noise_is_never_repeated_for_another_answer(device: Device, resident: Resident, tmp_path: Path) -> None:
    plan = make_plan(LAYOUT, noise_std=1.0)
    first = resident.handle(plan)
    assert resident.handle(plan) == first
    (tmp_path / "state/federations/demo/replies" / ("1" * 64)).unlink()
    assert resident.handle(plan) != first


class OpenSessions:
    """Masks of zero."""

    def __init__(self) -> None:
        self.seen: list[tuple[np.ndarray, int]] = []

    def mask(self, plan: Plan, codes: np.ndarray, sizes: tuple[int, ...], weight: int) -> bytes:
        assert sum(sizes) == codes.size
        self.seen.append((codes, weight))
        return codes.astype("<i4").tobytes()

    def handle(self, envelope: Envelope) -> Envelope:
        return Envelope("maskkeys", dict(envelope.header))


def test_a_masked_plan_goes_out_as_integers_and_keeps_what_they_lose(device: Device, resident: Resident) -> None:
    sessions = OpenSessions()
    resident.sessions = sessions  # type: ignore[assignment]
    exact = exact_delta(device)
    scale = float(np.abs(exact).max()) / 20
    mask = MaskPlan("5" * 64, 24, (scale, scale), 127)
    reply = resident.handle(make_plan(LAYOUT, mask=mask, weight_cap=4, noise_std=3.0))
    update, (codes, weight) = unseal(reply, Update), sessions.seen[0]
    assert weight == update.weight == 4 and update.norm == 0.0
    assert reply.payload == codes.astype("<i4").tobytes()
    np.testing.assert_array_equal(codes, np.rint(exact.astype(np.float64) / scale))
    pending = resident.state.load_vector("demo", "pending.b", {})
    assert pending is not None
    np.testing.assert_allclose(pending.vector, exact - (codes * scale).astype(np.float32), rtol=0, atol=1e-7)


def test_a_masked_plan_without_a_session_is_declined(resident: Resident) -> None:
    mask = MaskPlan("5" * 64, 24, (1e-3, 1e-3), 127)
    assert reason_of(resident.handle(make_plan(LAYOUT, mask=mask))) is Reason.INVALID


def test_a_device_that_would_decline_the_plan_declines_the_invitation(device: Device, resident: Resident) -> None:
    resident.sessions = OpenSessions()  # type: ignore[assignment]
    assert resident.handle(Envelope("maskinvite", {})).kind == "maskkeys"
    device.not_ready = Decline(Reason.HEAT, "hot", 5.0)
    assert reason_of(resident.handle(Envelope("maskinvite", {}))) is Reason.HEAT
    # Others count on what it began.
    assert resident.handle(Envelope("maskunmask", {})).kind == "maskkeys"


# Refusals ----------------------------------------------------------------------------------------------------------


def test_what_the_device_cannot_do_now_is_declined_by_its_reason(device: Device, resident: Resident) -> None:
    device.not_ready = Decline(Reason.BATTERY, "at 5%", 300.0)
    assert unseal(resident.handle(make_plan(LAYOUT)), Decline) == device.not_ready
    device.not_ready = None
    device.stopping = True
    assert reason_of(resident.handle(make_plan(LAYOUT))) is Reason.BUSY
    device.stopping = False
    device.trainer.fail = BackendError("the runtime fell over")
    failed = unseal(resident.handle(make_plan(LAYOUT)), Decline)
    assert failed.reason is Reason.BUSY and "fell over" in failed.detail and failed.retry_after_s > 0
    device.trainer.fail = None
    assert resident.handle(make_plan(LAYOUT)).kind == "update"


def test_no_text_is_declined_as_no_data(device: Device, resident: Resident) -> None:
    (device.directory / "text/notes.txt").write_text("")
    assert reason_of(resident.handle(make_plan(LAYOUT))) is Reason.DATA


def test_a_device_that_is_too_slow_says_so_at_once_and_forgets_it_in_time(device: Device, resident: Resident) -> None:
    device.trainer.on_step = lambda: setattr(device.clock, "now", device.clock.now + 10.0)
    assert resident.handle(make_plan(LAYOUT, steps=2, batch_sequences=3)).kind == "update"
    assert unseal(resident.handle(greet(LAYOUT)), Profile).step_s == 10.0
    steps = len(device.trainer.calls)
    # Twice the sequences take twice as long.
    tight = {"steps": 2, "batch_sequences": 6, "deadline_s": 39.0}
    assert reason_of(resident.handle(make_plan(LAYOUT, plan_id="2" * 64, **tight))) is Reason.DEADLINE
    assert len(device.trainer.calls) == steps
    device.trainer.on_step = lambda: None
    replies = [resident.handle(make_plan(LAYOUT, plan_id="3" * 64, **tight)).kind for _ in range(6)]
    assert replies[-1] == "update"


def test_a_plan_without_a_greeting_or_of_another_layout_is_declined(device: Device) -> None:
    fresh = device.start()
    assert reason_of(fresh.handle(make_plan(LAYOUT))) is Reason.LAYOUT
    fresh.handle(greet(LAYOUT))
    assert reason_of(fresh.handle(make_plan(small_layout(ranks=(4,))))) is Reason.LAYOUT
    assert fresh.handle(make_plan(LAYOUT)).kind == "update"


def test_a_package_of_another_base_does_not_train_what_an_older_one_was_greeted_for(device: Device) -> None:
    assert device.start().handle(greet(LAYOUT)).kind == "profile"
    device.manifest = small_manifest("cd" * 32)
    assert reason_of(device.start().handle(make_plan(LAYOUT))) is Reason.LAYOUT


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_tokens": 17},
        {"phase": Phase.CORE},
        {"rank": 3},
        {"payload_sha256": "0" * 64},
        {"parts": ()},
        {"steps": 0},
        {"learning_rate": float("nan")},
    ],
)
def test_a_plan_that_makes_no_sense_is_invalid(device: Device, resident: Resident, changes: dict[str, object]) -> None:
    plan = make_plan(LAYOUT)
    fields = dict(plan.header) | {k: getattr(v, "value", v) for k, v in changes.items()}
    assert reason_of(resident.handle(Envelope("plan", fields, plan.payload))) is Reason.INVALID
    assert device.trainer.calls == []


def test_an_update_that_cannot_be_encoded_is_declined_and_leaves_no_trace(resident: Resident) -> None:
    huge = np.full(LAYOUT.size(("b",), 4), 7e4, np.float32)
    labels = {"layout": LAYOUT.digest, "seed": str(SEED), "rank": "4"}
    resident.state.save_vector("demo", "residual.b", huge, labels)
    decline = unseal(resident.handle(make_plan(LAYOUT, codec=Codec.FP16)), Decline)
    assert decline.reason is Reason.INVALID and "65504" in decline.detail
    assert resident.state.load_vector("demo", "pending.b", {}) is None
    assert resident.handle(make_plan(LAYOUT, codec=Codec.FP32)).kind == "update"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KINDS = ("hello", "plan", "scoreplan", "maskinvite", "maskroster", "maskdelivery", "maskunmask", "score", "x")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_message_makes_it_raise(resident: Resident, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    good = {"plan": make_plan(LAYOUT), "scoreplan": make_score_plan(LAYOUT), "hello": greet(LAYOUT)}.get(kind)
    header = dict(good.header) if good else data.draw(st.dictionaries(st.text(max_size=8), ANYTHING, max_size=5))
    if header and data.draw(st.booleans()):
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(ANYTHING)
    reply = resident.handle(Envelope(kind, header, data.draw(st.binary(max_size=64))))
    assert reply.kind in ("decline", "profile", "update", "score")
    if reply.kind == "decline":
        unseal(reply, Decline)


def test_a_hello_is_not_what_a_device_sends(resident: Resident) -> None:
    assert reason_of(resident.handle(seal(Decline(Reason.BUSY, "", 0.0)))) is Reason.INVALID
    assert unseal(greet(LAYOUT), Hello).federation == "demo"
    assert isinstance(resident.trainer, LinearTrainer)
