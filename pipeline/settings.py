"""Every setting: its type, its bounds, and what contradicts what; those of training are in ``settings_training``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from pipeline.settings_training import (
    CheckpointTeacher,
    Count,
    DataConfig,
    DistillConfig,
    FromScratchTeacher,
    Name,
    PairsConfig,
    Rate,
    Ratio,
    Strict,
    SubmodelConfig,
)

RunContainer = Literal["onnx", "tflite", "tflite_legacy"]
Container = RunContainer | Literal["gguf", "safetensors", "safetensors_linear"]  # files for other runtimes
RUN_CONTAINERS: tuple[str, ...] = get_args(RunContainer)
DocumentationTask = Literal["cloze", "pairing", "multiple_choice", "exact_match", "needle"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class QuantizeConfig(Strict):
    """Codes of the shipped containers."""

    bits: Literal[4, 8]
    group: Literal[32, 64, 128]  # or the largest below it that divides a matrix's columns, see quantization/grid.py
    rounding: Literal["rtn", "mse", "weighted_mse", "gptq"]
    workers: Annotated[int, Field(ge=1, le=256)]
    calibration_sequences: Annotated[int, Field(ge=1, le=65_536)]
    qad_rounds: Annotated[int, Field(ge=1, le=1000)]
    qad_steps: Annotated[int, Field(ge=0)]
    qad_scale_steps: Annotated[int, Field(ge=0)]
    qad_batch_sequences: Count
    qad_learning_rate: Rate
    qad_hidden_weight: Annotated[float, Field(ge=0, le=1000)]
    sensitivity_tokens: Annotated[int, Field(ge=0, le=65_536)]
    weight_ratio_max: Annotated[float, Field(gt=0.25, lt=0.6)] | None

    @model_validator(mode="after")
    def _check(self) -> QuantizeConfig:
        if self.bits == 8 and self.sensitivity_tokens:
            raise ValueError("sensitivity_tokens measure what 4 bits cost; with bits=8 choose sensitivity_tokens=0")
        if self.weight_ratio_max is not None and not self.sensitivity_tokens:
            raise ValueError("weight_ratio_max needs weights ranked, on text; choose sensitivity_tokens=1024")
        return self


class ExportConfig(Strict):
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

    @property
    def run_containers(self) -> list[str]:
        """Those that edge_runtime runs: only they are measured."""
        return [container for container in self.containers if container in RUN_CONTAINERS]

    @model_validator(mode="after")
    def _check(self) -> ExportConfig:
        if len(set(self.containers)) != len(self.containers):
            raise ValueError("containers must not repeat")
        if not self.run_containers:
            raise ValueError(f"containers hold none that is run and measured; add one of {', '.join(RUN_CONTAINERS)}")
        if self.prefill_tokens >= self.context_tokens:
            raise ValueError("prefill_tokens must be below context_tokens")
        if self.train_buckets != sorted(set(self.train_buckets)) or max(self.train_buckets, default=0) > (
            self.context_tokens
        ):
            raise ValueError("train_buckets must grow and stay within context_tokens")
        if self.train_buckets and not self.lora_targets:
            raise ValueError("train_buckets need lora_targets; choose some, or train_buckets=[]")
        return self


class GateConfig(Strict):
    """Bounds that a submodel must keep to be registered, and how ``stage=gate`` judges a federation's adapter."""

    containers: list[RunContainer]
    perplexity_ratio_max: Annotated[float, Field(gt=1)]
    top1_to_fp_min: Annotated[float, Field(ge=0, le=1)]
    onnx_weight_ratio_max: Ratio
    tflite_weight_ratio_max: Ratio
    beats_from_scratch: bool
    recovery_min: Ratio
    items_min: Count
    above_chance_min: Annotated[float, Field(ge=0, lt=1)]
    margin: Annotated[float, Field(ge=0, lt=100)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100, le=100_000)]
    sequences: Annotated[int, Field(ge=8, le=100_000)]
    text: Path | None = None
    agreement_rms_max: Ratio
    agreement_top1_min: Annotated[float, Field(ge=0, le=1)]


class AdapterConfig(Strict):
    """What ``stage=adapter`` works with."""

    name: Name | None
    goal: Literal["recovery", "text"]
    base: Literal["int4", "fp"]
    rank: Annotated[int, Field(ge=1, le=256)] | None
    alpha: Annotated[int, Field(ge=1, le=4096)]
    targets: list[Projection] | None
    steps: Count
    batch_sequences: Count
    learning_rate: Rate
    text: Path | None
    held_out_sequences: Count
    parts: dict[Name, float] | None
    licence: Annotated[str, Field(min_length=1, max_length=200)]
    force: bool


class TrackConfig(Strict):
    """Where MLflow keeps its store."""

    store: Path
    port: Annotated[int, Field(ge=1024, le=65535)]
    live: bool


class RuntimeConfig(Strict):
    """How exported files are measured."""

    threads: Annotated[int, Field(ge=1, le=256)]
    evaluation_sequences: Count
    bench_tokens: Count
    prompt: Annotated[str, Field(min_length=1, max_length=2000)]
    max_tokens: Count
    tasks: list[DocumentationTask]
    task_tokens: Annotated[int, Field(ge=64, le=100_000_000)]
    task_files: list[Path]
    answer_tokens: Annotated[int, Field(ge=1, le=8192)]
    harness_tasks: list[Annotated[str, Field(min_length=1, max_length=200)]]
    harness_path: Path | None

    @model_validator(mode="after")
    def _check(self) -> RuntimeConfig:
        names = [*self.tasks, *(path.stem for path in self.task_files), *self.harness_tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                "tasks, task_files and harness_tasks must name at least one task, each once (a file by its stem)"
            )
        if self.harness_path is not None and not self.harness_tasks:
            raise ValueError("harness_path is a folder of tasks; name some in harness_tasks")
        return self


class Config(Strict):
    """Everything one run reads, for one submodel of the family."""

    stage: str | None = None
    dry_run: bool = False
    action: Literal["train", "list", "show", "score", "compose", "remove"] | None = None
    candidate: Path | None = None
    package: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    threads: Annotated[int, Field(ge=1, le=256)]
    family: Annotated[list[Name], Field(min_length=1)]
    data: Annotated[DataConfig | PairsConfig, Field(discriminator="source")]
    teacher: Annotated[FromScratchTeacher | CheckpointTeacher, Field(discriminator="kind")]
    submodel: SubmodelConfig
    distill: DistillConfig
    quantize: QuantizeConfig
    export: ExportConfig
    gate: GateConfig
    adapter: AdapterConfig
    track: TrackConfig
    runtime: RuntimeConfig

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.distill.signal == "none" and not self.submodel.whole:
            raise ValueError("distill.signal: none teaches nobody; choose stored or online, or submodel=whole")
        if self.quantize.bits == 8 and "tflite" in self.export.containers:
            raise ValueError("export.containers: tflite holds 4-bit codes; with quantize=int8 leave it out")
        if self.quantize.group != 32 and "tflite" in self.export.containers:
            raise ValueError("quantize.group: tflite runs group 32; choose 32 or leave tflite out")
        if self.quantize.weight_ratio_max is not None:
            self._check_mixed_bits(self.quantize.weight_ratio_max)
        if self.runtime.max_tokens >= self.export.context_tokens:
            raise ValueError("runtime.max_tokens must be below export.context_tokens")
        if self.runtime.task_files and self.runtime.answer_tokens >= self.export.context_tokens:
            raise ValueError("runtime.answer_tokens must be below export.context_tokens")
        if isinstance(self.data, PairsConfig) and self.stage != "clean":
            raise ValueError("data: pairs of media and text have stage=clean alone; add it, or choose text")
        self._check_candidate()
        return self

    def _check_mixed_bits(self, ratio_max: float) -> None:
        held = {"tflite": "4-bit codes", "safetensors": "one grid (safetensors_linear several)"}
        for container, codes in held.items():
            if container in self.export.containers:
                raise ValueError(
                    f"quantize.weight_ratio_max: {container} holds {codes} only; leave it out, or choose null"
                )
        gated = "onnx" in self.export.containers and "onnx" in self.gate.containers
        if gated and ratio_max > self.gate.onnx_weight_ratio_max:
            raise ValueError(
                f"quantize.weight_ratio_max: {ratio_max} is more than the gate allows; raise gate.onnx_weight_ratio_max"
                f" ({self.gate.onnx_weight_ratio_max}), or lower it"
            )

    def _check_candidate(self) -> None:
        if self.stage == "gate":
            if self.candidate is None:
                raise ValueError("candidate: is missing; add candidate=DIR")
            if self.dry_run:
                raise ValueError("dry_run: stage=gate has no plan to print; leave it out")
            return
        if (self.stage == "adapter") != (self.action is not None):
            raise ValueError("action: stage=adapter and action=train|list|show|score|compose|remove go together")
        if self.stage == "adapter" and self.dry_run:
            raise ValueError("dry_run: stage=adapter has no plan to print; leave it out")
        given = (("candidate", self.candidate), ("package", self.package if self.stage != "adapter" else None))
        for name, value in given:
            if value is not None:
                raise ValueError(f"{name}: only stage=gate takes one, the stage is {self.stage or 'not given'}")
