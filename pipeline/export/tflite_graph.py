"""A decoder as a TFLite file: two signatures over one set of weights, the KV cache outside.

``prefill`` takes T tokens at once and ``decode`` one. Both take the past keys and values (1, KV, M, D) and hand
out only the new slice (1, KV, T, D), which the host writes into its cache: no resource variables and no custom
operators, so that old runtimes run the same file. The score columns are the new tokens first and the past after
them; an additive mask (1, 1, T, T + M) says which of them a token may see. Keys and values are never concatenated
along M, since copying the cache would cost as much as attending to it, and no constant in the graph depends on M, so
that the host may resize the past to the part in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, PROJECTIONS, DecoderSpec, module_name
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights
from pipeline.export import tflite_operators as op
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.tflite_flatbuffer import ModelFile, Subgraph, save_model

Profile = Literal["current", "legacy"]
COLUMNS_METADATA = "sevenfold.columns"
_BLOCK_SIZES = (32, 64, 128, 256)


def write_tflite(
    path: Path,
    spec: DecoderSpec,
    weights: Weights,
    *,
    profile: Profile,
    lora: LoraSlots | None,
    prefill_tokens: int,
) -> None:
    """Write a decoder that ``edge_runtime.backends.tflite`` runs.

    Args:
        path: The file to write; replaced only when complete.
        spec: Sizes; ``context_tokens`` is M, the fixed length of the cache.
        weights: Checkpoint names to codes and scales, or to float32 arrays, which stay float32.
        profile: ``current`` takes 4-bit codes in groups (LiteRT), ``legacy`` 8-bit codes with one scale a tensor
            (tflite-runtime 2.14, which silently answers zeros to any finer scales).
        lora: Projections with adapter inputs of a fixed rank, zeros meaning the base; None for a file without.
        prefill_tokens: T of the ``prefill`` signature.

    Raises:
        ExportError: The weights do not fit the container or the profile.
    """
    refuse_unfit(spec, weights, profile, lora, prefill_tokens)
    model = ModelFile()
    model.metadata[COLUMNS_METADATA] = json.dumps(padded_columns(weights)).encode()
    for signature, tokens in (("decode", 1), ("prefill", prefill_tokens)):
        _build_signature(model.subgraph(signature), spec, weights, lora, tokens)
    save_model(path, model, f"sevenfold decoder, profile {profile}")


@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer of one signature reads."""

    graph: Subgraph
    spec: DecoderSpec
    weights: Weights
    lora: LoraSlots | None
    tokens: int
    cos: int
    sin: int
    query_cos: int
    query_sin: int
    mask: int


def _build_signature(graph: Subgraph, spec: DecoderSpec, weights: Weights, lora: LoraSlots | None, tokens: int) -> None:
    ids = graph.input("tokens", (tokens,), np.int32)
    embedding = f"{EMBEDDING}.weight"
    hidden = op.embedding_lookup(graph, ids, graph.weight(embedding, weights[embedding]), weights[embedding])
    step = _step(graph, spec, weights, lora, tokens)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        attended = _attention(step, _norm(step, hidden, f"{prefix}.input_layernorm"), layer)
        hidden = op.add(graph, hidden, attended)
        expanded = _mlp(step, _norm(step, hidden, f"{prefix}.post_attention_layernorm"), layer)
        hidden = op.add(graph, hidden, expanded)
    hidden = _norm(step, hidden, FINAL_NORM)
    head = embedding if spec.tied_embeddings else f"{HEAD}.weight"
    logits = op.fully_connected(graph, hidden, graph.weight(head, weights[head]), None, weights[head])
    graph.output("logits", logits)


def _step(graph: Subgraph, spec: DecoderSpec, weights: Weights, lora: LoraSlots | None, tokens: int) -> _Step:
    rotary = (1, 1, tokens, spec.head_dim)
    cos, sin = graph.input("cos", rotary), graph.input("sin", rotary)
    mask = graph.input("mask", (1, 1, tokens, tokens + spec.context_tokens))
    scale = graph.constant(np.array([1 / math.sqrt(spec.head_dim)], np.float32))
    query_heads = spec.num_heads // spec.num_kv_heads
    if tokens > 1 and query_heads > 1:
        # Rows of the scores are (query head in its group, token): the mask repeats for each head.
        mask = op.concatenate(graph, [mask] * query_heads, axis=2)
    # Scaling the rotation of the queries scales all scores, once a step and not once a layer.
    query_cos, query_sin = op.multiply(graph, cos, scale), op.multiply(graph, sin, scale)
    return _Step(graph, spec, weights, lora, tokens, cos, sin, query_cos, query_sin, mask)


def _attention(step: _Step, x: int, layer: int) -> int:
    graph, spec, tokens = step.graph, step.spec, step.tokens
    kv_heads, head_dim, past_tokens = spec.num_kv_heads, spec.head_dim, spec.context_tokens
    rows = spec.num_heads // kv_heads * tokens
    query = _heads(step, _project(step, x, layer, "q_proj"), spec.num_heads, f"model.layers.{layer}.self_attn.q_norm")
    key = _heads(step, _project(step, x, layer, "k_proj"), kv_heads, f"model.layers.{layer}.self_attn.k_norm")
    value = _heads(step, _project(step, x, layer, "v_proj"), kv_heads, None)
    query = op.reshape(graph, _rotate(graph, query, step.query_cos, step.query_sin), (1, kv_heads, rows, head_dim))
    key = _rotate(graph, key, step.cos, step.sin)
    past_key = graph.input(f"past_k_{layer}", (1, kv_heads, past_tokens, head_dim))
    past_value = graph.input(f"past_v_{layer}", (1, kv_heads, past_tokens, head_dim))
    graph.output(f"new_k_{layer}", key)
    graph.output(f"new_v_{layer}", value)

    new_scores = op.batch_matmul(graph, query, key, transpose_b=True)
    past_scores = op.batch_matmul(graph, query, past_key, transpose_b=True)
    scores = op.concatenate(graph, [new_scores, past_scores], axis=3)
    shares = op.softmax(graph, op.add(graph, scores, step.mask))
    new_part = op.batch_matmul(graph, op.slice_last(graph, shares, 0, tokens), value, transpose_b=False)
    past_part = op.batch_matmul(graph, op.slice_last(graph, shares, tokens, None), past_value, transpose_b=False)
    return _project(step, _merge_heads(step, op.add(graph, new_part, past_part)), layer, "o_proj")


def _mlp(step: _Step, x: int, layer: int) -> int:
    gate = op.silu(step.graph, _project(step, x, layer, "gate_proj"))
    return _project(step, op.multiply(step.graph, gate, _project(step, x, layer, "up_proj")), layer, "down_proj")


def _project(step: _Step, x: int, layer: int, projection: str) -> int:
    """x (T, K) through one projection, its bias and its adapter slot where present."""
    graph, module = step.graph, module_name(layer, projection)
    value = step.weights[f"{module}.weight"]
    weight = graph.weight(f"{module}.weight", value)
    bias = step.weights.get(f"{module}.bias")
    bias_tensor = None if bias is None else graph.weight(f"{module}.bias", bias)
    padded = op.pad_last(graph, x, graph.shapes[weight][1])
    projected = op.fully_connected(graph, padded, weight, bias_tensor, value)
    if step.lora is None or projection not in step.lora.targets:
        return projected
    lora_a = graph.input(f"{module}.lora_a", (step.lora.rank, graph.shapes[x][1]))
    lora_b = graph.input(f"{module}.lora_b", (graph.shapes[projected][1], step.lora.rank))
    lowered = op.batch_matmul(graph, x, lora_a, transpose_b=True)
    return op.add(graph, projected, op.batch_matmul(graph, lowered, lora_b, transpose_b=True))


def _heads(step: _Step, x: int, heads: int, norm: str | None) -> int:
    """(T, heads * D) -> (1, heads, T, D), normalised where the checkpoint has a norm."""
    graph, head_dim = step.graph, step.spec.head_dim
    if step.tokens == 1:
        split = op.reshape(graph, x, (1, heads, 1, head_dim))
    else:
        split = op.transpose(graph, op.reshape(graph, x, (1, step.tokens, heads, head_dim)), (0, 2, 1, 3))
    return split if norm is None or f"{norm}.weight" not in step.weights else _norm(step, split, norm)


def _merge_heads(step: _Step, x: int) -> int:
    """(1, KV, heads / KV * T, D) -> (T, heads * D)."""
    graph, heads, head_dim = step.graph, step.spec.num_heads, step.spec.head_dim
    if step.tokens > 1:
        x = op.transpose(graph, op.reshape(graph, x, (1, heads, step.tokens, head_dim)), (0, 2, 1, 3))
    return op.reshape(graph, x, (step.tokens, heads * head_dim))


def _rotate(graph: Subgraph, x: int, cos: int, sin: int) -> int:
    """x cos + swap(x) sin, where ``swap`` exchanges the halves and the host's sin carries the sign."""
    first, second = op.halves(graph, x)
    swapped = op.concatenate(graph, [second, first], axis=3)
    return op.add(graph, op.multiply(graph, x, cos), op.multiply(graph, swapped, sin))


def _norm(step: _Step, x: int, name: str) -> int:
    weight = step.graph.weight(f"{name}.weight", step.weights[f"{name}.weight"])
    return op.rms_norm(step.graph, x, weight, step.spec.rms_norm_eps)


def padded_columns(weights: Weights) -> dict[str, int]:
    """True widths of the weights that the quantizer padded to whole groups."""
    quantized = {name: value for name, value in weights.items() if isinstance(value, QuantizedTensor)}
    return {name: value.columns for name, value in quantized.items() if value.columns != value.padded_columns}


def refuse_unfit(
    spec: DecoderSpec, weights: Weights, profile: Profile, lora: LoraSlots | None, prefill_tokens: int
) -> None:
    """Raises ExportError when weights, slots or sizes do not fit the container or the profile."""
    if profile not in ("current", "legacy"):
        raise ExportError(f"TFLite profile {profile!r}: only current and legacy exist")
    if prefill_tokens < 2:
        raise ExportError(f"prefill_tokens {prefill_tokens}: at least 2, one token at a time is what decode does")
    if lora is not None and (unknown := set(lora.targets) - set(PROJECTIONS)):
        raise ExportError(f"adapter targets {sorted(unknown)}: only {', '.join(PROJECTIONS)} can have a slot")
    if lora is not None and (lora.rank < 1 or not lora.targets):
        raise ExportError(f"adapter slots of rank {lora.rank} on {len(lora.targets)} projections hold nothing")
    for name, value in weights.items():
        if isinstance(value, QuantizedTensor):
            _refuse_padding(spec, name, value)
            (_refuse_blockwise if profile == "current" else _refuse_per_tensor)(name, value)
    _refuse_shapes(spec, weights)


def _refuse_padding(spec: DecoderSpec, name: str, value: QuantizedTensor) -> None:
    if value.columns != value.padded_columns and "down_proj" not in name:
        width = "heads * head_dim" if "o_proj" in name else "hidden size"
        raise ExportError(
            f"{name}: {width} {value.columns} is not divisible by the group {value.group}, which TFLite demands;"
            " choose another width or the ONNX container"
        )


def _refuse_blockwise(name: str, value: QuantizedTensor) -> None:
    if value.bits != 4:
        raise ExportError(f"{name}: {value.bits}-bit codes, but the current profile holds 4-bit codes or float32")
    if value.group not in _BLOCK_SIZES:
        raise ExportError(f"{name}: group {value.group}, but LiteRT runs groups of {_BLOCK_SIZES} only")
    smallest = float(value.scales.min())
    if not (smallest > 0 and np.isfinite(value.scales).all()):
        raise ExportError(
            f"{name}: smallest scale {smallest}, but XNNPACK accepts positive finite scales only;"
            " quantize with positive scales (all-zero groups too)"
        )


def _refuse_per_tensor(name: str, value: QuantizedTensor) -> None:
    if value.bits != 8 or value.scales.size != 1:
        raise ExportError(
            f"{name}: {value.bits}-bit codes with {value.scales.size} scales, but the legacy profile holds"
            " 8-bit codes with one scale a tensor (old runtimes answer zeros to others)"
        )
    if not 0 < float(value.scales.reshape(-1)[0]) < math.inf:
        raise ExportError(f"{name}: scale {float(value.scales.reshape(-1)[0])} must be positive and finite")


def _refuse_shapes(spec: DecoderSpec, weights: Mapping[str, QuantizedTensor | NDArray[np.float32]]) -> None:
    required, optional = _expected_shapes(spec)
    for name in required:
        if name not in weights:
            raise ExportError(f"{name}: missing from the weights")
    for name, value in weights.items():
        shape = required.get(name) or optional.get(name)
        if shape is None:
            raise ExportError(f"{name}: the decoder has no place for this weight")
        if tuple(value.shape) != shape:
            raise ExportError(f"{name}: shape {tuple(value.shape)}, but the decoder's sizes say {shape}")


def _expected_shapes(spec: DecoderSpec) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the weights that must, and of those that may be there."""
    hidden = (spec.hidden_size,)
    required: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (spec.vocab_size, *hidden)}
    required[f"{FINAL_NORM}.weight"] = hidden
    optional: dict[str, tuple[int, ...]] = {}
    if not spec.tied_embeddings:
        required[f"{HEAD}.weight"] = (spec.vocab_size, *hidden)
    for module, projection in spec.module_names():
        required[f"{module}.weight"] = spec.projection_shape(projection)
        optional[f"{module}.bias"] = spec.projection_shape(projection)[:1]
    for layer in range(spec.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            required[f"model.layers.{layer}.{norm}.weight"] = hidden
        for norm in ("q_norm", "k_norm"):
            optional[f"model.layers.{layer}.self_attn.{norm}.weight"] = (spec.head_dim,)
    return required, optional
