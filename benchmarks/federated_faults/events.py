"""What goes wrong and when, drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.federated_faults.device import FLIP, HONEST, LATE, NAN

SERVER_APP, SUPERLINK = "ServerApp", "SuperLink"
FIRST_ROUND = 3  # before it there is nothing that could be lost
MOST_SUPERLINK_KILLS = 4  # `up` gives up after the fifth death within ten minutes
Schedule = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, slots=True)
class Kill:
    """Processes that are killed with signal 9 at one moment.

    Attributes:
        after: The round whose commit starts the clock.
        fraction: Of a median round that passes until the signal: 0 is between two rounds.
        victims: SERVER_APP, SUPERLINK or a device's name.
    """

    after: int
    fraction: float
    victims: tuple[str, ...]


def draw_kills(rounds: int, devices: Sequence[str], seed: int) -> list[Kill]:
    """Kills of every kind, two rounds apart at least, in the order of their rounds."""
    rng = np.random.default_rng([seed, 0])
    places = np.arange(FIRST_ROUND, rounds - 1, 2)
    count = min(len(places), max(4, rounds // 4))
    chosen = sorted(rng.permutation(places)[:count].tolist())
    links = min(MOST_SUPERLINK_KILLS, max(1, count // 4))
    apps = max(1, count // 3)

    def device() -> str:
        return str(rng.choice(list(devices)))

    kinds: list[tuple[str, ...]] = [(SUPERLINK,)] * links + [(SERVER_APP,)] * apps
    kinds += [(SERVER_APP, device())]  # two at once
    kinds += [(device(),) for _ in range(count - len(kinds))]
    order = rng.permutation(len(kinds))
    return [
        Kill(after, round(float(rng.uniform(0, 1)), 2), kinds[place])
        for after, place in zip(chosen, order, strict=True)
    ]


def draw_conduct(rounds: int, devices: Sequence[str], seed: int) -> Schedule:
    """Which device sends NaN, flips its signs or is late in which rounds: one in five rounds, one device each."""
    rng = np.random.default_rng([seed, 1])
    numbers = rng.permutation(np.arange(FIRST_ROUND, rounds))[: max(3, rounds // 5)]
    schedule: dict[str, dict[int, str]] = {name: {} for name in devices}
    for place, number in enumerate(numbers.tolist()):
        schedule[str(rng.choice(list(devices)))][int(number)] = (NAN, LATE, FLIP)[place % 3]
    return schedule


def conduct_in(schedule: Schedule, device: str, number: int) -> str:
    """What a device does in a round."""
    return schedule[device].get(number, HONEST)
