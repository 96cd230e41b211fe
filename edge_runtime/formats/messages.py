"""What server and devices say to each other.

| from the server | answered by |
| --- | --- |
| ``Hello``: the federation's adapter | ``Profile``: what the device can do; or ``Decline`` |
| ``Plan``: train these steps | ``Update`` with the encoded delta; or ``Decline`` |
| ``ScorePlan``: the loss of an adapter | ``Score``; or ``Decline`` |

The envelope's kind is the name of the class in lower case (``scoreplan``). A round with secure aggregation adds
the messages of ``masking``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from edge_runtime.formats.codec import Codec
from edge_runtime.formats.envelope import (
    MAX_PAYLOAD_BYTES,
    checked,
    choice,
    integer,
    listing,
    number,
    optional,
    record,
    text,
)
from edge_runtime.formats.errors import MessageError
from edge_runtime.formats.layout import GROUPS, AdapterLayout, Module, Phase

PROTOCOL = 1
MAX_ROUND = 10**9
MAX_WEIGHT = 1024
MAX_MODULES = 4096

SHA256 = text(r"[0-9a-f]{64}")
NAME = text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MODULE = text(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,199}")


@dataclass(frozen=True, slots=True)
class Hello:
    """First contact: what the federation trains, before any work is done.

    Attributes:
        modules: (name, in, out) of each adapted projection.
    """

    protocol: int = checked(integer(1, 2**16))
    federation: str = checked(NAME)
    base_digest: str = checked(SHA256)
    modules: tuple[tuple[Any, ...], ...] = checked(listing(listing(lambda value: value, 3), MAX_MODULES))
    ranks: tuple[int, ...] = checked(listing(integer(1, 1024), 16))
    alpha: float = checked(number(1e-3, 1e6))

    def layout(self) -> AdapterLayout:
        """The adapter.

        Raises:
            MessageError: Modules or ranks that make no adapter.
        """
        try:
            modules = tuple(_module(entry) for entry in self.modules)
            return AdapterLayout(self.base_digest, modules, self.ranks, self.alpha)
        except ValueError as error:
            raise MessageError(f"hello: {error}") from error


def hello(federation: str, layout: AdapterLayout) -> Hello:
    """The greeting for an adapter."""
    modules = tuple((module.name, module.in_features, module.out_features) for module in layout.modules)
    return Hello(PROTOCOL, federation, layout.base_digest, modules, layout.ranks, layout.alpha)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a device is and can do.

    Attributes:
        device: Its own name, for people.
        public_key: Raw Ed25519 key (hex) that signs its keys for secure aggregation.
        base_digest: Of the base it holds; another than the federation's ends its part at once.
        rank: The largest rank segment it can train.
        trainer: ``onnx``, ``tflite`` or ``torch``.
        buckets: Sequence lengths it can train, in tokens.
        sequences: Training sequences it holds.
        step_s: Measured seconds per local step; 0 when it never trained.
    """

    device: str = checked(NAME)
    public_key: str = checked(SHA256)
    base_digest: str = checked(SHA256)
    layout_digest: str = checked(SHA256)
    rank: int = checked(integer(1, 1024))
    trainer: str = checked(NAME)
    buckets: tuple[int, ...] = checked(listing(integer(8, 1 << 17), 16))
    sequences: int = checked(integer(0, 2**31))
    step_s: float = checked(number(0, 86400))


@dataclass(frozen=True, slots=True)
class Part:
    """A group of factors in a broadcast's payload; parts follow each other.

    Attributes:
        group: ``a``, ``b`` or ``core``.
        version: Round that made it; 0 is the start that everyone derives from the seed, with no bytes.
        codec: How it is stored.
        size_bytes: Its length; 0 when the device is known to hold this version.
    """

    group: str = checked(text("|".join(GROUPS)))
    version: int = checked(integer(0, MAX_ROUND))
    codec: Codec = checked(choice(Codec))
    size_bytes: int = checked(integer(0, MAX_PAYLOAD_BYTES))


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """How updates of a round are masked: all devices use the same scale, so that integers can be summed.

    Attributes:
        session: Names this attempt; keys and masks are never used in another.
        bits: Width of a field element: the sum of weights times the largest code fits.
        scales: One value a rank segment: a code stands for ``code * scale``.
        largest_code: Codes lie in [-largest_code, largest_code].
    """

    session: str = checked(SHA256)
    bits: int = checked(integer(8, 32))
    scales: tuple[float, ...] = checked(listing(number(1e-20, 1e6), 16))
    largest_code: int = checked(integer(1, 2**23))


@dataclass(frozen=True, slots=True)
class Plan:
    """One round's work for one device.

    Attributes:
        plan_id: The same plan has the same id, before and after a crash; its reply is then the same bytes.
        seed: Start of the factors at version 0 (``initial_factors``).
        data_seed: Order of the device's own sequences.
        rank: Train this prefix.
        learning_rate_b: For lora_B; often larger than for lora_A.
        folded: plan_id of the device's last reply that reached a committed round; its residual may be dropped
            for good. Empty: none.
        clip_norm: Of the update, after the residual is added; 0: none.
        noise_std: Standard deviation of Gaussian noise that the device adds to every value of the weighted update.
        deadline_s: From receipt; a device that cannot make it declines at once.
        parts: What the payload holds.
        payload_sha256: Of the payload.
    """

    federation: str = checked(NAME)
    layout_digest: str = checked(SHA256)
    round: int = checked(integer(1, MAX_ROUND))
    plan_id: str = checked(SHA256)
    phase: Phase = checked(choice(Phase))
    rank: int = checked(integer(1, 1024))
    steps: int = checked(integer(1, 100_000))
    batch_sequences: int = checked(integer(1, 4096))
    sequence_tokens: int = checked(integer(8, 1 << 17))
    learning_rate: float = checked(number(0, 10))
    learning_rate_b: float = checked(number(0, 10))
    weight_decay: float = checked(number(0, 1))
    seed: int = checked(integer(0, 2**63 - 1))
    data_seed: int = checked(integer(0, 2**63 - 1))
    codec: Codec = checked(choice(Codec))
    residual_decay: float = checked(number(0, 1))
    weight_cap: int = checked(integer(1, MAX_WEIGHT))
    clip_norm: float = checked(number(0, 1e6))
    noise_std: float = checked(number(0, 1e6))
    folded: str = checked(text(r"([0-9a-f]{64})?"))
    deadline_s: float = checked(number(1, 30 * 86400))
    mask: MaskPlan | None = checked(optional(record(MaskPlan)))
    parts: tuple[Part, ...] = checked(listing(record(Part), 3))
    payload_sha256: str = checked(SHA256)


@dataclass(frozen=True, slots=True)
class Update:
    """A device's answer to a plan; the payload is the encoded delta of the phase's groups.

    Attributes:
        weight: Whole number in [1, weight_cap]: how much the device's data counts.
        loss_before: Mean token loss on its own training batch at the first step, nats.
        loss_after: The same at the last step.
        norm: Of the update before encoding.
        step_s: Measured seconds per step.
    """

    plan_id: str = checked(SHA256)
    layout_digest: str = checked(SHA256)
    base_digest: str = checked(SHA256)
    round: int = checked(integer(1, MAX_ROUND))
    phase: Phase = checked(choice(Phase))
    rank: int = checked(integer(1, 1024))
    codec: Codec = checked(choice(Codec))
    weight: int = checked(integer(1, MAX_WEIGHT))
    steps: int = checked(integer(0, 100_000))
    tokens: int = checked(integer(0, 2**53))
    loss_before: float = checked(number(0, 1e6))
    loss_after: float = checked(number(0, 1e6))
    norm: float = checked(number(0, 1e12))
    step_s: float = checked(number(0, 86400))
    payload_sha256: str = checked(SHA256)


class Reason(StrEnum):
    """Why a device declines."""

    BATTERY = "battery"
    HEAT = "heat"
    METERED = "metered"
    BUSY = "busy"
    DATA = "data"
    BASE = "base"
    LAYOUT = "layout"
    FACTORS = "factors"  # a part was left out that it does not hold; the next plan brings it
    DEADLINE = "deadline"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Decline:
    """Not now (or, for ``base`` and ``layout``, never in this federation)."""

    reason: Reason = checked(choice(Reason))
    detail: str = checked(text(r"[ -~]{0,200}"))
    retry_after_s: float = checked(number(0, 30 * 86400))


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """Ask for the loss of the given factors on the device's held-out sequences."""

    federation: str = checked(NAME)
    layout_digest: str = checked(SHA256)
    round: int = checked(integer(0, MAX_ROUND))
    rank: int = checked(integer(1, 1024))
    seed: int = checked(integer(0, 2**63 - 1))
    sequence_tokens: int = checked(integer(8, 1 << 17))
    most_sequences: int = checked(integer(1, 4096))
    parts: tuple[Part, ...] = checked(listing(record(Part), 3))
    payload_sha256: str = checked(SHA256)


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of token losses (nats) over ``tokens`` held-out tokens."""

    round: int = checked(integer(0, MAX_ROUND))
    loss_sum: float = checked(number(0, 1e15))
    tokens: int = checked(integer(0, 2**53))


def _module(entry: tuple[Any, ...]) -> Module:
    if len(entry) != 3:
        raise ValueError("a module is a name and two sizes")
    size = integer(1, 1 << 20)
    return Module(MODULE(entry[0]), size(entry[1]), size(entry[2]))
