"""Settings of a federation that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_runtime.formats.codec import Codec
from edge_runtime.formats.errors import UserError

if TYPE_CHECKING:
    from server.config import FederationConfig

MAX_WEIGHT_SUM = 2**23  # what the fixed-point sums of a round hold
WEIGHT_UNIT = 16  # of buffered rounds, whose weights stay whole numbers after they are discounted


def conflicts(config: FederationConfig) -> Iterator[str]:
    """One line for each contradiction: field, value, what is allowed, what to do."""
    for check in (_size_conflicts, _privacy_conflicts, _mask_conflicts):
        yield from map(str, check(config))


def _size_conflicts(config: FederationConfig) -> Iterator[UserError]:
    """Numbers that do not go together."""
    ranks, cohort, mode = list(config.adapter.ranks), config.cohort, config.mode
    if ranks != sorted(set(ranks)):
        yield UserError("adapter.ranks", ranks, "different ranks that grow", f"write {sorted(set(ranks))}")
    if len(set(config.adapter.targets)) != len(config.adapter.targets):
        yield UserError(
            "adapter.targets", list(config.adapter.targets), "each projection once", "remove the repetition"
        )
    if config.phases.schedule == "core" and config.phases.warmup_rounds < 1:
        yield UserError(
            "phases.warmup_rounds", 0, "1 or more with schedule core", "a core between A and B = 0 learns nothing"
        )
    if cohort.quorum > cohort.size:
        yield UserError("cohort.quorum", cohort.quorum, f"at most cohort.size ({cohort.size})", "lower the quorum")
    if cohort.longest_deadline_s < cohort.shortest_deadline_s:
        yield UserError(
            "cohort.longest_deadline_s",
            cohort.longest_deadline_s,
            f"at least shortest_deadline_s ({cohort.shortest_deadline_s:g})",
            "raise it",
        )
    unit = WEIGHT_UNIT if mode.name == "buffered" else 1
    if config.local.weight == "sequences" and cohort.selected * config.local.weight_cap * unit > MAX_WEIGHT_SUM:
        yield UserError(
            "local.weight_cap",
            config.local.weight_cap,
            f"at most {MAX_WEIGHT_SUM // (cohort.selected * unit)} for {cohort.selected} devices a round",
            "lower it, or the cohort",
        )
    if mode.name == "buffered" and mode.buffer > cohort.selected:
        yield UserError(
            "mode.buffer",
            mode.buffer,
            f"at most the devices asked ({cohort.selected})",
            "lower it, or raise cohort.size",
        )
    if config.robust.method == "group_median" and not 3 <= config.robust.groups <= cohort.quorum:
        yield UserError(
            "robust.groups",
            config.robust.groups,
            f"3 to cohort.quorum ({cohort.quorum})",
            "a median of fewer than 3 groups protects nothing; an empty group has no mean",
        )
    if config.robust.method == "group_median" and mode.name == "buffered":
        yield UserError("robust.method", "group_median", "none with mode.name buffered", "write mode.name=sync")


def _privacy_conflicts(config: FederationConfig) -> Iterator[UserError]:
    """Combinations that would not protect what they promise."""
    privacy = config.privacy
    if privacy.noise != "none":
        if privacy.clip_norm == 0:
            yield UserError(
                "privacy.clip_norm", 0.0, f"above 0 with privacy.noise {privacy.noise}", "noise is a multiple of it"
            )
        if privacy.noise_multiplier == 0:
            yield UserError(
                "privacy.noise_multiplier",
                0.0,
                f"above 0 with privacy.noise {privacy.noise}",
                "write privacy.noise=none for no noise",
            )
        if config.local.weight != "uniform":
            yield UserError(
                "local.weight", config.local.weight, "uniform with noise", "epsilon counts one clip_norm a device"
            )
        if config.robust.method != "none":
            yield UserError("robust.method", config.robust.method, "none with noise", "epsilon is that of a mean")
    if privacy.noise == "distributed" and not config.secure.enabled:
        yield UserError(
            "privacy.noise",
            "distributed",
            "central without secure.enabled",
            "a device's own share of noise hides it in a masked sum only",
        )


def _mask_conflicts(config: FederationConfig) -> Iterator[UserError]:
    """What masked sums cannot do."""
    secure, cohort = config.secure, config.cohort
    if not secure.enabled:
        return
    if config.mode.name == "buffered":
        yield UserError("mode.name", "buffered", "sync with secure.enabled", "masks cancel within one cohort only")
    if config.codec.up not in (Codec.INT8, Codec.INT4):
        yield UserError(
            "codec.up",
            config.codec.up.value,
            "int8 or int4 with secure.enabled",
            "masked sums are sums of whole numbers",
        )
    groups = config.robust.groups if config.robust.method == "group_median" else 1
    if cohort.quorum < groups * secure.min_cohort:
        yield UserError(
            "cohort.quorum",
            cohort.quorum,
            f"at least {groups} x secure.min_cohort ({groups * secure.min_cohort})",
            "raise quorum and size, or lower robust.groups or min_cohort",
        )
    weight = 1 if config.local.weight == "uniform" else config.local.weight_cap
    largest = (2**31 - 1) // (cohort.selected * weight)
    if secure.largest_code > largest:
        yield UserError(
            "secure.largest_code",
            secure.largest_code,
            f"at most {largest}",
            f"the sum of {cohort.selected} devices of weight {weight} must fit 32 bits",
        )
