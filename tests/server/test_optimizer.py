from __future__ import annotations

import numpy as np
import pytest

from server.ledger import load_checkpoint, save_checkpoint
from server.optimizer import ServerOptimizer, make_optimizer


def draw_means(count=6, size=40, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(scale=10.0 ** generator.uniform(-5, 0), size=size) for _ in range(count)]


def test_fedavg_at_rate_one_is_the_mean_bit_for_bit() -> None:
    optimizer = make_optimizer("fedavg", 1.0)
    for mean in [*draw_means(), np.array([0.0, -0.0, 5e-324, -1e308, 2.0**-37])]:
        change = optimizer.step("b", mean)
        assert change.tobytes() == mean.tobytes() and change is not mean
    assert optimizer.state() == {}


def test_fedavg_scales_by_the_rate() -> None:
    assert make_optimizer("fedavg", 0.5).step("a", np.array([1.0, -3.0])).tolist() == [0.5, -1.5]


def test_fedavgm_is_gradient_descent_with_momentum() -> None:
    """Oracle: torch's SGD on the negative mean (Hsu et al. 2019); the state is float32, hence the bound."""
    torch = pytest.importorskip("torch")
    ours, theirs = np.zeros(40), torch.zeros(40, dtype=torch.float64)
    optimizer, oracle = make_optimizer("fedavgm", 0.7, momentum=0.8), torch.optim.SGD([theirs], lr=0.7, momentum=0.8)
    for mean in draw_means():
        ours += optimizer.step("b", mean)
        theirs.grad = torch.from_numpy(-mean)
        oracle.step()
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-7)


def test_fedadam_is_adam_without_bias_correction() -> None:
    """Oracle: torch's Adam with the correction taken out of its rate and epsilon, and Reddi's start of v."""
    torch = pytest.importorskip("torch")
    rate, beta1, beta2, epsilon = 0.1, 0.8, 0.95, 1e-3
    ours, theirs = np.zeros(40), torch.zeros(40, dtype=torch.float64)
    optimizer = make_optimizer("fedadam", rate, momentum=beta1, beta2=beta2, epsilon=epsilon)
    oracle = torch.optim.Adam([theirs], betas=(beta1, beta2))
    start = torch.full((40,), epsilon**2, dtype=torch.float64)
    oracle.state[theirs] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(theirs), "exp_avg_sq": start}
    for step, mean in enumerate(draw_means(), 1):
        ours += optimizer.step("b", mean)
        theirs.grad = torch.from_numpy(-mean)
        oracle.param_groups[0]["lr"] = rate * (1 - beta1**step) / (1 - beta2**step) ** 0.5
        oracle.param_groups[0]["eps"] = epsilon / (1 - beta2**step) ** 0.5
        oracle.step()
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-7)


def test_the_first_step_of_fedadam_by_hand() -> None:
    # m = 0.1 * 0.3, v = 0.99 * 1e-6 + 0.01 * 0.09
    change = make_optimizer("fedadam", 0.1, momentum=0.9, beta2=0.99, epsilon=1e-3).step("b", np.array([0.3, 0.0]))
    assert change[0] == pytest.approx(0.1 * 0.03 / ((0.99e-6 + 0.0009) ** 0.5 + 1e-3), rel=1e-7)
    assert change[1] == 0.0


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_a_saved_state_continues_bit_for_bit(name, tmp_path) -> None:
    first = make_optimizer(name, 0.3)
    means = draw_means(8)
    for group in ("a", "b"):
        for mean in means[:4]:
            first.step(group, mean if group == "a" else mean[:25])
    save_checkpoint(tmp_path, 4, first.state(), {})
    second = make_optimizer(name, 0.3)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    second.load_state(loaded.arrays)
    for mean in means[4:]:
        for group, delta in (("a", mean), ("b", mean[:25])):
            assert first.step(group, delta).tobytes() == second.step(group, delta).tobytes()
    assert {k: v.tobytes() for k, v in first.state().items()} == {k: v.tobytes() for k, v in second.state().items()}


def test_groups_do_not_share_momentum() -> None:
    optimizer, alone = make_optimizer("fedadam", 0.3), make_optimizer("fedadam", 0.3)
    for mean in draw_means(3):
        optimizer.step("a", mean * 7)
        assert np.array_equal(optimizer.step("b", mean), alone.step("b", mean))
    assert set(optimizer.state()) == {"a.momentum", "a.square", "b.momentum", "b.square"}


def test_a_state_is_a_copy_both_ways() -> None:
    optimizer = make_optimizer("fedavgm", 1.0)
    optimizer.step("a", np.ones(3))
    taken = optimizer.state()
    taken["a.momentum"][:] = 99
    assert optimizer.state()["a.momentum"].tolist() == [1, 1, 1]
    optimizer.load_state(taken)
    taken["a.momentum"][:] = -1
    assert optimizer.state()["a.momentum"].tolist() == [99, 99, 99]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_what_nobody_trained_does_not_move_and_keeps_its_momentum(name) -> None:
    optimizer, untouched = make_optimizer(name, 0.3), make_optimizer(name, 0.3)
    first, second = draw_means(2)
    for one in (optimizer, untouched):
        one.step("b", first)
    before = optimizer.state()
    change = optimizer.step("b", second, idle=[slice(5, 10), slice(30, 40)])
    idle = np.isin(np.arange(40), [*range(5, 10), *range(30, 40)])
    assert not change[idle].any()
    assert np.array_equal(change[~idle], untouched.step("b", second)[~idle]) and change[~idle].all()
    for part, value in optimizer.state().items():
        assert np.array_equal(value[idle], before[part][idle])
        assert np.array_equal(value[~idle], untouched.state()[part][~idle])


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_the_mean_is_not_written_to(name) -> None:
    mean = np.ones(4)
    make_optimizer(name, 0.3).step("b", mean, idle=[slice(0, 2)])
    assert mean.tolist() == [1, 1, 1, 1]


def test_a_group_keeps_its_length() -> None:
    optimizer = make_optimizer("fedadam", 0.3)
    optimizer.step("b", np.ones(4))
    with pytest.raises(ValueError, match="group b: 5 values, the state has 4"):
        optimizer.step("b", np.ones(5))


@pytest.mark.parametrize(
    "state",
    [
        {"b.square": np.zeros(3, np.float32)},
        {"b": np.zeros(3, np.float32)},
        {".momentum": np.zeros(3, np.float32)},
        {"b.momentum": np.zeros(3)},
        {"b.momentum": np.zeros((3, 1), np.float32)},
    ],
)
def test_a_state_of_another_rule_is_refused(state) -> None:
    optimizer = make_optimizer("fedavgm", 0.3)
    with pytest.raises(ValueError, match="is no state of fedavgm"):
        optimizer.load_state({"a.momentum": np.zeros(3, np.float32)} | state)
    assert optimizer.state() == {}


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 0.0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"beta2": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(setting) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_optimizer("fedadam", **setting)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="adagrad"):
        make_optimizer("adagrad")
    zeros: ServerOptimizer = make_optimizer("fedadam", 1e-9, momentum=0.0, beta2=0.0, epsilon=1e-9)
    assert np.isfinite(zeros.step("a", np.zeros(3))).all()
