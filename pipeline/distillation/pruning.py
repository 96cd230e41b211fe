"""A student cut out of its teacher: hidden width, FFN, KV groups, depth and vocabulary.

Importance is measured in one pass without gradients (Minitron, arXiv 2407.14679 and 2408.11796): FFN neurons and
heads by the magnitude of what they feed into the next projection, hidden dimensions by the magnitude of the normalised
residual stream, layers by how much they turn it (one minus the cosine of input and output, ShortGPT, arXiv 2403.03853).

RMS normalisation divides by a mean over the hidden dimensions, so fewer dimensions change it. The norms' weights are
scaled by what the measured energies say of that change: dimensions that are always zero can be cut without a trace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import atomic_directory, require_disk
from pipeline.distillation.checkpoint_files import (
    DTYPES,
    SHARD_BYTES,
    NewTensor,
    copy_tokenizer,
    read_config,
    read_rows,
    require_finite,
    require_supported,
    tensor_files,
    tensor_shape,
    write_tensors,
)
from pipeline.distillation.importance import Importance, head_size, measure_importance
from pipeline.distillation.shapes import StudentShape, require_inside, student_shape
from pipeline.distillation.vocabulary import TrimmedVocabulary, remap_token_ids, write_tokenizer

__all__ = [
    "Importance", "StudentShape", "measure_importance", "prune", "prune_checkpoint", "random_student",
    "require_inside", "student_shape",
]  # fmt: skip

_OUTER = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a student's tensor comes from: a teacher's tensor, its rows and columns (None: all), a factor."""

    name: str
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: float = 1.0


@torch.no_grad()
def prune(model: Any, importance: Importance, shape: StudentShape, vocabulary: TrimmedVocabulary | None = None) -> Any:
    """A new transformers model of ``shape`` holding the teacher's most important parts, in fp32 on the CPU.

    Raises:
        UserError: An architecture that cannot be pruned, a larger student, or weights that are quantized or not finite.
    """
    require_supported(type(model).__name__)
    config = _student_config(model.config, importance, shape, vocabulary)
    with torch.device("meta"):
        student = type(model)(config)
    source, state = model.state_dict(), {}
    for name, origin in _origins(student, model.config, importance, shape, vocabulary).items():
        tensor = source[origin.name]
        if not tensor.is_floating_point():
            raise UserError("teacher.load", f"{origin.name} as {tensor.dtype}", "fp32 or bf16 weights to prune")
        for dim, chosen in enumerate((origin.rows, origin.columns)):
            tensor = tensor if chosen is None else tensor.index_select(dim, chosen.to(tensor.device))
        require_finite(origin.name, tensor)
        state[name] = tensor.detach().to("cpu", torch.float32, copy=True).mul_(origin.scale)
    student.load_state_dict(state, assign=True)
    student.model.rotary_emb = type(student.model.rotary_emb)(config=config)  # its buffers are in no checkpoint
    if config.tie_word_embeddings:
        student.tie_weights()
    return student.eval()


def prune_checkpoint(
    source: Path,
    output: Path,
    importance: Importance,
    shape: StudentShape,
    vocabulary: TrimmedVocabulary | None = None,
    *,
    dtype: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """What ``prune`` does, from a checkpoint to a checkpoint, with one block of rows in memory at a time.

    Args:
        source: A Hugging Face checkpoint, single or sharded, in any float type.
        output: Becomes a folder with config.json, weights, tokenizer and generation settings, all at once at the end.
        importance: Of the model in ``source``.
        shape: Sizes of the student.
        vocabulary: Keeps these tokens only; the tokenizer is written anew.
        dtype: ``fp32`` (bit for bit what ``prune`` gives) or ``bf16`` of the written weights.
        shard_bytes: Most weight bytes a file.

    Raises:
        UserError: What cannot be read, pruned or written, in one line.
    """
    teacher, files = read_config(source), tensor_files(source)
    config = _student_config(teacher, importance, shape, vocabulary)
    config.dtype = DTYPES[dtype]
    import transformers

    name: str = teacher.architectures[0]
    with torch.device("meta"):
        student: Any = getattr(transformers, name)(config)
        whole: Any = getattr(transformers, name)(teacher)
    config.architectures = [name]
    expected = {key: tuple(value.shape) for key, value in whole.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in student.state_dict().items()}
    tensors = []
    for key, origin in _origins(student, teacher, importance, shape, vocabulary).items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _require_tensor(files, origin.name, expected[origin.name])
        tensors.append(NewTensor(key, shapes[key], partial(_blocks, files[origin.name], origin)))
    require_disk(output.parent, sum(t.numel() for t in student.state_dict().values()) * (4 if dtype == "fp32" else 2))
    with atomic_directory(output) as folder:
        write_tensors(folder, tensors, DTYPES[dtype], shard_bytes)
        config.save_pretrained(folder)
        copy_tokenizer(source, folder) if vocabulary is None else write_tokenizer(source, folder, vocabulary)


def random_student(model: Any, shape: StudentShape, seed: int, vocab_size: int | None = None) -> Any:
    """A model of the same shape with random weights: what a student is compared with."""
    config = _shaped(model.config, shape)
    config.vocab_size = vocab_size or config.vocab_size
    torch.manual_seed(seed)
    return type(model)(config).float().eval()


def _student_config(
    teacher: Any, importance: Importance, shape: StudentShape, vocabulary: TrimmedVocabulary | None
) -> Any:
    require_inside(teacher, shape)
    importance.require_fit(teacher)
    config = _shaped(teacher, shape)
    if getattr(teacher, "layer_types", None):
        kept = _top(importance.layers, shape.num_layers).tolist()
        config.layer_types = [teacher.layer_types[layer] for layer in kept]
    if vocabulary is not None:
        if len(vocabulary.new_ids) != teacher.vocab_size:
            raise UserError("vocabulary", len(vocabulary.new_ids), f"the {teacher.vocab_size} rows of the teacher")
        config.vocab_size = len(vocabulary.kept_ids)
        for key, value in remap_token_ids(config.to_dict(), vocabulary).items():
            setattr(config, key, value)
    return config


def _shaped(teacher: Any, shape: StudentShape) -> Any:
    config = copy.deepcopy(teacher)
    config.head_dim = head_size(teacher)
    config.hidden_size, config.intermediate_size = shape.hidden_size, shape.intermediate_size
    queries = teacher.num_attention_heads // teacher.num_key_value_heads
    config.num_key_value_heads, config.num_attention_heads = shape.num_kv_heads, shape.num_kv_heads * queries
    config.num_hidden_layers = shape.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: shape.num_layers]
    config.dtype = torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _origins(
    student: Any, teacher: Any, importance: Importance, shape: StudentShape, vocabulary: TrimmedVocabulary | None
) -> dict[str, Origin]:
    """The origin of each of the student's tensors."""
    hidden = _top(importance.hidden, shape.hidden_size)
    layers = _top(importance.layers, shape.num_layers).tolist()
    scales = importance.norm_scales(hidden, teacher.rms_norm_eps)
    size, queries = head_size(teacher), teacher.num_attention_heads // teacher.num_key_value_heads
    words = None if vocabulary is None else torch.from_numpy(vocabulary.kept_ids)
    origins = {name: Origin(name, words, hidden) for name in _OUTER}
    origins["model.norm.weight"] = Origin("model.norm.weight", hidden, None, scales[-1])
    for position, layer in enumerate(layers):
        groups = _top(importance.groups[layer], shape.num_kv_heads)
        neurons = _top(importance.ffn[layer], shape.intermediate_size)
        heads, values = _spread(groups, queries * size), _spread(groups, size)
        for module, (rows, columns, scale) in {
            "self_attn.q_proj": (heads, hidden, 1.0),
            "self_attn.k_proj": (values, hidden, 1.0),
            "self_attn.v_proj": (values, hidden, 1.0),
            "self_attn.o_proj": (hidden, heads, 1.0),
            "self_attn.q_norm": (None, None, 1.0),
            "self_attn.k_norm": (None, None, 1.0),
            "mlp.gate_proj": (neurons, hidden, 1.0),
            "mlp.up_proj": (neurons, hidden, 1.0),
            "mlp.down_proj": (hidden, neurons, 1.0),
            "input_layernorm": (hidden, None, scales[2 * layer]),
            "post_attention_layernorm": (hidden, None, scales[2 * layer + 1]),
        }.items():
            here, there = (f"model.layers.{index}.{module}" for index in (position, layer))
            origins[f"{here}.weight"] = Origin(f"{there}.weight", rows, columns, scale)
            origins[f"{here}.bias"] = Origin(f"{there}.bias", rows, None)
    return {name: origins[name] for name in student.state_dict()}


def _require_tensor(files: dict[str, Path], name: str, shape: tuple[int, ...]) -> None:
    if name not in files:
        raise UserError("teacher.path", f"no tensor {name}", "a checkpoint with every weight of its config.json")
    found = tensor_shape(files[name], name)
    if found != shape:
        raise UserError("teacher.path", f"{name} of shape {found}", f"{shape}, as config.json says")


def _blocks(path: Path, origin: Origin) -> Iterator[torch.Tensor]:
    for block in read_rows(path, origin.name, origin.rows, origin.columns):
        yield block.float().mul_(origin.scale)


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` highest scores, in their own order; ties go to the lower index."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _spread(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()
