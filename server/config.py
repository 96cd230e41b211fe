"""A federation's settings: YAML, overrides on the command line, one check that names every fault.

``default.yaml`` holds every default; any other file, and any override, states only what differs from it.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_runtime.formats.codec import Codec
from edge_runtime.formats.errors import ConfigError, UserError
from server.conflicts import conflicts

CONF_DIR = Path(__file__).resolve().parent.parent / "conf" / "federation"
MAX_FILE_BYTES = 64 << 10

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Rank = Annotated[int, Field(ge=1, le=1024)]
LearningRate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1, le=30 * 86400, allow_inf_nan=False)]
Bound = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterConfig(_Strict):
    """What is trained.

    Attributes:
        targets: Projections that carry an adapter, in every layer.
        ranks: Ends of the rank segments, growing; a device trains the largest that it can.
        alpha: The scale is alpha / the largest rank.
    """

    targets: Annotated[tuple[Projection, ...], Field(min_length=1, max_length=7)]
    ranks: Annotated[tuple[Rank, ...], Field(min_length=1, max_length=16)]
    alpha: Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)]


class PhasesConfig(_Strict):
    """Which factors a round trains.

    Attributes:
        schedule: ``alternating`` A and B, ``both``, ``ffa`` (B alone), ``core``, or ``auto`` by dispersion.
        warmup_rounds: Rounds at the start that train B alone.
        turn_rounds: Rounds that a factor is trained before it is the other one's turn.
        dispersion: ``auto`` averages one factor at a time above it; in [0, 1].
    """

    schedule: Literal["alternating", "both", "ffa", "core", "auto"]
    warmup_rounds: Annotated[int, Field(ge=0, le=10**6)]
    turn_rounds: Annotated[int, Field(ge=1, le=10**6)]
    dispersion: Annotated[float, Field(ge=0, le=1)]


class CodecConfig(_Strict):
    """How values travel; ``residual_decay`` is what a device keeps of an old rounding residual."""

    up: Codec
    down: Codec
    residual_decay: Annotated[float, Field(ge=0, le=1)]


class OptimizerConfig(_Strict):
    """How the server applies the mean update; ``average``: decay of the running mean that is offered (0: none)."""

    name: Literal["fedavg", "fedavgm", "fedadam", "nesterov"]
    learning_rate: LearningRate
    momentum: Share
    beta2: Share
    epsilon: Annotated[float, Field(gt=0, le=1)]
    average: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]


class LocalConfig(_Strict):
    """A device's work in a round; ``weight`` says how much its data counts, up to ``weight_cap``."""

    steps: Annotated[int, Field(ge=1, le=100_000)]
    batch_sequences: Annotated[int, Field(ge=1, le=4096)]
    sequence_tokens: Annotated[int, Field(ge=8, le=131_072)]
    learning_rate: LearningRate
    learning_rate_b: LearningRate
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    weight: Literal["uniform", "sequences"]
    weight_cap: Annotated[int, Field(ge=1, le=1024)]


class CohortConfig(_Strict):
    """Who takes part in a round.

    Attributes:
        size: Replies that a round wants.
        over_selection: Devices asked, as a multiple of ``size``.
        quorum: Replies without which a round is not committed.
        patience_s: How long to wait until enough devices are connected.
        shortest_deadline_s: A round waits at least so long; measured device speed decides in between.
        longest_deadline_s: And at most so long.
    """

    size: Annotated[int, Field(ge=1, le=100_000)]
    over_selection: Annotated[float, Field(ge=1, le=10)]
    quorum: Annotated[int, Field(ge=1, le=100_000)]
    patience_s: Seconds
    shortest_deadline_s: Seconds
    longest_deadline_s: Seconds

    @property
    def selected(self) -> int:
        """Devices asked in a round."""
        return math.ceil(round(self.size * self.over_selection, 6))


class GatesConfig(_Strict):
    """What is refused; 0 switches a bound off.

    Attributes:
        norm_factor: An update's norm may be so many times the running median (with masks: the mean's norm).
        max_norm: And at most this.
        loss_rise: A round is undone when held-out loss rises by more than this share.
    """

    norm_factor: Annotated[float, Field(ge=0, le=1e6)]
    max_norm: Bound
    loss_rise: Bound


class RobustConfig(_Strict):
    """``group_median``: the coordinate-wise median of the means of ``groups`` groups of devices."""

    method: Literal["none", "group_median"]
    groups: Annotated[int, Field(ge=1, le=1024)]


class ModeConfig(_Strict):
    """``sync`` rounds, or ``buffered``: commit after every ``buffer`` replies of at most ``max_staleness`` rounds."""

    name: Literal["sync", "buffered"]
    buffer: Annotated[int, Field(ge=1, le=100_000)]
    max_staleness: Annotated[int, Field(ge=0, le=1000)]


class PrivacyConfig(_Strict):
    """Clipping on the device (0: none), Gaussian noise as a multiple of ``clip_norm``, delta of the guarantee."""

    clip_norm: Bound
    noise: Literal["none", "central", "distributed"]
    noise_multiplier: Annotated[float, Field(ge=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=1)]


class SecureConfig(_Strict):
    """Masked sums: the server sees no single update; fewer than ``min_cohort`` are never summed."""

    enabled: bool
    min_cohort: Annotated[int, Field(ge=3, le=100_000)]
    largest_code: Annotated[int, Field(ge=1, le=2**23)]


class EvaluationConfig(_Strict):
    """Held-out loss on the devices after every ``every`` rounds (0: never), ``most_sequences`` each."""

    every: Annotated[int, Field(ge=0, le=10**6)]
    most_sequences: Annotated[int, Field(ge=1, le=4096)]


class FederationConfig(_Strict):
    """Everything that a federation is run with.

    Attributes:
        package: Directory of the signed package whose base the devices hold.
        candidate_every: Write a candidate adapter after so many rounds, and after the last; 0: after the last only.
        gate: Evaluate candidates and make the better one champion (``python -m pipeline stage=gate``).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    package: Path
    adapter: AdapterConfig
    rounds: Annotated[int, Field(ge=1, le=10**6)]
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    phases: PhasesConfig
    codec: CodecConfig
    optimizer: OptimizerConfig
    local: LocalConfig
    cohort: CohortConfig
    gates: GatesConfig
    robust: RobustConfig
    mode: ModeConfig
    privacy: PrivacyConfig
    secure: SecureConfig
    evaluation: EvaluationConfig
    candidate_every: Annotated[int, Field(ge=0, le=10**6)]
    gate: bool

    @model_validator(mode="after")
    def _check(self) -> FederationConfig:
        faults = list(conflicts(self))
        if faults:
            raise ValueError("\n".join(faults))
        return self


def load_federation(name_or_path: str, overrides: Sequence[str] = (), *, conf_dir: Path = CONF_DIR) -> FederationConfig:
    """Read a federation, lay it over ``default.yaml``, apply overrides, check everything.

    Args:
        name_or_path: A file's name under ``conf_dir`` without its ending, or the path of a YAML file.
        overrides: ``key=value`` with dotted keys; values as in YAML.
        conf_dir: Where the named ones lie.

    Raises:
        ConfigError: One line for each fault: unknown keys, wrong values, settings that contradict each other.
    """
    base = _read_yaml(conf_dir / "default.yaml")
    values = copy.deepcopy(base)
    faults = _merge(values, _read_yaml(_find(name_or_path, conf_dir)))
    for override in overrides:
        faults += _apply(values, override)
    return _validated(values, base, faults)


def with_overrides(config: FederationConfig, overrides: Sequence[str]) -> FederationConfig:
    """The same with ``key=value`` changes.

    Raises:
        ConfigError: As ``load_federation``.
    """
    base = config.model_dump(mode="json")
    values = copy.deepcopy(base)
    return _validated(values, base, [fault for override in overrides for fault in _apply(values, override)])


def config_from_json(path: Path) -> FederationConfig:
    """The configuration that a run was started with, as ``run`` wrote it.

    Raises:
        UserError: The file cannot be read.
        ConfigError: It is not a valid configuration.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        values = json.loads(raw) if len(raw) <= MAX_FILE_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("config", str(path), "a run's config.json", str(error)) from error
    if not isinstance(values, dict):
        raise UserError("config", str(path), f"one JSON object of at most {MAX_FILE_BYTES} bytes")
    return _validated(values, {}, [])


def _find(name_or_path: str, conf_dir: Path) -> Path:
    options = sorted(path.stem for path in conf_dir.glob("*.yaml"))
    if name_or_path in options:
        return conf_dir / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    raise ConfigError(
        f"federation: got {name_or_path!r}, allowed: {', '.join(options)} or the path of a YAML file"
        f"{_did_you_mean(name_or_path, options)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: is longer than {MAX_FILE_BYTES} bytes")
        values = yaml.safe_load(raw)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: must hold key: value lines")
    return values


def _merge(values: dict[str, Any], changes: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lay changes over values; returns a line for each key that does not exist."""
    faults = []
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if not prefix and key not in values and key in FederationConfig.model_fields:
            values[key] = value  # name and package have no default
        elif key not in values:
            faults.append(f"{name}: no such key{_did_you_mean(name, _all_keys())}")
        elif isinstance(values[key], dict) and isinstance(value, Mapping):
            faults += _merge(values[key], value, f"{name}.")
        elif isinstance(values[key], dict):
            faults.append(
                str(UserError(name, value, "a group of keys", f"for example {name}.{next(iter(values[key]))}=..."))
            )
        else:
            values[key] = value
    return faults


def _apply(values: dict[str, Any], override: str) -> list[str]:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override}: allowed: key=value, for example rounds=10"]
    try:
        changes: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"{key}: got {text!r}, allowed: a YAML value; {' '.join(str(error).split())[:120]}"]
    for part in reversed(key.split(".")):
        changes = {part: changes}
    return _merge(values, changes)


def _validated(values: dict[str, Any], base: Mapping[str, Any], faults: list[str]) -> FederationConfig:
    """The configuration, or every fault: settings that contradict each other are found even beside wrong values."""
    config: FederationConfig | None = None
    try:
        config = FederationConfig.model_validate(values)
    except ValidationError as error:
        faults = [*faults, *(line for fault in error.errors() for line in _lines(fault))]
        faulty = {".".join(map(str, fault["loc"][:2])) for fault in error.errors()}
        faults += _conflicts_beside(values, base, faulty)
    if faults or config is None:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return config


def _conflicts_beside(values: dict[str, Any], base: Mapping[str, Any], faulty: set[str]) -> list[str]:
    """What would contradict each other with the faulty values put back to their defaults."""
    repaired = {"name": "x", "package": ".", **copy.deepcopy(values)}
    for name in faulty:
        group, _, key = name.partition(".")
        if key and isinstance(repaired.get(group), dict) and key in base.get(group, {}):
            repaired[group][key] = base[group][key]
        elif group in base or group in ("name", "package"):
            repaired[group] = base.get(group, "x")
    try:
        FederationConfig.model_validate(repaired)
    except ValidationError as error:
        lines = [line for fault in error.errors() if not fault["loc"] for line in _lines(fault)]
        return [line for line in lines if line.partition(":")[0] not in faulty]
    return []


def _lines(fault: Any) -> list[str]:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return [f"{name}: no such key{_did_you_mean(name, _all_keys())}"]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"]).split("\n")
    if fault["type"] == "missing":
        return [f"{name}: is missing; add {name}=VALUE"]
    allowed = fault["msg"].removeprefix("Input should be ")
    return [str(UserError(name, fault["input"], allowed, _ALTERNATIVES.get((name, str(fault["input"])), "")))]


_NEEDS_ALL = "it needs every update by itself, and the server folds and forgets them; group_median composes with masks"
_ALTERNATIVES = {("robust.method", name): _NEEDS_ALL for name in ("median", "krum", "trimmed_mean", "multikrum")}


def _all_keys() -> list[str]:
    keys = []
    for name, field in FederationConfig.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{key}" for key in field.annotation.model_fields]
    return keys


def _did_you_mean(word: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
