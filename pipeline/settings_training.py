"""Settings of what is learned: text, teacher, submodel, training; and the types that all settings are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ratio = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]


class Strict(BaseModel):
    """A section of the configuration; a name that it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Strict):
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


class PairsConfig(Strict):
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


class FromScratchTeacher(Strict):
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


class CheckpointTeacher(Strict):
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


class SubmodelConfig(Strict):
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


class ContextConfig(Strict):
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


class DistillConfig(Strict):
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
