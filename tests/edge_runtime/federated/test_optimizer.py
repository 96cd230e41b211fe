"""AdamW and clipping against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_runtime.federated.optimizer import AdamW, State, adamw_step, clip_by_global_norm, global_norm

SHAPES = {"q.lora_A": (4, 24), "q.lora_B": (16, 4), "v.lora_B": (8, 4)}
STEPS = 40


def draw(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "settings",
    [AdamW(1e-2), AdamW(3e-3, beta1=0.8, beta2=0.95, epsilon=1e-4, weight_decay=0.3), AdamW(1e-2, weight_decay=0.0)],
)
def test_it_is_torchs_adamw(settings: AdamW) -> None:
    factors, state = draw(0), {}
    parameters = {name: torch.nn.Parameter(torch.tensor(factor)) for name, factor in factors.items()}
    oracle = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    for step in range(STEPS):
        gradients = draw(step + 1)
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        oracle.step()
        factors, state = adamw_step(settings, factors, gradients, state)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(factors[name], parameter.detach().numpy(), rtol=0, atol=1e-6)
        assert factors[name].dtype == np.float32


def test_a_factor_without_a_gradient_stays_and_counts_its_own_steps() -> None:
    settings, factors = AdamW(1e-2), draw(0)
    half = {name: gradient for name, gradient in draw(1).items() if name.endswith("lora_B")}
    moved, state = adamw_step(settings, factors, half, {})
    assert moved["q.lora_A"] is factors["q.lora_A"] and "q.lora_A.steps" not in state
    moved, state = adamw_step(settings, moved, draw(2), state)
    assert (int(state["q.lora_A.steps"]), int(state["q.lora_B.steps"])) == (1, 2)
    fresh, _ = adamw_step(settings, factors, {"q.lora_A": draw(2)["q.lora_A"]}, {})
    assert np.array_equal(moved["q.lora_A"], fresh["q.lora_A"])


def test_a_state_that_went_through_a_file_continues_bit_for_bit() -> None:
    from safetensors.numpy import load, save

    settings = AdamW(1e-2)
    factors, state = adamw_step(settings, draw(0), draw(1), {})
    reloaded: State = load(save(dict(state)))
    straight, _ = adamw_step(settings, factors, draw(2), state)
    resumed, _ = adamw_step(settings, factors, draw(2), reloaded)
    assert all(np.array_equal(straight[name], resumed[name]) for name in SHAPES)


def test_what_is_given_is_not_changed() -> None:
    factors, gradients, state = draw(0), draw(1), {}
    _, state = adamw_step(AdamW(1e-2), factors, gradients, state)
    copies = {name: array.copy() for name, array in state.items()}
    adamw_step(AdamW(1e-2), factors, gradients, state)
    assert all(np.array_equal(array, draw(0)[name]) for name, array in factors.items())
    assert all(np.array_equal(array, copies[name]) for name, array in state.items())


def test_misuse_is_refused() -> None:
    with pytest.raises(KeyError):
        adamw_step(AdamW(1e-2), draw(0), {"other.lora_A": np.zeros((1, 1), np.float32)}, {})
    with pytest.raises(ValueError, match="moment of shape"):
        adamw_step(AdamW(1e-2), draw(0), {"q.lora_A": np.zeros((2, 24), np.float32)}, {})


@pytest.mark.parametrize("max_norm", [0.1, 5.0, 1e4])
def test_clipping_is_torchs(max_norm: float) -> None:
    gradients = draw(3)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    expected = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    assert norm == pytest.approx(expected, rel=1e-6) == pytest.approx(global_norm(gradients), rel=1e-6)
    for name, parameter in zip(SHAPES, parameters, strict=True):
        np.testing.assert_allclose(clipped[name], parameter.grad.numpy(), rtol=1e-6, atol=1e-8)  # type: ignore[union-attr]
