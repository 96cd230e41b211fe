"""Every setting: its type, its bounds, and what contradicts what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

RunContainer = Literal["onnx", "tflite", "tflite_legacy"]
Container = RunContainer | Literal["gguf", "safetensors", "safetensors_linear"]  # files for other runtimes
RUN_CONTAINERS: tuple[str, ...] = get_args(RunContainer)
DocumentationTask = Literal["cloze", "pairing", "multiple_choice", "exact_match", "needle"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Strict):
    """Where text comes from and which documents are kept."""

    source: Literal["python_docs", "python_packages", "local"]
    path: Path | None = None
    packages: list[str] = []
    min_chars: Count
    max_chars: Annotated[int, Field(ge=1, le=200_000)]
    held_out_modulus: Annotated[int, Field(ge=2)]
    rules: Literal["basic", "web"]
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]]
    pii: Literal["off", "replace", "drop"]
    near_duplicates: Annotated[float, Field(ge=0.5, lt=1)] | None
    decontaminate: list[Path]
    workers: Annotated[int, Field(ge=1, le=256)]
    engine: Literal["local", "ray"]

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if (self.source == "local") != (self.path is not None):
            raise ValueError("path is required by source=local and refused by the others")
        if (self.source == "python_packages") != bool(self.packages):
            raise ValueError("packages are required by source=python_packages and refused by the others")
        if self.min_chars >= self.max_chars:
            raise ValueError("min_chars must be below max_chars")
        return self


class PairsConfig(_Strict):
    """Pictures or sounds with their texts, for ``stage=clean`` alone."""

    source: Literal["pairs"]
    path: Path
    processor: Path | None
    min_chars: Count
    max_chars: Annotated[int, Field(ge=1, le=200_000)]
    held_out_modulus: Annotated[int, Field(ge=2)]
    rules: Literal["basic", "web"]
    pii: Literal["off", "replace", "drop"]
    near_duplicate_bits: Annotated[int, Field(ge=0, le=15)] | None
    shard_bytes: Annotated[int, Field(ge=65_536)]
    workers: Annotated[int, Field(ge=1, le=256)]


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

    @property
    def trains(self) -> bool:
        """Whether its stage trains."""
        return True

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
    load: Literal["fp32", "bf16", "float8", "int8", "int4"]
    device_map: str | None = None
    correction_steps: Annotated[int, Field(ge=0)]
    correction_batch_sequences: Count
    correction_learning_rate: Rate
    correction_rank: Annotated[int, Field(ge=1, le=256)] | None

    @property
    def trains(self) -> bool:
        """Whether its stage trains."""
        return self.correction_steps > 0

    @model_validator(mode="after")
    def _check(self) -> CheckpointTeacher:
        if self.kind == "local" and self.path is None:
            raise ValueError("path is required by kind=local (teacher.path=DIR)")
        if self.kind == "hub" and not self.name:
            raise ValueError("name is required by kind=hub (teacher.name=ORG/MODEL)")
        if self.correction_steps and self.load in ("float8", "int8", "int4"):
            raise ValueError(
                f"load={self.load} cannot be corrected: students are cut from float weights; correct it with load=bf16"
                f" correction_rank=16, then give that run's artifacts/teacher as teacher.path with load={self.load}"
            )
        if self.correction_steps and self.device_map is not None:
            raise ValueError("correction_steps trains on one device a process; leave device_map=null, and use torchrun")
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
    cut_from: Name = "teacher"
    learns_from: Name = "teacher"
    checkpoint: Path | None = None
    vocab_coverage: Ratio | None = None
    vocab_size: Annotated[int, Field(ge=256)] | None = None
    whole: bool = False

    @property
    def trims(self) -> bool:
        """Whether a part of the vocabulary is dropped."""
        return self.vocab_coverage is not None or self.vocab_size is not None

    @model_validator(mode="after")
    def _check(self) -> SubmodelConfig:
        if self.checkpoint is not None and self.cut_from != "teacher":
            raise ValueError("checkpoint and cut_from both say what it starts from; give one of them")
        if self.whole and self != SubmodelConfig.model_construct(
            name=self.name, width=1.0, ffn=1.0, heads=1.0, depth=1.0, whole=True
        ):
            raise ValueError("whole is the teacher as it is; leave the ratios at 1.0 and all other settings out")
        return self


class ContextConfig(_Strict):
    """A longer context: YaRN, and training on long sequences at the very end."""

    factor: Annotated[float, Field(ge=1, le=64)]
    steps: Annotated[int, Field(ge=0)]
    sequence_tokens: Annotated[int, Field(ge=64, le=131_072)]
    batch_sequences: Count
    learning_rate: Rate
    retrieval_ratio: Annotated[float, Field(ge=0, le=1)]

    @property
    def changes(self) -> bool:
        """Whether the student is stretched or trained on long sequences at all."""
        return self.factor > 1 or self.steps > 0


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
    signal: Literal["stored", "online", "none"]
    loss: Literal["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "aligned"]
    temperature: Annotated[float, Field(gt=0, le=100)]
    beta: Annotated[float, Field(ge=0, le=1)]
    skew: Annotated[float, Field(ge=0, lt=1)]
    chunk_tokens: Annotated[int, Field(ge=1, le=65_536)]
    micro_sequences: Count
    compile: bool
    recompute: bool
    sharding: Literal["none", "fsdp"]
    hidden_weight: Annotated[float, Field(ge=0, le=1000)]
    hidden_layers: Count
    on_policy_steps: Annotated[int, Field(ge=0)]
    on_policy_ratio: Annotated[float, Field(gt=0, le=1)]
    on_policy_prompt_tokens: Count
    on_policy_tokens: Count
    context: ContextConfig

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.target_tokens < self.sequence_tokens * self.batch_sequences:
            raise ValueError("target_tokens must hold one batch (sequence_tokens x batch_sequences)")
        if self.signal == "stored" and (self.loss, self.temperature) != ("forward_kl", 1.0):
            raise ValueError("stored draws teach forward_kl at temperature 1; with another loss choose signal=online")
        if self.loss == "aligned" and self.temperature != 1.0:
            raise ValueError("aligned compares at temperature 1; leave temperature out")
        if self.signal == "stored" and self.hidden_weight:
            raise ValueError("hidden_weight needs the teacher's states, which are not stored; choose signal=online")
        if self.loss == "aligned" and self.hidden_weight:
            raise ValueError("hidden_weight compares position by position; with loss=aligned leave it out")
        return self


class QuantizeConfig(_Strict):
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


class GateConfig(_Strict):
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


class AdapterConfig(_Strict):
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


class TrackConfig(_Strict):
    """Where MLflow keeps its store."""

    store: Path
    port: Annotated[int, Field(ge=1024, le=65535)]
    live: bool


class RuntimeConfig(_Strict):
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


class Config(_Strict):
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
