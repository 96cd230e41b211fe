"""A student cut out of its teacher: hidden width, FFN, KV groups and depth by activation importance.

Importance is measured in one pass without gradients (Minitron, arXiv 2408.11796): FFN neurons and
heads by the mean magnitude of what they feed into the next projection, hidden dimensions by the
mean magnitude of the normalised residual stream, layers by how much they turn it (one minus the
cosine of input and output, as in ShortGPT, arXiv 2403.03853).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edge_runtime.formats.errors import UserError

SIZE_STEP = 32


@dataclass(frozen=True, slots=True)
class StudentShape:
    """Sizes of a student; heads are counted in KV groups."""

    hidden_size: int
    intermediate_size: int
    num_kv_heads: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Importance:
    """Scores, higher is more important: hidden (H,), ffn (L, F), groups (L, G), layers (L,)."""

    hidden: torch.Tensor
    ffn: torch.Tensor
    groups: torch.Tensor
    layers: torch.Tensor


def student_shape(teacher: Any, ratios: Any) -> StudentShape:
    """Ratios of a teacher's config, rounded to 32 and to whole KV groups; absolute sizes win.

    Args:
        teacher: A transformers config.
        ratios: A SubmodelConfig.

    Raises:
        UserError: An absolute size is larger than the teacher's.
    """
    shape = StudentShape(
        ratios.hidden_size or _rounded(teacher.hidden_size, ratios.width, SIZE_STEP),
        ratios.intermediate_size or _rounded(teacher.intermediate_size, ratios.ffn, SIZE_STEP),
        ratios.num_kv_heads or _rounded(teacher.num_key_value_heads, ratios.heads, 1),
        ratios.num_layers or _rounded(teacher.num_hidden_layers, ratios.depth, 1),
    )
    limits = (teacher.hidden_size, teacher.intermediate_size, teacher.num_key_value_heads, teacher.num_hidden_layers)
    for name, limit in zip(StudentShape.__slots__, limits, strict=True):
        if getattr(shape, name) > limit:
            raise UserError(f"submodel.{name}", getattr(shape, name), f"at most the teacher's {limit}")
    return shape


@torch.no_grad()
def measure_importance(model: Any, batches: Sequence[torch.Tensor]) -> Importance:
    """Run the teacher over batches (B, T) of token ids and collect the scores."""
    config, layers = model.config, model.model.layers
    groups, width = config.num_key_value_heads, config.hidden_size
    hidden = torch.zeros(width, dtype=torch.float64)
    ffn = torch.zeros(len(layers), config.intermediate_size, dtype=torch.float64)
    group = torch.zeros(len(layers), groups, dtype=torch.float64)
    turn = torch.zeros(len(layers), dtype=torch.float64)

    def on_down(index: int, inputs: tuple[torch.Tensor, ...]) -> None:
        ffn[index] += inputs[0].abs().double().flatten(0, 1).sum(0)

    def on_output(index: int, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].double().square().flatten(0, 1)
        group[index] += squares.unflatten(-1, (groups, -1)).sum(-1).sqrt().sum(0)

    def on_norm(output: torch.Tensor) -> None:
        hidden.add_(output.abs().double().flatten(0, 1).sum(0))

    def on_layer(index: int, entering: torch.Tensor, output: torch.Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(entering.double(), output.double(), dim=-1)
        turn[index] += (1 - cosine).sum()

    handles = []
    for index, layer in enumerate(layers):
        handles += [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _m, a, i=index: on_down(i, a)),
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, i=index: on_output(i, a)),
            layer.input_layernorm.register_forward_hook(lambda _m, _a, out: on_norm(out)),
            layer.post_attention_layernorm.register_forward_hook(lambda _m, _a, out: on_norm(out)),
            layer.register_forward_hook(
                lambda _m, a, out, i=index: on_layer(i, a[0], out[0] if isinstance(out, tuple) else out)
            ),
        ]
    try:
        for tokens in batches:
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Importance(hidden, ffn, group, turn)


@torch.no_grad()
def prune(model: Any, importance: Importance, shape: StudentShape) -> Any:
    """A new transformers model of ``shape`` holding the teacher's most important parts, in fp32."""
    config = _student_config(model.config, shape)
    kept_layers = _top(importance.layers, shape.num_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[layer] for layer in kept_layers]
    student = type(model)(config).float()
    hidden = _top(importance.hidden, shape.hidden_size)
    source = model.state_dict()
    state = {}
    for name in student.state_dict():
        parts = name.split(".")
        layer = int(kept_layers[int(parts[2])]) if parts[:2] == ["model", "layers"] else None
        if layer is not None:
            parts[2] = str(layer)
        tensor = source[".".join(parts)].float()
        rows, columns = _kept(".".join(parts), layer, importance, shape, hidden, model.config)
        tensor = tensor if rows is None else tensor.index_select(0, rows)
        state[name] = tensor if columns is None else tensor.index_select(1, columns)
    student.load_state_dict(state)
    if config.tie_word_embeddings:
        student.tie_weights()
    return student.eval()


def random_student(model: Any, shape: StudentShape, seed: int) -> Any:
    """A model of the same shape with random weights: what a student is compared with."""
    torch.manual_seed(seed)
    return type(model)(_student_config(model.config, shape)).float().eval()


def _student_config(teacher: Any, shape: StudentShape) -> Any:
    config = copy.deepcopy(teacher)
    queries = teacher.num_attention_heads // teacher.num_key_value_heads
    config.head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // teacher.num_attention_heads
    config.hidden_size, config.intermediate_size = shape.hidden_size, shape.intermediate_size
    config.num_key_value_heads, config.num_attention_heads = shape.num_kv_heads, shape.num_kv_heads * queries
    config.num_hidden_layers = shape.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: shape.num_layers]
    config.dtype = torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _kept(
    name: str, layer: int | None, importance: Importance, shape: StudentShape, hidden: torch.Tensor, teacher: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows and columns of a teacher tensor that the student keeps; None keeps all."""
    module, kind = name.rsplit(".", 1)
    module = module.rsplit(".", 1)[-1]
    if layer is None:
        return (hidden, None) if module == "norm" else (None, hidden)  # embedding and head: (V, H)
    head_dim = getattr(teacher, "head_dim", None) or teacher.hidden_size // teacher.num_attention_heads
    queries = teacher.num_attention_heads // teacher.num_key_value_heads
    groups = _top(importance.groups[layer], shape.num_kv_heads)
    neurons = _top(importance.ffn[layer], shape.intermediate_size)
    inputs, outputs = {
        "q_proj": (hidden, _spans(groups, queries * head_dim)),
        "k_proj": (hidden, _spans(groups, head_dim)),
        "v_proj": (hidden, _spans(groups, head_dim)),
        "o_proj": (_spans(groups, queries * head_dim), hidden),
        "gate_proj": (hidden, neurons),
        "up_proj": (hidden, neurons),
        "down_proj": (neurons, hidden),
        "q_norm": (None, None),
        "k_norm": (None, None),
    }.get(module, (None, hidden))  # the layer's norms
    return outputs, inputs if kind == "weight" and module.endswith("_proj") else None


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` highest scores, in their own order; ties go to the lower index."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _spans(groups: torch.Tensor, size: int) -> torch.Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _rounded(size: int, ratio: float, step: int) -> int:
    return size if ratio == 1 else min(size, max(step, round(size * ratio / step) * step))
