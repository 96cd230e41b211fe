"""The training step as a TFLite file: for each sequence length a signature with gradients and one without, one base.

LiteRT's products with 4-bit weights round the activations to 8 bits, far too coarse for gradients. So every weight is
looked up row by row (EMBEDDING_LOOKUP dequantizes codes in groups exactly, at the speed of memory) and multiplied in
float32 where it is used; LiteRT runs operators in the file's order and gives the memory back after the last reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, Weights
from pipeline.export import tflite_operators as op
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.tflite_flatbuffer import ModelFile, Subgraph, save_model
from pipeline.export.tflite_graph import COLUMNS_METADATA, padded_columns, refuse_unfit
from pipeline.export.train_step import TrainStep, train_step
from pipeline.export.train_step_tape import Node

STEP_FILE = "train.tflite"
_OP, _OPTIONS = schema.BuiltinOperator, schema.BuiltinOptions


def write_tflite_train_steps(
    path: Path,
    spec: DecoderSpec,
    weights: Weights,
    lora: LoraSlots,
    *,
    buckets: Sequence[int],
    batch_sequences: int,
) -> None:
    """Write a file with the signatures ``train_<T>`` and ``loss_<T>`` for every sequence length of ``buckets``.

    Args:
        path: The file to write; replaced only when complete.
        spec: The decoder.
        weights: Checkpoint names to 4-bit codes and scales, or to float32 arrays.
        lora: Projections whose adapters are trained; their rank is fixed, lower ones are padded with zeros.
        buckets: Sequence lengths in tokens.
        batch_sequences: Sequences of every step.

    Raises:
        ExportError: The weights do not fit the container.
    """
    refuse_unfit(spec, weights, "current", lora, prefill_tokens=min(buckets))
    model = ModelFile()
    model.metadata[COLUMNS_METADATA] = json.dumps(padded_columns(weights)).encode()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    for tokens in buckets:
        for name, gradients in ((f"train_{tokens}", True), (f"loss_{tokens}", False)):
            sizes = {"tokens": tokens, "batch": batch_sequences, "rank": lora.rank}
            step = train_step(spec, shapes, lora, gradients=gradients, **sizes)
            _emit(_Writer(model.subgraph(name), weights, {}), step)
    save_model(path, model, "sevenfold training step")


class _Writer:
    """One signature; ``tensors`` maps the tape's names to the subgraph's tensors."""

    def __init__(self, graph: Subgraph, weights: Weights, tensors: dict[str, int]) -> None:
        self.graph, self.weights, self.tensors = graph, weights, tensors

    def matrix(self, name: str) -> int:
        """(N, Kp) in float32, made anew for each use."""
        value = self.weights[name]
        weight = self.graph.weight(name, value)
        if not isinstance(value, QuantizedTensor):
            return weight
        rows = self.graph.constant(np.arange(value.shape[0], dtype=np.int32))
        return op.embedding_lookup(self.graph, rows, weight, value)


def _emit(writer: _Writer, step: TrainStep) -> None:
    graph, tensors = writer.graph, writer.tensors
    for node in step.tape.nodes:
        output = node.output
        inputs = [tensors[tensor.name] for tensor in node.inputs]
        if node.operator == "source":
            kind = np.int32 if output.kind == "int32" else np.float32
            tensors[output.name] = graph.input(output.name, _sizes(node), kind)
        elif node.operator == "parameter":
            tensors[output.name] = graph.weight(output.name, writer.weights[output.name])
        elif node.operator == "constant":
            tensors[output.name] = graph.constant(step.tape.constants[output.name])
        else:
            tensors[output.name] = _EMITTERS[node.operator](writer, node, inputs)
    for name, tensor in step.outputs.items():
        graph.output(name, tensors[tensor.name])


def _sizes(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.output.shape)


_Emitter = Callable[[_Writer, Node, list[int]], int]


def _unary(builtin: int) -> _Emitter:
    return lambda writer, node, inputs: writer.graph.operator(builtin, inputs, _sizes(node))


def _subtract(writer: _Writer, node: Node, inputs: list[int]) -> int:
    return writer.graph.operator(_OP.SUB, inputs, _sizes(node), (_OPTIONS.SubOptions, schema.SubOptionsT()))


def _divide(writer: _Writer, node: Node, inputs: list[int]) -> int:
    return writer.graph.operator(_OP.DIV, inputs, _sizes(node), (_OPTIONS.DivOptions, schema.DivOptionsT()))


def _scale(writer: _Writer, node: Node, inputs: list[int]) -> int:
    factor = writer.graph.constant(np.array([node.attributes["factor"]], np.float32))
    return op.multiply(writer.graph, inputs[0], factor)


def _flat(writer: _Writer, tokens: int) -> int:
    size = int(np.prod(writer.graph.shapes[tokens]))
    options = (_OPTIONS.ReshapeOptions, schema.ReshapeOptionsT([size]))
    shape = writer.graph.constant(np.array([size], np.int32))
    return writer.graph.operator(_OP.RESHAPE, [tokens, shape], (size,), options, dtype=np.int32)


def _next_tokens(writer: _Writer, node: Node, inputs: list[int]) -> int:
    """Moved over the ends of rows too: what stands there is never counted."""
    graph, flat = writer.graph, _flat(writer, inputs[0])
    size = graph.shapes[flat][0]
    options = (_OPTIONS.StridedSliceOptions, schema.StridedSliceOptionsT())
    stride = graph.constant(np.ones(1, np.int32))
    parts = []
    for begin, end in ((1, size), (0, 1)):
        bounds = [graph.constant(np.array([bound], np.int32)) for bound in (begin, end)]
        shape = (end - begin,)
        parts.append(
            graph.operator(_OP.STRIDED_SLICE, [flat, *bounds, stride], shape, options, version=1, dtype=np.int32)
        )
    joined = (_OPTIONS.ConcatenationOptions, schema.ConcatenationOptionsT(axis=0))
    return graph.operator(_OP.CONCATENATION, parts, (size,), joined, dtype=np.int32)


def _embed(writer: _Writer, node: Node, inputs: list[int]) -> int:
    graph, name = writer.graph, node.attributes["weight"]
    ids = inputs[0] if len(graph.shapes[inputs[0]]) == 1 else _flat(writer, inputs[0])
    rows = op.embedding_lookup(graph, ids, graph.weight(name, writer.weights[name]), writer.weights[name])
    return op.reshape(graph, rows, _sizes(node))


def _linear(writer: _Writer, node: Node, inputs: list[int]) -> int:
    graph, bias = writer.graph, node.attributes["bias"]
    weight = writer.matrix(node.attributes["weight"])
    padded = op.pad_last(graph, inputs[0], graph.shapes[weight][1])
    product = op.batch_matmul(graph, padded, weight, transpose_b=True)
    return product if bias is None else op.add(graph, product, graph.weight(bias, writer.weights[bias]))


def _linear_back(writer: _Writer, node: Node, inputs: list[int]) -> int:
    graph, columns = writer.graph, _sizes(node)[1]
    product = op.batch_matmul(graph, inputs[0], writer.matrix(node.attributes["weight"]), transpose_b=False)
    return product if graph.shapes[product][1] == columns else op.slice_last(graph, product, 0, columns)


def _matmul(writer: _Writer, node: Node, inputs: list[int]) -> int:
    flags = {name: bool(node.attributes[name]) for name in ("transpose_a", "transpose_b")}
    return op.batch_matmul(writer.graph, *inputs, **flags)


def _inverse_rms(writer: _Writer, node: Node, inputs: list[int]) -> int:
    graph, (x,) = writer.graph, inputs
    mean = _reduce(writer, _OP.MEAN, op.multiply(graph, x, x), _sizes(node), (len(graph.shapes[x]) - 1,))
    shifted = op.add(graph, mean, graph.constant(np.array([node.attributes["epsilon"]], np.float32)))
    return graph.operator(_OP.RSQRT, [shifted], _sizes(node))


def _largest(writer: _Writer, node: Node, inputs: list[int]) -> int:
    axes = (len(node.output.shape) - 1,)
    return _reduce(writer, _OP.REDUCE_MAX, inputs[0], _sizes(node), axes)


def _total(writer: _Writer, node: Node, inputs: list[int]) -> int:
    axes = node.attributes["axes"]
    everything = tuple(range(len(writer.graph.shapes[inputs[0]])))
    return _reduce(writer, _OP.SUM, inputs[0], _sizes(node), everything if axes is None else axes)


def _reduce(writer: _Writer, builtin: int, x: int, shape: tuple[int, ...], axes: Sequence[int]) -> int:
    keeps = len(shape) == len(writer.graph.shapes[x])
    options = (_OPTIONS.ReducerOptions, schema.ReducerOptionsT(keepDims=keeps))
    return writer.graph.operator(builtin, [x, writer.graph.constant(np.array(axes, np.int32))], shape, options)


def _swap_halves(writer: _Writer, node: Node, inputs: list[int]) -> int:
    first, second = op.halves(writer.graph, inputs[0])
    return op.concatenate(writer.graph, [second, first], axis=len(node.output.shape) - 1)


def _causal(writer: _Writer, node: Node, inputs: list[int]) -> int:
    return writer.graph.constant(np.triu(np.full(_sizes(node), node.attributes["hidden"], np.float32), k=1))


_EMITTERS: dict[str, _Emitter] = {
    "causal": _causal,
    "next_tokens": _next_tokens,
    "embed": _embed,
    "linear": _linear,
    "linear_back": _linear_back,
    "matmul": _matmul,
    "add": lambda writer, node, inputs: op.add(writer.graph, *inputs),
    "subtract": _subtract,
    "multiply": lambda writer, node, inputs: op.multiply(writer.graph, *inputs),
    "divide": _divide,
    "scale": _scale,
    "sigmoid": _unary(_OP.LOGISTIC),
    "exp": _unary(_OP.EXP),
    "log": _unary(_OP.LOG),
    "softmax": lambda writer, node, inputs: op.softmax(writer.graph, inputs[0]),
    "inverse_rms": _inverse_rms,
    "largest": _largest,
    "total": _total,
    "reshape": lambda writer, node, inputs: op.reshape(writer.graph, inputs[0], _sizes(node)),
    "transpose": lambda writer, node, inputs: op.transpose(writer.graph, inputs[0], node.attributes["order"]),
    "swap_halves": _swap_halves,
}
