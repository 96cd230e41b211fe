"""How large the models of a run are, known before any of them is there.

Sizes come from the configuration, from a checkpoint's config.json, or from the hub's. Parameters, bytes and operations
follow by arithmetic, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import located
from pipeline.distillation.chain import ChainStep, require_shrinking
from pipeline.distillation.shapes import StudentShape, student_shape
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher

_MOST_CONFIG_BYTES = 1 << 20
_BIASED = ("qwen2",)  # model types whose q, k and v have biases whatever the configuration says
_NORMED_HEADS = ("qwen3",)
# Bytes a weight as ``teacher.load`` has it; of 8 and 4 bits (one fp32 scale in 64 codes) the layers alone are small.
_LOADED_BYTES = {"fp32": 4.0, "bf16": 2.0, "float8": 1.0, "int8": 1.0, "int4": 0.5 + 4 / 64}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a decoder, by the names that transformers gives them.

    Attributes:
        biased: q, k and v have biases.
        normed_heads: Queries and keys are normalised by head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    biased: bool = False
    normed_heads: bool = False

    @property
    def params(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(rows * columns for rows, columns in self.matrices) + self.vector_params

    @property
    def embedding_params(self) -> int:
        """Embedding and head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of embedding and head, of what reads hidden states, of o_proj and of down_proj, each kind as one."""
        hidden, layers, ffn = self.hidden_size, self.num_hidden_layers, self.intermediate_size
        queries, values = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return (
            (self.embedding_params // hidden, hidden),
            (layers * (queries + 2 * values + 2 * ffn), hidden),
            (layers * hidden, queries),
            (layers * hidden, ffn),
        )

    @property
    def vector_params(self) -> int:
        """Norms and biases."""
        queries, values = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        biases = queries + 2 * values if self.biased else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.normed_heads else 0)
        return self.num_hidden_layers * (biases + norms) + self.hidden_size

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        return (self.params - self.embedding_params - self.hidden_size) // self.num_hidden_layers

    @property
    def head_flops(self) -> float:
        """Operations a token of the output matrix."""
        return 2.0 * self.vocab_size * self.hidden_size

    def forward_flops(self, sequence_tokens: int) -> float:
        """Operations a token of a forward pass: a third of what ``speed.training_flops_per_token`` says of training."""
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * sequence_tokens
        return 2.0 * (self.params - looked_up) + 2.0 * attention

    def training_flops(self, sequence_tokens: int) -> float:
        """Operations a token of forward and backward."""
        return 3 * self.forward_flops(sequence_tokens)

    def loaded_bytes(self, load: str) -> float:
        """Weights in memory; embedding and head stay in bf16 where the others have 8 or 4 bits."""
        small = _LOADED_BYTES[load]
        return (self.params - self.embedding_params) * small + self.embedding_params * max(small, 2.0)


@dataclass(frozen=True, slots=True)
class FamilySizes:
    """The teacher and every submodel, by name."""

    teacher: ModelSizes
    submodels: Mapping[str, ModelSizes]


# What config.json of these checkpoints says on the hub: the two that conf/experiment/ names.
QWEN_7B = ModelSizes(152_064, 3584, 18_944, 28, 28, 4, 128, tie_word_embeddings=False, biased=True)
_PUBLISHED = {
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_7B,
    "meta-llama/Llama-2-7b-hf": ModelSizes(32_000, 4096, 11_008, 32, 32, 32, 128, tie_word_embeddings=False),
}


def family_sizes(configs: Mapping[str, Config], steps: tuple[ChainStep, ...]) -> FamilySizes:
    """Sizes of a run's models.

    Args:
        configs: One a submodel.
        steps: The family as a chain.

    Raises:
        UserError: A student is larger than what it is cut from, or the teacher's sizes cannot be known here.
    """
    teacher = teacher_sizes(next(iter(configs.values())))
    shapes: dict[str, StudentShape] = {}
    submodels: dict[str, ModelSizes] = {}
    for step in steps:
        submodel = configs[step.name].submodel
        if submodel.whole:
            submodels[step.name] = teacher
        elif submodel.checkpoint is not None:
            found = _read_sizes(located(submodel.checkpoint), f"submodel {step.name}: checkpoint")
            shapes[step.name] = StudentShape(
                found.hidden_size, found.intermediate_size, found.num_key_value_heads, found.num_hidden_layers
            )
            submodels[step.name] = found
        else:
            shapes[step.name] = student_shape(teacher, submodel)
            submodels[step.name] = _cut_to(teacher, shapes[step.name])
    require_shrinking(steps, shapes)
    return FamilySizes(teacher, submodels)


def teacher_sizes(config: Config) -> ModelSizes:
    """Sizes of the teacher: configured, on disk, in the hub's cache, published, or asked of the hub.

    Raises:
        UserError: None of these knows them.
    """
    teacher = config.teacher
    if not isinstance(teacher, CheckpointTeacher):
        return ModelSizes(
            teacher.vocab_size, teacher.hidden_size, teacher.intermediate_size, teacher.num_layers, teacher.num_heads,
            teacher.num_kv_heads, teacher.hidden_size // teacher.num_heads, tie_word_embeddings=True,
        )  # fmt: skip
    if teacher.kind == "local":
        return _read_sizes(located(Path(str(teacher.path))), "teacher.path")
    folder = _hub_folder(teacher, offline=True)
    if folder is None and (known := _PUBLISHED.get(str(teacher.name))) is not None:
        return known
    folder = folder or _hub_folder(teacher, offline=False)
    if folder is None:
        raise UserError(
            "teacher.name", teacher.name, "a checkpoint whose config.json the hub serves, or the cache holds",
            "check the name and the network, or use teacher=local teacher.path=DIR",
        )  # fmt: skip
    return _read_sizes(folder, "teacher.name")


def is_downloaded(teacher: CheckpointTeacher) -> bool:
    """Whether the hub's cache holds weights of a checkpoint."""
    folder = _hub_folder(teacher, offline=True)
    return folder is not None and any(folder.glob("*.safetensors"))


def _hub_folder(teacher: CheckpointTeacher, *, offline: bool) -> Path | None:
    """Where config.json of a hub's checkpoint lies, downloaded if need be; None where it cannot be had."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, revision = str(teacher.name), teacher.revision
    try:
        if offline:
            found = try_to_load_from_cache(name, "config.json", revision=revision)
        else:
            found = hf_hub_download(name, "config.json", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _read_sizes(folder: Path, field: str) -> ModelSizes:
    path = folder / "config.json"
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST_CONFIG_BYTES))
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        kind = values.get("model_type")
        sizes = ModelSizes(
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(values["intermediate_size"]),
            num_hidden_layers=int(values["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            biased=kind in _BIASED or bool(values.get("attention_bias")),
            normed_heads=kind in _NORMED_HEADS,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            field, str(folder), f"a folder with the config.json of a decoder ({type(error).__name__}: {error})",
            "check the path",
        ) from None  # fmt: skip
    if min(astuple(sizes)[:7]) < 1:
        raise UserError(field, str(path), "sizes above zero", "fetch the checkpoint again")
    return sizes


def _cut_to(teacher: ModelSizes, shape: StudentShape) -> ModelSizes:
    queries = teacher.num_attention_heads // teacher.num_key_value_heads
    return replace(
        teacher, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers, num_key_value_heads=shape.num_kv_heads,
        num_attention_heads=shape.num_kv_heads * queries,
    )  # fmt: skip
