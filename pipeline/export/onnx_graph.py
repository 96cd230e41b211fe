"""The decoder as an ONNX graph, written node by node: no tracing, no torch.

Every projection is a MatMulNBits over codes in ``weights.bin``; attention is GroupQueryAttention
with rotary embedding and a key/value buffer that past and present share. Scales are stored as
float16 and cast by the graph; rotary tables are computed by the graph from the inverse
frequencies. ONNX Runtime folds both when it loads the file, so a step runs neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, save_model

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderSpec, module_name
from edge_runtime.formats.int4 import Weights
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_checks import refuse_options
from pipeline.export.onnx_data import DATA_FILE, StoredWeight, join, write_data
from pipeline.export.onnx_operators import (
    CONTRIB,
    Graph,
    embed,
    float_weight,
    in_features,
    matmul,
    matmul_nbits,
    to_model,
)

MODEL_FILE, LORA_MODEL_FILE = "model.onnx", "model_lora.onnx"
_TO_END = 2**62


def write_onnx(
    directory: Path, spec: DecoderSpec, weights: Weights, *, lora: LoraSlots | None, accuracy_level: int
) -> dict[str, StoredWeight]:
    """Write ``model.onnx``, with ``lora`` also ``model_lora.onnx``, and the ``weights.bin`` that both read.

    Args:
        directory: An existing directory.
        spec: Sizes that the weights must have; ``context_tokens`` is the length of the rotary tables.
        weights: By Hugging Face name; quantized weights become MatMulNBits, float32 ones plain MatMul.
            A lazy mapping is read one projection group at a time.
        lora: Projections that get adapter inputs, or None for the slot-free file alone.
        accuracy_level: 4 quantizes activations to int8 (what ships), 0 computes in float32.

    Returns:
        Where each weight lies in ``weights.bin``, for other graphs that read it.

    Raises:
        ExportError: A tensor is missing or left over, or a size has no counterpart in ONNX Runtime's operators.
    """
    refuse_options(spec, lora, accuracy_level)
    stored = write_data(directory / DATA_FILE, spec, weights)
    # Both files name the slots, so that a runtime can judge an adapter before it loads the second one.
    slots = {} if lora is None else {"lora_rank": str(lora.rank), "lora_targets": ",".join(lora.targets)}
    save_model(_decoder(spec, stored, None, accuracy_level, slots), directory / MODEL_FILE)
    if lora is not None:
        save_model(_decoder(spec, stored, lora, accuracy_level, slots), directory / LORA_MODEL_FILE)
    return stored


def _decoder(
    spec: DecoderSpec,
    stored: Mapping[str, StoredWeight],
    lora: LoraSlots | None,
    accuracy_level: int,
    slots: dict[str, str],
) -> ModelProto:
    graph = Graph(spec, stored, lora, accuracy_level)
    _declare_inputs(graph)
    rotary = _rotary_tables(graph)
    hidden = embed(graph, f"{EMBEDDING}.weight", "input_ids", EMBEDDING, spec.hidden_size)
    normed = graph.node(
        "RMSNormalization",
        [hidden, float_weight(graph, "model.layers.0.input_layernorm.weight")],
        "model.layers.0.input_layernorm",
        axis=-1,
        epsilon=spec.rms_norm_eps,
    )
    for layer in range(spec.num_layers):
        attended = _attention(graph, layer, normed, rotary)
        normed, hidden = _skip_norm(graph, attended, hidden, f"model.layers.{layer}.post_attention_layernorm")
        mixed = _mlp(graph, layer, normed)
        last = layer + 1 == spec.num_layers
        normed, hidden = _skip_norm(
            graph, mixed, hidden, FINAL_NORM if last else f"model.layers.{layer + 1}.input_layernorm"
        )
    _head(graph, normed)
    return to_model(graph, "decoder", slots)


def _declare_inputs(graph: Graph) -> None:
    """Inputs and outputs; dimension names are free, sizes are the spec's."""
    spec = graph.spec
    value = helper.make_tensor_value_info
    graph.inputs += [
        value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logits_from", TensorProto.INT64, [1]),
    ]
    graph.outputs.append(value("logits", TensorProto.FLOAT, ["batch", "scored_tokens", spec.vocab_size]))
    shape: list[str | int | None] = ["batch", spec.num_kv_heads, "capacity", spec.head_dim]
    for layer in range(spec.num_layers):
        for part in ("key", "value"):
            graph.inputs.append(value(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape))
            graph.outputs.append(value(f"present.{layer}.{part}", TensorProto.FLOAT, shape))


def _rotary_tables(graph: Graph) -> tuple[str, str]:
    """Cosines and sines (context_tokens, head_dim / 2) from the inverse frequencies."""
    spec = graph.spec
    limits = {"start": 0.0, "limit": float(spec.context_tokens), "delta": 1.0}
    names = [graph.constant(f"rotary.{name}", np.array(limit, np.float32)) for name, limit in limits.items()]
    positions = graph.node("Range", names, "rotary.positions")
    column = graph.node("Unsqueeze", [positions, graph.constant("axis_1", np.array([1]))], "rotary.column")
    inv_freq = graph.constant("rotary.inv_freq", np.array(spec.inv_freq, np.float32))
    angles = graph.node("Mul", [column, inv_freq], "rotary.angles")
    factor = graph.constant("rotary.factor", np.array(spec.rope_attention_factor, np.float32))
    cosines, sines = (
        graph.node("Mul", [graph.node(op, [angles], f"rotary.{op}.plain"), factor], f"rotary.{op}")
        for op in ("Cos", "Sin")
    )
    return cosines, sines


def _attention(graph: Graph, layer: int, normed: str, rotary: tuple[str, str]) -> str:
    spec = graph.spec
    prefix = f"model.layers.{layer}.self_attn"
    modules = [module_name(layer, projection) for projection in ("q_proj", "k_proj", "v_proj")]
    normalized = any(f"{prefix}.{norm}_norm.weight" in graph.stored for norm in "qk")
    packed = None if normalized else _fused_projection(graph, modules, normed)
    if packed is not None:
        states = [packed, "", ""]
    else:
        states = [_projection(graph, module, normed) for module in modules]
        states[0] = _head_norm(graph, f"{prefix}.q_norm", states[0], spec.num_heads)
        states[1] = _head_norm(graph, f"{prefix}.k_norm", states[1], spec.num_kv_heads)
    past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    present = [f"present.{layer}.{part}" for part in ("key", "value")]
    attended = graph.node(
        "GroupQueryAttention",
        [*states, *past, "seqlens_k", "total_sequence_length", *rotary],
        f"{prefix}.attended",
        present,
        domain=CONTRIB,
        num_heads=spec.num_heads,
        kv_num_heads=spec.num_kv_heads,
        do_rotary=1,
    )
    return _projection(graph, module_name(layer, "o_proj"), attended)


def _head_norm(graph: Graph, name: str, states: str, heads: int) -> str:
    """RMS norm of every head (Qwen3); the states unchanged when the checkpoint has none."""
    if f"{name}.weight" not in graph.stored:
        return states
    split = graph.constant(f"heads_{heads}", np.array([0, 0, heads, graph.spec.head_dim]))
    merged = graph.constant(f"width_{heads}", np.array([0, 0, heads * graph.spec.head_dim]))
    by_head = graph.node("Reshape", [states, split], f"{name}.by_head")
    scale = float_weight(graph, f"{name}.weight")
    normed = graph.node("RMSNormalization", [by_head, scale], name, axis=-1, epsilon=graph.spec.rms_norm_eps)
    return graph.node("Reshape", [normed, merged], f"{name}.merged")


def _mlp(graph: Graph, layer: int, normed: str) -> str:
    modules = [module_name(layer, projection) for projection in ("gate_proj", "up_proj")]
    fused = _fused_projection(graph, modules, normed)
    if fused is not None:
        up = f"{fused}.up"
        gate = graph.node("Split", [fused], f"{fused}.gate", [up], axis=-1, num_outputs=2)
    else:
        gate, up = (_projection(graph, module, normed) for module in modules)
    prefix = f"model.layers.{layer}.mlp"
    # ONNX Runtime fuses x * sigmoid(x) into one QuickGelu.
    silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"{prefix}.sigmoid")], f"{prefix}.silu")
    return _projection(graph, module_name(layer, "down_proj"), graph.node("Mul", [silu, up], f"{prefix}.gated"))


def _head(graph: Graph, normed: str) -> None:
    """Logits of the positions from ``logits_from`` on; prefill pays for the last one only."""
    slicing = [graph.constant("to_end", np.array([_TO_END])), graph.constant("axis_1", np.array([1]))]
    scored = graph.node("Slice", [normed, "logits_from", *slicing], "scored")
    name = f"{EMBEDDING if graph.spec.tied_embeddings else HEAD}.weight"
    matmul(graph, name, scored, "logits", None)


def _projection(graph: Graph, module: str, states: str) -> str:
    """One projection with its bias and, where targeted, its adapter inputs."""
    targeted = graph.lora is not None and module.rpartition(".")[2] in graph.lora.targets
    bias = float_weight(graph, f"{module}.bias") if f"{module}.bias" in graph.stored else None
    base = matmul(graph, f"{module}.weight", states, f"{module}.base" if targeted else module, bias)
    if not targeted:
        return base
    weight = graph.stored[f"{module}.weight"]
    a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    columns = in_features(graph, module, weight)
    # One name a module: ONNX Runtime reuses buffers between dimensions of one name, and an adapter may skip modules.
    rank = f"{module}.rank"
    graph.inputs.append(helper.make_tensor_value_info(a, TensorProto.FLOAT, [columns, rank]))
    graph.inputs.append(helper.make_tensor_value_info(b, TensorProto.FLOAT, [rank, weight.rows]))
    # Rank 0 by default: the product is zero and the base's result stays as it is.
    graph.constant(a, np.zeros((columns, 0), np.float32))
    graph.constant(b, np.zeros((0, weight.rows), np.float32))
    low = graph.node("MatMul", [states, a], f"{module}.lora_A")
    return graph.node("Add", [base, graph.node("MatMul", [low, b], f"{module}.lora_B")], module)


def _fused_projection(graph: Graph, modules: Sequence[str], states: str) -> str | None:
    """Several projections of the same input as one matrix (7 % faster decode); None where that is impossible."""
    weights = [graph.stored[f"{module}.weight"] for module in modules]
    if graph.lora is not None and any(module.rpartition(".")[2] in graph.lora.targets for module in modules):
        return None
    quantized = [weight.scales for weight in weights if weight.scales is not None]
    if len(quantized) < len(weights) or len({(w.bits, w.group, w.columns) for w in weights}) > 1:
        return None
    array, scales = join([weight.array for weight in weights]), join(quantized)
    biases = [graph.stored[f"{module}.bias"].array for module in modules if f"{module}.bias" in graph.stored]
    if array is None or scales is None or len(biases) not in (0, len(modules)):
        return None
    name = "+".join([modules[0], *(module.rpartition(".")[2] for module in modules[1:])])
    first = weights[0]
    fused = StoredWeight(array, scales, first.bits, first.columns, first.padded_columns)
    joined_bias = join(biases) if biases else None
    bias = None if joined_bias is None else graph.external(f"{name}.bias", joined_bias)
    return matmul_nbits(graph, f"{name}.weight", fused, first.columns, states, name, bias)


def _skip_norm(graph: Graph, states: str, residual: str, name: str) -> tuple[str, str]:
    """(norm of the sum, the sum)."""
    total = f"{name}.residual"
    inputs = [states, residual, float_weight(graph, f"{name}.weight")]
    epsilon = graph.spec.rms_norm_eps
    graph.node("SkipSimplifiedLayerNormalization", inputs, name, ["", "", total], domain=CONTRIB, epsilon=epsilon)
    return name, total
