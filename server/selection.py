"""Who takes part in a round, and how long it may take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from edge_runtime.formats.layout import AdapterLayout
from edge_runtime.formats.messages import Profile
from server.config import FederationConfig


@dataclass(slots=True)
class Device:
    """What the server knows of a device, from its profile and its past replies.

    Attributes:
        node: Flower's id; may change when a device is registered anew.
        name: Enrolled name.
        rank: The largest rank segment that it trains.
        held: Group to version of the factors that it holds.
        folded_plan: plan_id of its last reply in a committed round.
        step_s: Measured seconds a local step; 0 when unknown.
        not_before_s: Clock time before which it asked not to be called.
    """

    node: int
    name: str
    public_key: str = ""
    rank: int = 1
    trainer: str = ""
    sequences: int = 0
    step_s: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    folded_plan: str = ""
    not_before_s: float = 0.0
    last_round: int = 0
    last_outcome: str = "enrolled"
    folded: int = 0
    declined: int = 0
    refused: int = 0
    lost: int = 0

    def outcome(self, number: int, outcome: str) -> None:
        """Note how a round ended for it: folded, declined, refused or lost, with a reason behind a colon."""
        self.last_round, self.last_outcome = number, outcome
        counter = outcome.partition(":")[0]
        setattr(self, counter, getattr(self, counter) + 1)

    def to_dict(self) -> dict[str, Any]:
        """For devices.json and checkpoints."""
        return {name: getattr(self, name) for name in self.__slots__}


def device_from_profile(node: int, profile: Profile, layout: AdapterLayout, known: Device | None) -> Device:
    """A device as it describes itself, with what is remembered of it."""
    device = known or Device(node, profile.device)
    device.node, device.public_key = node, profile.public_key
    device.rank = max(rank for rank in layout.ranks if rank <= max(profile.rank, layout.ranks[0]))
    device.trainer, device.sequences = profile.trainer, profile.sequences
    device.step_s = profile.step_s or device.step_s
    return device


def select_cohort(
    config: FederationConfig,
    number: int,
    devices: Iterable[Device],
    now_s: float,
    asked: Mapping[str, int] = MappingProxyType({}),
) -> list[Device]:
    """The devices of a round, over-selection included, best first.

    Every device draws a number from (seed, round, name); the smallest are taken. The order of two devices does not
    depend on who else is there, so a repeated round finds the same cohort. Those who were ``asked`` for this round
    so many times already, by name, come after all who were asked less.
    """
    ready = [device for device in devices if device.not_before_s <= now_s and device.sequences > 0]
    ready.sort(key=lambda device: (asked.get(device.name, 0), _draw(config.seed, number, device.name)))
    return ready[: config.cohort.selected]


def choose_deadline_s(config: FederationConfig, cohort: Iterable[Device]) -> float:
    """Seconds from the plan to the last reply: three times what the slowest measured device needs.

    Devices that were never measured count as needing the longest deadline.
    """
    cohort, bounds = list(cohort), config.cohort
    needed = [config.local.steps * device.step_s * 3.0 for device in cohort if device.step_s > 0]
    if len(needed) < len(cohort) or not needed:
        return bounds.longest_deadline_s
    return min(max(max(needed), bounds.shortest_deadline_s), bounds.longest_deadline_s)


def _draw(seed: int, number: int, name: str) -> bytes:
    return hashlib.sha256(json.dumps([seed, number, name]).encode()).digest()
