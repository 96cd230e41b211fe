"""What is compared: one row a method, and the runs (a method, a learning rate, a seed) that a row is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

COHORT = 10
PHASES = ("both", "alternating", "auto", "ffa", "core", "stack")


@dataclass(frozen=True, slots=True)
class Method:
    """One way to federate an adapter.

    Attributes:
        name: Its row.
        phases: Which parts are trained when: one of PHASES.
        up: Codec of a client's update.
        down: Codec of the server's state; ``chain`` sends the updates missed instead, in the codec int4.
        feedback: Whether what a codec loses is added to the next message of the same sender.
        from_seed: Whether the state travels as its difference from the seed's initial values.
        server: ``average``, ``momentum``, ``nesterov`` or ``adam``, on the mean update.
        server_rate: Its learning rate; a momentum is a mean of the updates, so that 1 moves as far as averaging, and
            other rates are reached from 1 as the momentum is from 0.
        server_beta: Its momentum, reached from 0 as t / (t + 3), over 0.
        b_ratio: Learning rate of B over that of A.
        warmup_rounds: Rounds in B before alternating.
        block_rounds: Rounds of one phase before the other.
        threshold: Dispersion of the updates at which ``auto`` leaves ``both`` for alternating.
        core_rank: Side of the core.
        core_bases: ``random`` or ``base``, the leading singular vectors of the base's linears.
        residual_decay: What is kept of a client's residual when it is sampled again.
        local_decay: Whether a client's learning rate falls linearly to zero within a round.
        local_average: Whether a client sends the mean of the second half of its steps, not the last.
        keep_second: Whether a client keeps Adam's second moments until it is sampled again.
        rounds: How many; methods with cheap rounds may run longer than the reference.
    """

    name: str
    phases: str = "both"
    up: str = "fp32"
    down: str = "fp32"
    feedback: bool = True
    from_seed: bool = True
    server: str = "average"
    server_rate: float = 1.0
    server_beta: float = 0.9
    b_ratio: float = 1.0
    warmup_rounds: int = 2
    block_rounds: int = 1
    threshold: float = 1.0
    core_rank: int = 0
    core_bases: str = "random"
    residual_decay: float = 1.0
    local_decay: bool = False
    local_average: bool = False
    keep_second: bool = False
    rounds: int = 60


@dataclass(frozen=True, slots=True)
class Run:
    """A method at one learning rate and seed in one federation."""

    method: Method
    learning_rate: float
    seed: int
    federation: str
    local_steps: int


def phase_of(method: Method, round_index: int, switched_at: int | None) -> tuple[str, ...]:
    """The parts trained in a round; ``switched_at`` is the round at which ``auto`` began to alternate."""
    if method.phases == "core":
        return ("core",)
    if method.phases == "ffa":
        return ("b",)
    if method.phases in ("both", "stack") or (method.phases == "auto" and switched_at is None):
        return ("a", "b")
    since = round_index - (switched_at or 0)
    warm = 0 if method.phases == "auto" else method.warmup_rounds
    if since < warm:
        return ("b",)
    return ("a",) if (since - warm) // method.block_rounds % 2 == 0 else ("b",)


def in_codec(method: Method, up: str, down: str) -> Method:
    """The same method with other codecs, named after them."""
    return replace(method, name=f"{method.name} {up}/{down}", up=up, down=down)
