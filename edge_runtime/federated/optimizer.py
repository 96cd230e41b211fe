"""AdamW over named factors, in NumPy: the same update on a phone without torch as on a mini-PC with it.

Everything is a plain array under a plain name, so that a client can keep its optimizer's state in one safetensors
file between rounds, and equal inputs give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Factors = dict[str, NDArray[np.float32]]
State = dict[str, NDArray[np.generic]]
STEPS, FIRST_MOMENT, SECOND_MOMENT = ".steps", ".first_moment", ".second_moment"
_NORM_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True)
class AdamW:
    """Settings of Loshchilov and Hutter's AdamW (arXiv:1711.05101); the defaults are torch's."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01


def adamw_step(
    settings: AdamW,
    factors: Mapping[str, NDArray[np.float32]],
    gradients: Mapping[str, NDArray[np.float32]],
    state: Mapping[str, NDArray[np.generic]],
) -> tuple[Factors, State]:
    """One step; neither argument is changed.

    Args:
        settings: Learning rate and the rest.
        factors: What is trained, by name.
        gradients: Of the loss by factor. A factor without one stays as it is, its state too.
        state: What the step before returned; empty in front of the first.

    Returns:
        (new factors, new state): three arrays a trained factor, ``NAME.steps``, ``.first_moment``, ``.second_moment``.

    Raises:
        KeyError: A gradient belongs to no factor.
        ValueError: A gradient's shape, or that of a stored moment, is not its factor's.
    """
    moved: Factors = dict(factors)
    kept: State = dict(state)
    for name in sorted(gradients):
        factor, gradient = factors[name], gradients[name]
        steps = int(state.get(name + STEPS, np.zeros((), np.int64))) + 1
        first = np.asarray(state.get(name + FIRST_MOMENT, np.zeros_like(factor)), np.float32)
        second = np.asarray(state.get(name + SECOND_MOMENT, np.zeros_like(factor)), np.float32)
        for given in (gradient, first, second):
            if given.shape != factor.shape:
                raise ValueError(f"{name}: a gradient or moment of shape {given.shape} for a factor of {factor.shape}")
        first = first + np.float32(1 - settings.beta1) * (gradient - first)
        second = np.float32(settings.beta2) * second + np.float32(1 - settings.beta2) * (gradient * gradient)
        moved[name] = _moved(settings, factor, first, second, steps)
        kept[name + STEPS] = np.asarray(steps, np.int64)
        kept[name + FIRST_MOMENT], kept[name + SECOND_MOMENT] = first, second
    return moved, kept


def clip_by_global_norm(gradients: Mapping[str, NDArray[np.float32]], max_norm: float) -> tuple[Factors, float]:
    """Scale all gradients together so that their joint Euclidean norm is at most ``max_norm``.

    Returns:
        (gradients, their norm before clipping).
    """
    norm = global_norm(gradients)
    ratio = np.float32(min(1.0, max_norm / (norm + _NORM_EPSILON)))
    return {name: gradient * ratio for name, gradient in gradients.items()}, norm


def global_norm(arrays: Mapping[str, NDArray[np.float32]]) -> float:
    """Euclidean norm of all numbers of all arrays, summed in float64 in the order of their names."""
    return math.sqrt(math.fsum(float(np.sum(np.square(arrays[name], dtype=np.float64))) for name in sorted(arrays)))


def _moved(
    settings: AdamW, factor: NDArray[np.float32], first: NDArray[np.float32], second: NDArray[np.float32], steps: int
) -> NDArray[np.float32]:
    """Decay, then the step along the bias-corrected moments, rounded where torch rounds."""
    bias1, bias2 = 1 - settings.beta1**steps, 1 - settings.beta2**steps
    decayed = factor * np.float32(1 - settings.learning_rate * settings.weight_decay)
    spread = np.sqrt(second) / np.float32(math.sqrt(bias2)) + np.float32(settings.epsilon)
    return np.asarray(decayed - np.float32(settings.learning_rate / bias1) * (first / spread), np.float32)
