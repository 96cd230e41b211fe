"""The simulator against plain autograd, torch's AdamW and the project's codec, at tiny sizes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.federated_trial import plan, report
from benchmarks.federated_trial.adapters import Lora, core_between
from benchmarks.federated_trial.methods import Method, Run, phase_of
from benchmarks.federated_trial.model import Shape, head_losses, initial_base, window_losses
from benchmarks.federated_trial.rounds import Record, Setting, adam_step, client_gradients, train_group
from benchmarks.federated_trial.serving import (
    average_states,
    broadcast,
    fold,
    received_bytes,
    sent_updates,
    start_server,
)
from benchmarks.federated_trial.text import federate
from benchmarks.federated_trial.wire import HEADER_BYTES, decoded, encoded_bytes
from edge_runtime.formats import codec

SHAPE = Shape(vocabulary=96, hidden=16, layers=2, heads=2, inner=32, context=8)
LORA = Lora(SHAPE, rank=4)


@pytest.fixture(scope="module")
def base():
    return initial_base(SHAPE, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def federation():
    letters = torch.Generator().manual_seed(3)
    texts = {
        f"client {i}": "".join(map(chr, torch.randint(97, 97 + 5 + i, (200,), generator=letters))) for i in range(4)
    }
    return federate("toy", texts, SHAPE.context, 2)


def plain_loss(base, vector, adapter, tokens):
    """One client with explicit low-rank side branches; nothing merged, nothing batched by client."""

    def linear(slot, states):
        left, right = pairs[slot]
        out = [
            states @ base.linears[slot][k].T + adapter.scale * (states @ right[k].T) @ left[k].T
            for k in range(len(base.linears[slot]))
        ]
        return torch.cat(out, -1)

    def block(hidden, qkv, o, gate_up, down, first, second, cosine, sine, heads):
        layer = next(layers)
        width, context = SHAPE.hidden, SHAPE.context
        norm = lambda x, g: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * g  # noqa: E731
        x = hidden.view(-1, context, width)
        q, k, v = (
            t.view(-1, context, heads, width // heads) for t in linear(4 * layer, norm(x, first)).split(width, -1)
        )
        half = width // heads // 2
        turn = lambda t: t * cosine[:, None] + torch.cat((-t[..., half:], t[..., :half]), -1) * sine[:, None]  # noqa: E731
        scores = torch.einsum("bihd,bjhd->bhij", turn(q), turn(k)) / (width // heads) ** 0.5
        hidden_future = torch.ones(context, context).triu(1).bool()
        weights = scores.masked_fill(hidden_future, float("-inf")).softmax(-1)
        x = x + linear(4 * layer + 1, torch.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape))
        gate, up = linear(4 * layer + 2, norm(x, second)).chunk(2, -1)
        x = x + linear(4 * layer + 3, torch.nn.functional.silu(gate) * up)
        return x.view(hidden.shape)

    pairs = adapter.factors(vector[None])
    layers = itertools.count()
    unused = [w.reshape(1, -1, w.shape[-1]) for w in base.linears]
    return window_losses(unused, base, SHAPE, tokens[None], block, head_losses)[0]


def random_vectors(adapter, rows):
    generator = torch.Generator().manual_seed(5)
    initial = adapter.initial(generator)
    return initial + 0.1 * torch.randn(rows, len(initial), generator=generator)


def adapters(base):
    return {"lora": LORA, "core": core_between(SHAPE, 4, base.linears, torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("kind", ["lora", "core"])
def test_batched_gradients_equal_those_of_each_client_alone(base, kind):
    adapter = adapters(base)[kind]
    values = random_vectors(adapter, 6)
    tokens = torch.randint(96, (6, 3, SHAPE.context + 1), generator=torch.Generator().manual_seed(7))
    stacked = [torch.stack([w, 2 * w]) for w in base.linears]  # two runs, of which the second has another base
    batched = client_gradients(values, stacked, tokens, Setting(SHAPE), adapter, base)
    for row in (0, 2):
        vector = values[row].clone().requires_grad_()
        (expected,) = torch.autograd.grad(plain_loss(base, vector, adapter, tokens[row]), vector)
        torch.testing.assert_close(batched[row], expected, rtol=2e-4, atol=2e-6)
    assert expected.abs().max() > 1e-3


def test_adam_step_is_torchs_adamw_and_leaves_frozen_values():
    generator = torch.Generator().manual_seed(2)
    values, rates = torch.randn(3, 5, generator=generator), torch.tensor([[1e-2], [1e-3], [0.0]]).expand(3, 5)
    ours, first, second = values.clone(), torch.zeros(3, 5), torch.zeros(3, 5)
    theirs = [torch.nn.Parameter(row.clone()) for row in values]
    optimizers = [torch.optim.AdamW([p], lr=float(r[0])) for p, r in zip(theirs, rates, strict=True)]
    for step in range(1, 6):
        gradient = torch.randn(3, 5, generator=generator)
        ours, first, second = adam_step(
            ours, gradient, first, second, rates, torch.tensor(float(step)), torch.full((3, 1), float(step))
        )
        for parameter, row, optimizer in zip(theirs, gradient, optimizers, strict=True):
            parameter.grad = row.clone()
            optimizer.step()
    torch.testing.assert_close(ours, torch.stack([p.detach() for p in theirs]), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours[2], values[2])


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4"])
def test_wire_decodes_and_counts_as_the_project_codec(name):
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(3, 256, generator=generator) * torch.logspace(-6, 2, 256)
    values[1, :64] = 0
    for row, ours in zip(values.numpy(), decoded(values, name).numpy(), strict=True):
        raw = codec.encode(row, [256], codec.Codec(name))
        np.testing.assert_array_equal(ours, codec.decode(raw, [256], codec.Codec(name)))
        assert len(raw) == encoded_bytes(256, name)


@pytest.mark.parametrize("phase", ["a", "b"])
def test_one_trained_factor_averages_to_the_mean_of_the_products(base, phase):
    server = start_server(Method("x"), LORA, base.linears, 3, 0, torch.device("cpu"))
    vectors = random_vectors(LORA, 3)
    server.state = vectors[0].clone()
    where = LORA.parts[phase]
    updates = torch.zeros_like(vectors)
    updates[:, where] = vectors[:, where] - server.state[where]
    clients = [left @ right for left, right in LORA.factors(server.state + updates)]
    fold(server, updates, (phase,), LORA, server.state)
    for products, (left, right) in zip(clients, LORA.factors(server.state[None]), strict=True):
        mean = np.average(products.view(3, -1, *products.shape[1:]).numpy(), axis=0)
        np.testing.assert_allclose((left @ right).numpy(), mean, atol=1e-6)


def test_stacking_adds_the_mean_product_to_the_base(base):
    server = start_server(Method("s", phases="stack"), LORA, base.linears, 3, 0, torch.device("cpu"))
    vectors = random_vectors(LORA, 3)
    fold(server, vectors - server.initial, ("a", "b"), LORA, server.initial)
    left, right = LORA.factors(vectors)[0]
    expected = base.linears[0] + LORA.scale * (left @ right).view(3, 3, 16, 16).mean(0)
    torch.testing.assert_close(server.linears[0], expected)


def test_feedback_makes_the_sum_of_messages_the_sum_of_updates(base):
    cohort = torch.tensor([2, 0])
    server = start_server(Method("x", up="int4"), LORA, base.linears, 3, 0, torch.device("cpu"))
    update = random_vectors(LORA, 2)
    received = sum(sent_updates(server, update, cohort, ("a", "b"))[0] for _ in range(20))
    torch.testing.assert_close(received + server.client_residuals[cohort], 20 * update, rtol=1e-4, atol=1e-4)
    assert server.client_residuals[cohort].abs().max() < 0.1
    assert not server.client_residuals[1].any()


@pytest.mark.parametrize("down", ["int4", "int8"])
def test_the_server_adopts_what_clients_decode_and_loses_nothing_for_good(base, down):
    server = start_server(Method("x", down=down), LORA, base.linears, 3, 0, torch.device("cpu"))
    step = 0.01 * random_vectors(LORA, 1)
    for round_index in range(30):
        fold(server, step, ("a", "b"), LORA, server.state)
        broadcast(server, ("a", "b"), round_index)
        shown = server.state - server.initial
        torch.testing.assert_close(decoded(shown, down), shown, rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(server.state + server.residual, server.initial + 30 * step[0], rtol=1e-4, atol=1e-5)


def test_clients_pay_for_what_they_do_not_hold(base):
    server = start_server(Method("x", down="int8"), LORA, base.linears, 4, 0, torch.device("cpu"))
    size = {part: encoded_bytes(where.stop - where.start, "int8") for part, where in LORA.parts.items()}
    cohort = torch.tensor([0, 1])
    assert received_bytes(server, cohort) == 2 * HEADER_BYTES  # round 0 follows from the seed
    broadcast(server, ("b",), 0)
    assert received_bytes(server, cohort) == 2 * (HEADER_BYTES + size["b"])
    broadcast(server, ("a",), 1)
    assert received_bytes(server, torch.tensor([1, 2])) == 2 * HEADER_BYTES + 2 * size["a"] + size["b"]
    _, up = sent_updates(server, torch.zeros(2, len(server.state)), cohort, ("a",))
    assert up == 2 * (HEADER_BYTES + encoded_bytes(LORA.parts["a"].stop, "fp32"))


def test_a_chain_costs_the_updates_missed_at_most_a_snapshot(base):
    server = start_server(Method("x", down="chain"), LORA, base.linears, 4, 0, torch.device("cpu"))
    where = LORA.parts["b"]
    count = where.stop - where.start
    for round_index in range(5):
        fold(server, 0.01 * random_vectors(LORA, 2), ("b",), LORA, server.state)
        broadcast(server, ("b",), round_index)
        if round_index == 1:
            assert received_bytes(server, torch.tensor([0])) == HEADER_BYTES + 2 * encoded_bytes(count, "int4")
    assert received_bytes(server, torch.tensor([1])) == HEADER_BYTES + encoded_bytes(count, "fp16")
    assert torch.equal(server.state[where].half().float(), server.state[where])


def test_phases_follow_the_method():
    alternating = Method("x", phases="alternating", warmup_rounds=2, block_rounds=2)
    assert [phase_of(alternating, i, None)[0] for i in range(8)] == list("bbaabbaa")
    auto = Method("x", phases="auto")
    assert [phase_of(auto, i, None) for i in range(2)] == [("a", "b")] * 2
    assert [phase_of(auto, i, 2)[0] for i in range(2, 5)] == list("aba")


def test_equal_seeds_start_alike_and_training_lowers_the_loss(base, federation):
    methods = [Method("FedIT fp32", rounds=3), Method("alternating", phases="alternating", rounds=3)]
    runs = plan.runs(methods, [3e-2], [0], "toy", 4)
    setting = Setting(SHAPE, cohort=2, batch=4)
    *_, records = train_group(runs, setting, LORA, base, federation)
    assert records[0].losses[0] == pytest.approx(records[1].losses[0], abs=1e-6)
    assert all(record.losses[-1] < record.losses[0] - 0.1 for record in records)
    assert 2 * records[1].up_bytes[0] == pytest.approx(records[0].up_bytes[0], rel=0.3)


def record(name, seed, losses, bytes_a_round):
    rounds = len(losses) - 1
    run = Run(Method(name), 1e-3, seed, "toy", 10)
    return Record(run, losses, [bytes_a_round] * rounds, [0] * rounds, [0.5] * rounds, averaged={6: losses})


def test_the_table_counts_bytes_until_each_methods_own_seeds_reach_the_reference():
    records = [record("FedIT fp32", 1, [3.0, 2.0, 1.0], 100), record("FedIT fp32", 2, [3.0, 2.0, 1.6], 100)]
    records += [record("ours", 2, [3.0, 1.5, 0.9], 10), record("never", 1, [3.0, 2.9, 2.8], 1)]
    found = {curve.method: curve for curve in report.curves(records)}
    bar = report.bars(list(found.values()))
    assert bar == {1: 1.0, 2: 1.6}
    reached = {
        name: found[name].bytes_to(report.target_of(found[name], bar)) for name in ("FedIT fp32", "ours", "never")
    }
    assert reached == {"FedIT fp32": 200, "ours": 10, "never": float("inf")}
    (ours,) = [line for line in report.tables(records).splitlines() if line.startswith("| ours |")]
    assert "| 1 (1) | 0.0 | 20.00x |" in ours


def test_records_survive_a_file_and_name_the_runs_they_hold(tmp_path):
    written = [record("FedIT fp32", 1, [3.0, 2.0, float("inf")], 100)]
    report.write_records(written, tmp_path / "records.json")
    (read,) = report.read_records(tmp_path / "records.json")
    assert read == written[0]
    assert read.run in {written[0].run}


def test_stacking_pays_for_every_factor_missed_or_the_dense_base(base):
    server = start_server(Method("s", phases="stack", up="fp16"), LORA, base.linears, 4, 0, torch.device("cpu"))
    values = len(server.state)
    broadcast(server, ("a", "b"), 0)
    assert received_bytes(server, torch.tensor([0])) == HEADER_BYTES + 2 * values
    broadcast(server, ("a", "b"), 49)
    dense = sum(linear.numel() for linear in base.linears)
    assert received_bytes(server, torch.tensor([0])) == HEADER_BYTES + 2 * dense


def test_a_running_mean_weighs_late_states_and_forgets_the_start(base):
    server = start_server(Method("x"), LORA, base.linears, 2, 0, torch.device("cpu"), (6,))
    states = [float(i) for i in range(1, 30)]
    for t, value in enumerate(states):
        server.state = torch.full_like(server.state, value)
        average_states(server, t)
    weights = np.ones(0)
    for t in range(1, 30):
        weights = np.append(weights * (1 - 7 / (t + 6)), 7 / (t + 6))
    assert float(server.averages[6][0]) == pytest.approx(np.average(states, weights=weights), rel=1e-4)
    assert weights[0] < 1e-4 < weights[-1]


def test_nesterov_begins_as_averaging_and_ends_at_its_rate(base):
    server = start_server(
        Method("x", server="nesterov", server_rate=2.0), LORA, base.linears, 2, 0, torch.device("cpu")
    )
    step, moved = torch.ones(1, len(server.state)), []
    for _ in range(200):
        before = server.state.clone()
        fold(server, step, ("a", "b"), LORA, server.state)
        moved.append(float((server.state - before)[0]))
    assert moved[0] == pytest.approx(1.0)
    assert moved[-1] == pytest.approx(2.0, abs=1e-3)
    assert all(later > earlier - 1e-3 for earlier, later in itertools.pairwise(moved))


def test_local_options_change_what_a_client_sends(base, federation):
    plain = Method("x", rounds=1)
    methods = [plain, replace(plain, local_decay=True), replace(plain, local_average=True)]
    setting = Setting(SHAPE, cohort=2, batch=4)
    (records,) = train_group(plan.runs(methods, [3e-2], [0], "toy", 6), setting, LORA, base, federation)
    first, decayed, averaged = (record.drifts[0] for record in records)
    assert len({first, decayed, averaged}) == 3
    losses = [record.losses[-1] for record in records]
    assert losses[0] < min(losses[1:]) < max(losses) < records[0].losses[0]
