from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.formats.broadcast import pack_parts, to_factors, unpack_parts
from edge_runtime.formats.codec import Codec
from edge_runtime.formats.layout import AdapterLayout, Module, Phase, effective_pairs, initial_factors
from server.adapter_state import restore_state, start_state
from server.federation import adapter_digest, change_basis, open_federation
from server.fleet import simulated_layout
from server.rounds import run_federation
from tests.server.simulated import federate, phones, rounds_of
from tests.server.simulated import settings as configured

LAYOUT = AdapterLayout("ab" * 32, (Module("m.k", 24, 16), Module("m.q", 16, 40)), (2, 8), 16.0)
# Largest |error| of a value after a broadcast, as a share of the largest |value| of its block.
SHARE = {Codec.FP32: 0.0, Codec.FP16: 2.0**-11, Codec.INT8: 0.5 / 127 * 1.01, Codec.INT4: 0.5 / 7 * 1.01}


def products(state):
    pairs = effective_pairs(state.layout, state.factors())
    return {name: b.astype(np.float64) @ a.astype(np.float64) for name, (a, b) in pairs.items()}


def changed(codec, seed=3, rounds=3):
    """A state after some changes of both factors, and their exact sums."""
    rng, state = np.random.default_rng(seed), start_state(LAYOUT, 7, codec)
    exact = {group: state.values[group].astype(np.float64) for group in ("a", "b")}
    for number in range(rounds):
        for group in ("a", "b") if number else ("b",):
            change = rng.standard_normal(exact[group].size) * 0.02
            exact[group] = exact[group] + change
            state.apply(group, change)
    return state, exact


def test_the_start_is_derived_and_costs_nothing() -> None:
    state = start_state(LAYOUT, 7, Codec.INT8)
    for name, value in initial_factors(LAYOUT, 7).items():
        np.testing.assert_array_equal(state.factors()[name], value)
    assert state.versions == {"a": 0, "b": 0}
    assert pack_parts(LAYOUT, list(state.snapshots.values()), 8, {})[1] == b""


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(Codec)), st.integers(0, 2**32), st.integers(1, 6))
def test_nothing_is_lost_over_rounds(codec, seed, rounds) -> None:
    state, exact = changed(codec, seed, rounds)
    for group, wanted in exact.items():
        kept = state.values[group].astype(np.float64) + state.residuals[group]
        # What rounding kept back is float32: it is small itself, and its own rounding far smaller.
        largest = (SHARE[codec] + 2.0**-24) * np.abs(wanted).max() + 2.0**-26
        np.testing.assert_allclose(kept, wanted, rtol=0, atol=rounds * 2.0**-24 * largest)


@pytest.mark.parametrize("codec", list(Codec))
def test_devices_of_every_rank_decode_exactly_what_the_server_adopts(codec) -> None:
    state, _ = changed(codec)
    state.enter_core()
    for rank in LAYOUT.ranks:
        parts, payload = pack_parts(LAYOUT, list(state.snapshots.values()), rank, {})
        vectors = unpack_parts(LAYOUT, parts, payload, rank, 7, {})
        device, server = to_factors(LAYOUT, vectors, rank), LAYOUT.prefix(state.factors(), rank)
        assert set(device) == set(server) and len(server) == 6
        for name, value in server.items():
            assert device[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("codec", list(Codec))
def test_rounding_of_a_broadcast_is_bounded(codec) -> None:
    state, _ = changed(codec)
    moved = state.values["b"].astype(np.float64) + state.residuals["b"]
    assert np.abs(state.residuals["b"]).max() <= SHARE[codec] * np.abs(moved).max() + 2.0**-26


@pytest.mark.parametrize("codec", list(Codec))
def test_entering_and_leaving_the_core_keeps_the_product(codec) -> None:
    state, _ = changed(codec)
    before = products(state)
    state.enter_core()
    inside = products(state)
    state.leave_core()
    after = products(state)
    for name, product in before.items():
        # Three rounded factors of norm 1, 1 and the core's; leaving rounds lora_B once.
        bound = 2 * SHARE[codec] * np.linalg.norm(product) * 8 + 2.0**-22
        assert np.abs(inside[name] - product).max() <= bound
        assert np.abs(after[name] - inside[name]).max() <= bound
    assert set(state.versions) == {"a", "b"} == set(state.residuals) == set(state.values)


def test_bases_of_the_core_are_orthonormal_and_every_version_is_new() -> None:
    state, _ = changed(Codec.FP32)
    old = state.newest
    state.enter_core()
    assert sorted(state.versions.values()) == [old + 1, old + 2, old + 3]
    for name, value in state.factors().items():
        if not name.endswith("core"):
            basis = value if name.endswith("lora_A") else value.T
            np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-6)
    versions = state.versions
    state.leave_core()
    assert state.versions == {"a": versions["a"], "b": old + 4}


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_restores_every_bit(codec, inside) -> None:
    state, _ = changed(codec)
    state.average(6.0)
    if inside:
        state.enter_core()
    found = restore_state(LAYOUT, state.arrays(), state.numbers())
    for stored, mine in ((found.values, state.values), (found.residuals, state.residuals), (found.averages, state.averages)):  # fmt: skip  # noqa: E501
        assert {k: v.tobytes() for k, v in stored.items()} == {k: v.tobytes() for k, v in mine.items()}
    assert (found.snapshots, found.newest, found.averaged) == (state.snapshots, state.newest, state.averaged)
    for one in (state, found):
        one.apply("b", np.full(one.values["b"].size, 1e-3))
    assert found.values["b"].tobytes() == state.values["b"].tobytes()


def test_the_running_mean_is_that_of_polynomial_decay() -> None:
    state = start_state(LAYOUT, 7, Codec.FP32)
    seen, weights = [], []
    for number in range(1, 6):
        state.apply("b", np.full(state.values["b"].size, 0.1 * number))
        state.average(6.0)
        seen.append(state.values["b"].astype(np.float64))
        share = 7.0 / (number + 6.0)
        weights = [weight * (1 - share) for weight in weights] + [share]
    expected = np.average(seen, axis=0, weights=weights)
    np.testing.assert_allclose(state.averages["b"], expected, rtol=1e-6)
    offered = LAYOUT.flatten(state.factors(averaged=True), ("b",), 8)
    np.testing.assert_array_equal(offered, state.averages["b"])
    np.testing.assert_array_equal(LAYOUT.flatten(state.factors(), ("b",), 8), state.values["b"])


def test_a_round_loop_enters_the_core_once_and_forgets_the_moments_of_other_bases(tmp_path) -> None:
    config = configured(
        "phases.schedule=core", "phases.warmup_rounds=2", "optimizer.name=fedadam", "rounds=4", "optimizer.average=6"
    )
    run, moments, products_before = federate(config, tmp_path, phones(config)), [], []

    def look(record):
        moments.append(sorted(run.optimizer.state()))
        products_before.append(run.state.averaged)

    run_federation(run, look)
    assert [r["phase"] for r in rounds_of(run)] == ["b", "b", "core", "core"]
    assert moments[1] == ["b.momentum", "b.square"] and moments[2] == moments[3] == ["core.momentum", "core.square"]
    assert products_before == [1, 2, 1, 2]
    assert [r["versions"] for r in rounds_of(run)][2:] == [{"a": 3, "b": 4, "core": 6}, {"a": 3, "b": 4, "core": 7}]


def test_a_core_federation_continued_with_another_schedule_leaves_the_core(tmp_path) -> None:
    first = configured("phases.schedule=core", "phases.warmup_rounds=1", "rounds=2", "codec.down=fp32")
    devices = phones(first)
    run_federation(run := federate(first, tmp_path, devices))
    product, digest = products(run.state), adapter_digest(run)
    then = configured("phases.schedule=ffa", "rounds=3", "codec.down=fp32")
    wire, clock = run.transport, run.clock
    run = open_federation(then, simulated_layout(then), tmp_path, wire, clock=clock, sleep=clock.sleep)
    assert adapter_digest(run) == digest
    change_basis(run, Phase.B)
    for name, value in products(run.state).items():
        np.testing.assert_allclose(value, product[name], atol=1e-7)
    run_federation(run)
    assert set(run.state.versions) == {"a", "b"} and [r["folded"] for r in rounds_of(run)] == [3, 3, 3]
