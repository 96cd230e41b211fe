"""The validated configuration: Hydra composes conf/, pydantic checks it once, all faults at once."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_runtime.formats.errors import ConfigError

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
Container = Literal["onnx", "tflite", "tflite_legacy"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Strict):
    """Where text comes from and which documents are kept."""

    source: Literal["python_docs", "local"]
    path: Path | None = None
    min_chars: Count
    max_chars: Annotated[int, Field(ge=1, le=200_000)]
    held_out_modulus: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.source == "local") != (self.path is not None):
            raise ValueError("path is required by source=local and refused by python_docs")
        if self.min_chars >= self.max_chars:
            raise ValueError("min_chars must be below max_chars")
        return self


class FromScratchTeacher(_Strict):
    """A small Llama trained here."""

    kind: Literal["from_scratch"]
    vocab_size: Annotated[int, Field(ge=300, le=65536)]
    hidden_size: Annotated[int, Field(ge=32, multiple_of=32)]
    intermediate_size: Annotated[int, Field(ge=32, multiple_of=32)]
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    steps: Count
    batch_sequences: Count
    learning_rate: Rate

    @model_validator(mode="after")
    def _check(self) -> FromScratchTeacher:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("hidden_size must divide by num_heads, and num_heads by num_kv_heads")
        if self.hidden_size // self.num_heads % 16:
            raise ValueError("hidden_size / num_heads must be a multiple of 16 (ONNX Runtime's attention)")
        return self


class CheckpointTeacher(_Strict):
    """A Hugging Face checkpoint: a directory, or a name on the hub."""

    kind: Literal["local", "hub"]
    path: Path | None = None
    name: str | None = None
    revision: str = "main"
    load: Literal["fp32", "bf16", "int8", "int4"]
    device_map: str | None = None

    @model_validator(mode="after")
    def _check(self) -> CheckpointTeacher:
        if self.kind == "local" and self.path is None:
            raise ValueError("path is required by kind=local (teacher.path=DIR)")
        if self.kind == "hub" and not self.name:
            raise ValueError("name is required by kind=hub (teacher.name=ORG/MODEL)")
        return self


class SubmodelConfig(_Strict):
    """Ratios of the teacher's sizes; absolute sizes win where given."""

    name: Name
    width: Ratio
    ffn: Ratio
    heads: Ratio
    depth: Ratio
    hidden_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    intermediate_size: Annotated[int, Field(ge=32, multiple_of=32)] | None = None
    num_kv_heads: Count | None = None
    num_layers: Count | None = None


class DistillConfig(_Strict):
    """Teacher signal and training of the students."""

    sequence_tokens: Annotated[int, Field(ge=8)]
    target_tokens: Count
    draws: Annotated[int, Field(ge=1, le=64)]
    importance_sequences: Count
    steps: Count
    batch_sequences: Count
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0, lt=1)]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    precision: Literal["auto", "bf16", "fp32"]
    checkpoint_every_steps: Count
    from_scratch_baseline: bool

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.target_tokens < self.sequence_tokens * self.batch_sequences:
            raise ValueError("target_tokens must hold one batch (sequence_tokens x batch_sequences)")
        return self


class QuantizeConfig(_Strict):
    """Codes of the shipped containers."""

    bits: Literal[4, 8]
    group: Literal[32, 64, 128]
    rounding: Literal["rtn", "mse"]


class ExportConfig(_Strict):
    """Containers and their fixed shapes."""

    containers: Annotated[list[Container], Field(min_length=1)]
    context_tokens: Annotated[int, Field(ge=16, le=131_072)]
    prefill_tokens: Annotated[int, Field(ge=2, le=1024)]
    accuracy_level: Literal[0, 4]
    lora_targets: list[Projection]
    lora_rank: Annotated[int, Field(ge=1, le=256)]
    train_buckets: Annotated[list[Annotated[int, Field(ge=8, le=8192)]], Field(max_length=8)]
    train_batch: Annotated[int, Field(ge=1, le=256)]
    torch_base: bool
    parity_positions: Annotated[int, Field(ge=8)]
    legacy_python: Path
    licence: str
    version: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}\.\d{1,6}$")]
    counter: Count

    @model_validator(mode="after")
    def _check(self) -> ExportConfig:
        if len(set(self.containers)) != len(self.containers):
            raise ValueError("containers must not repeat")
        if self.prefill_tokens >= self.context_tokens:
            raise ValueError("prefill_tokens must be below context_tokens")
        if self.train_buckets != sorted(set(self.train_buckets)) or max(self.train_buckets, default=0) > (
            self.context_tokens
        ):
            raise ValueError("train_buckets must grow and stay within context_tokens")
        if self.train_buckets and not self.lora_targets:
            raise ValueError("train_buckets need lora_targets; choose some, or train_buckets=[]")
        return self


class GateConfig(_Strict):
    """Bounds that a submodel must keep to be registered, and how ``stage=gate`` judges a federation's adapter."""

    containers: list[Container]
    perplexity_ratio_max: Annotated[float, Field(gt=1)]
    top1_to_fp_min: Annotated[float, Field(ge=0, le=1)]
    onnx_weight_ratio_max: Ratio
    tflite_weight_ratio_max: Ratio
    beats_from_scratch: bool
    margin: Annotated[float, Field(ge=0, lt=100)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100, le=100_000)]
    sequences: Annotated[int, Field(ge=8, le=100_000)]
    text: Path | None = None
    agreement_rms_max: Ratio
    agreement_top1_min: Annotated[float, Field(ge=0, le=1)]


class TrackConfig(_Strict):
    """Where MLflow keeps its store."""

    store: Path
    port: Annotated[int, Field(ge=1024, le=65535)]


class RuntimeConfig(_Strict):
    """How exported files are measured."""

    threads: Annotated[int, Field(ge=1, le=256)]
    evaluation_sequences: Count
    bench_tokens: Count
    prompt: Annotated[str, Field(min_length=1, max_length=2000)]
    max_tokens: Count


class Config(_Strict):
    """Everything one run reads, for one submodel of the family."""

    stage: str | None = None
    dry_run: bool = False
    candidate: Path | None = None
    package: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    threads: Annotated[int, Field(ge=1, le=256)]
    family: Annotated[list[Name], Field(min_length=1)]
    data: DataConfig
    teacher: Annotated[FromScratchTeacher | CheckpointTeacher, Field(discriminator="kind")]
    submodel: SubmodelConfig
    distill: DistillConfig
    quantize: QuantizeConfig
    export: ExportConfig
    gate: GateConfig
    track: TrackConfig
    runtime: RuntimeConfig

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.quantize.bits == 8 and "tflite" in self.export.containers:
            raise ValueError("export.containers: tflite holds 4-bit codes; with quantize=int8 leave it out")
        if self.quantize.group != 32 and "tflite" in self.export.containers:
            raise ValueError("quantize.group: tflite runs group 32; choose 32 or leave tflite out")
        if self.runtime.max_tokens >= self.export.context_tokens:
            raise ValueError("runtime.max_tokens must be below export.context_tokens")
        self._check_candidate()
        return self

    def _check_candidate(self) -> None:
        if self.stage == "gate":
            if self.candidate is None:
                raise ValueError("candidate: is missing; add candidate=DIR")
            if self.dry_run:
                raise ValueError("dry_run: stage=gate has no plan to print; leave it out")
            return
        for name, value in (("candidate", self.candidate), ("package", self.package)):
            if value is not None:
                raise ValueError(f"{name}: only stage=gate takes one, the stage is {self.stage or 'not given'}")


def load_configs(overrides: Sequence[str]) -> dict[str, Config]:
    """Compose and validate one Config for each submodel of the family, in its order.

    ``submodel=NAME`` among the overrides makes a family of that one, unless ``stage`` names one step of a run
    of the whole family.

    Raises:
        ConfigError: One line for each fault: misspelt keys and options, values out of range.
    """
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        faults, usable = _split_overrides(overrides)
        try:
            values, missing = _compose(usable)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError("\n".join([*faults, _one_line(error)])) from None
        faults += [f"{key}: is missing; add {key}=VALUE" for key in missing]
        first, errors = _validate(values)
        if faults or errors or first is None:
            raise ConfigError("\n".join(dict.fromkeys([*faults, *errors])))
        family = first.family
        if any(override.startswith("submodel=") for override in usable):
            if first.stage is None:
                family = [first.submodel.name]
                usable.append(f"family=[{family[0]}]")
            elif first.submodel.name not in family:
                raise ConfigError(f"submodel: got {first.submodel.name!r}, allowed in this family: {', '.join(family)}")
        return {name: _member(usable, name) for name in family}


def config_digest(configs: dict[str, Config]) -> str:
    """Twelve hex digits that name this configuration; what is run of it does not count."""
    left_out = {"stage", "dry_run", "candidate", "package"}
    values = {name: config.model_dump(mode="json", exclude=left_out) for name, config in configs.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _member(overrides: Sequence[str], name: str) -> Config:
    options = _options("submodel")
    if name not in options:
        raise ConfigError(f"family: got {name!r}, allowed: {', '.join(options)}{_did_you_mean(name, options)}")
    config, errors = _validate(_compose([*overrides, f"submodel={name}"])[0])
    if config is None:
        raise ConfigError("\n".join(errors))
    return config


def _compose(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values, keys that conf/ leaves to the user and the user left out)."""
    composed = compose("config", list(overrides))
    values = OmegaConf.to_container(composed, resolve=True)
    named = {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
    return named, sorted(OmegaConf.missing_keys(composed))


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(one line for each override that Hydra cannot take, the others)."""
    groups = [path.name for path in sorted(CONF_DIR.iterdir()) if path.is_dir()]
    chosen = [o for o in overrides if o.partition("=")[0] in groups]
    usable: list[str] = []
    faults: list[str] = []
    for override in [*chosen, *(o for o in overrides if o not in chosen)]:
        key, equals, value = override.partition("=")
        if not equals or key.startswith(("+", "~")):
            faults.append(f"{override}: allowed: KEY=VALUE with a key that conf/ has")
        elif key in groups and value not in _options(key):
            allowed = ", ".join(_options(key))
            faults.append(f"{key}: got {value!r}, allowed: {allowed}{_did_you_mean(value, _options(key))}")
        else:
            try:
                compose("config", [*usable, override])
                usable.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                keys = list(_keys(OmegaConf.to_container(compose("config", usable), resolve=False)))
                known = key in keys
                hint = _one_line(error) if known else f"no such key{_did_you_mean(key, keys)}"
                faults.append(f"{key}: {hint}")
    return faults, usable


def _validate(values: dict[str, Any]) -> tuple[Config | None, list[str]]:
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        return None, [_fault_line(fault, values) for fault in error.errors()]


def _fault_line(fault: Any, values: dict[str, Any]) -> str:
    path = [str(part) for part in fault["loc"] if part not in ("from_scratch", "local", "hub")]
    name = ".".join(path) or "configuration"
    if fault["type"] == "extra_forbidden":
        return f"{name}: no such key here"
    if fault["type"] == "value_error":
        return f"{name}: {fault['ctx']['error']}" if path else str(fault["ctx"]["error"])
    if fault["type"] == "union_tag_invalid":
        return f"{name}.kind: got {fault['ctx']['tag']!r}, allowed: {fault['ctx']['expected_tags']}"
    if fault["type"] == "missing":
        return f"{name}: is missing"
    return f"{name}: got {fault['input']!r}, allowed: {fault['msg'].removeprefix('Input should be ')}"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _did_you_mean(word: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
