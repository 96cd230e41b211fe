"""What the server does with the mean update of a round: FedAvg, FedAvgM, FedAdam, or Nesterov's momentum warmed up.

Nesterov (the default; measured in ``benchmarks/README.md``): the momentum is a running mean of the updates, looked
one step ahead, and momentum and rate grow over the first updates of a group, since early ones would overshoot. Its
rate is at last twice the learning rate.

Source: Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv:2003.00295), algorithm 2; like there, no bias
correction, and the second moment starts at epsilon². FedAvgM: Hsu et al. 2019 (arXiv:1909.06335).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.codec import chunks


class OptimizerName(StrEnum):
    """Which rule."""

    FEDAVG = "fedavg"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"
    NESTEROV = "nesterov"


_STATE = {
    OptimizerName.FEDAVG: (),
    OptimizerName.FEDAVGM: ("momentum",),
    OptimizerName.FEDADAM: ("momentum", "square"),
    OptimizerName.NESTEROV: ("momentum", "count"),
}
_WARM_UP = 3.0  # updates after which the momentum is half, at most, of what it may become


class ServerOptimizer:
    """Turns mean updates into changes of the adapter; one state for each group of factors.

    Args:
        name: The rule.
        learning_rate: 1 with FedAvg: the mean itself, bit for bit.
        momentum: Of FedAvgM and Nesterov; beta1 of FedAdam; in [0, 1).
        beta2: Of FedAdam, in [0, 1).
        epsilon: Of FedAdam (tau in the paper), positive.

    Raises:
        ValueError: A value outside these.
    """

    def __init__(
        self, name: OptimizerName, learning_rate: float, momentum: float, beta2: float, epsilon: float
    ) -> None:
        if not (learning_rate > 0 and 0 <= momentum < 1 and 0 <= beta2 < 1 and epsilon > 0):
            raise ValueError(
                f"learning_rate {learning_rate} and epsilon {epsilon} must be positive, "
                f"momentum {momentum} and beta2 {beta2} in [0, 1)"
            )
        self.name, self.learning_rate = name, learning_rate
        self.momentum, self.beta2, self.epsilon = momentum, beta2, epsilon
        self._state: dict[str, NDArray[np.float32]] = {}

    def step(self, group: str, mean_delta: NDArray[np.float64], idle: Sequence[slice] = ()) -> NDArray[np.float64]:
        """The change to apply to a group.

        Args:
            group: ``a``, ``b`` or ``core``; each has its own momentum.
            mean_delta: float64 (N,), always of the same N for a group.
            idle: Stretches that nobody trained: their change is 0, and their state stays as it is. Without
                this, momentum would move what no device has looked at.

        Returns:
            float64 (N,).

        Raises:
            ValueError: N is not that of the state.
        """
        if self.name is OptimizerName.FEDAVG:
            change = mean_delta * self.learning_rate
        else:
            sizes = {part: 1 if part == "count" else mean_delta.size for part in _STATE[self.name]}
            before = {part: self._part(group, part, size) for part, size in sizes.items()}
            after = {part: np.empty(size, np.float32) for part, size in sizes.items()}
            change = np.empty(mean_delta.size, np.float64)
            for chunk in chunks(0, mean_delta.size):
                places = {part: slice(None) if part == "count" else chunk for part in sizes}
                advanced, change[chunk] = self._advance(
                    {part: before[part][place] for part, place in places.items()}, mean_delta[chunk]
                )
                for part, place in places.items():
                    after[part][place] = advanced[part]
            for part, stored in after.items():
                for stretch in idle if part != "count" else ():
                    stored[stretch] = before[part][stretch]
                self._state[f"{group}.{part}"] = stored
        for stretch in idle:
            change[stretch] = 0.0
        return change

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Everything that the next steps depend on: ``<group>.<part>`` (N,), copies."""
        return {name: value.copy() for name, value in self._state.items()}

    def load_state(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Continue where ``state()`` was taken.

        Raises:
            ValueError: A name or a type that this rule does not keep.
        """
        for name, value in state.items():
            group, _, part = name.partition(".")
            if not group or part not in _STATE[self.name] or value.dtype != np.float32 or value.ndim != 1:
                raise ValueError(f"{name[:80]!r} {value.dtype} {value.shape} is no state of {self.name}")
        self._state = {name: value.copy() for name, value in state.items()}

    def _part(self, group: str, part: str, size: int) -> NDArray[np.float32]:
        stored = self._state.get(f"{group}.{part}")
        if stored is None:
            return np.full(size, self.epsilon**2 if part == "square" else 0.0, np.float32)
        if stored.size != size:
            raise ValueError(f"group {group}: {size} values, the state has {stored.size}")
        return stored

    def _advance(
        self, before: Mapping[str, NDArray[np.float32]], delta: NDArray[np.float64]
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
        """(state afterwards, change); float64 throughout, the caller rounds what is kept."""
        if self.name is OptimizerName.NESTEROV:
            count = float(before["count"][0])
            now = min(self.momentum, count / (count + _WARM_UP))
            momentum = now * before["momentum"].astype(np.float64) + (1.0 - now) * delta
            rate = self.learning_rate * (1.0 + (now / self.momentum if self.momentum else 0.0))
            ahead = now * momentum + (1.0 - now) * delta
            return {"momentum": momentum, "count": np.array([count + 1.0])}, rate * ahead
        momentum = self.momentum * before["momentum"].astype(np.float64)
        if self.name is OptimizerName.FEDAVGM:
            momentum += delta
            return {"momentum": momentum}, self.learning_rate * momentum
        momentum += (1.0 - self.momentum) * delta
        square = self.beta2 * before["square"].astype(np.float64) + (1.0 - self.beta2) * np.square(delta)
        change = self.learning_rate * momentum / (np.sqrt(square) + self.epsilon)
        return {"momentum": momentum, "square": square}, change


def make_optimizer(
    name: str, learning_rate: float = 1.0, momentum: float = 0.9, beta2: float = 0.99, epsilon: float = 1e-3
) -> ServerOptimizer:
    """The optimizer of a configuration.

    Raises:
        ValueError: An unknown name, or a value out of range.
    """
    return ServerOptimizer(OptimizerName(name), learning_rate, momentum, beta2, epsilon)
