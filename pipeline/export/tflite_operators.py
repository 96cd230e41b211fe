"""The TFLite operators that a decoder needs, each as a function from tensors to a tensor.

Every function takes the subgraph and tensor indices, computes the result's shape and picks the oldest operator
version that means what it writes: old runtimes refuse newer versions even where nothing changed for them.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.export.tflite_flatbuffer import Subgraph

_OP = schema.BuiltinOperator
_OPTIONS = schema.BuiltinOptions


def add(graph: Subgraph, a: int, b: int) -> int:
    """a + b, broadcast."""
    return graph.operator(_OP.ADD, [a, b], _broadcast(graph, a, b), (_OPTIONS.AddOptions, schema.AddOptionsT()))


def multiply(graph: Subgraph, a: int, b: int) -> int:
    """a * b, broadcast."""
    return graph.operator(_OP.MUL, [a, b], _broadcast(graph, a, b), (_OPTIONS.MulOptions, schema.MulOptionsT()))


def rms_norm(graph: Subgraph, x: int, weight: int, epsilon: float) -> int:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""
    last_axis = graph.constant(np.array([len(graph.shapes[x]) - 1], np.int32))
    reduced = (*graph.shapes[x][:-1], 1)
    options = (_OPTIONS.ReducerOptions, schema.ReducerOptionsT(keepDims=True))
    mean = graph.operator(_OP.MEAN, [multiply(graph, x, x), last_axis], reduced, options)
    shifted = add(graph, mean, graph.constant(np.array([epsilon], np.float32)))
    inverse = graph.operator(_OP.RSQRT, [shifted], reduced)
    return multiply(graph, multiply(graph, x, inverse), weight)


def silu(graph: Subgraph, x: int) -> int:
    """x * sigmoid(x)."""
    return multiply(graph, x, graph.operator(_OP.LOGISTIC, [x], graph.shapes[x]))


def softmax(graph: Subgraph, x: int) -> int:
    """Softmax over the last axis."""
    return graph.operator(
        _OP.SOFTMAX, [x], graph.shapes[x], (_OPTIONS.SoftmaxOptions, schema.SoftmaxOptionsT(beta=1.0))
    )


def reshape(graph: Subgraph, x: int, shape: tuple[int, ...]) -> int:
    """The same numbers in another shape."""
    if graph.shapes[x] == shape:
        return x
    target = graph.constant(np.array(shape, np.int32))
    options = (_OPTIONS.ReshapeOptions, schema.ReshapeOptionsT(list(shape)))
    return graph.operator(_OP.RESHAPE, [x, target], shape, options)


def transpose(graph: Subgraph, x: int, order: tuple[int, ...]) -> int:
    """Axes in another order."""
    shape = tuple(graph.shapes[x][axis] for axis in order)
    permutation = graph.constant(np.array(order, np.int32))
    return graph.operator(
        _OP.TRANSPOSE, [x, permutation], shape, (_OPTIONS.TransposeOptions, schema.TransposeOptionsT())
    )


def concatenate(graph: Subgraph, parts: list[int], axis: int) -> int:
    """Parts one after another along ``axis`` (not negative)."""
    shape = list(graph.shapes[parts[0]])
    shape[axis] = sum(graph.shapes[part][axis] for part in parts)
    options = (_OPTIONS.ConcatenationOptions, schema.ConcatenationOptionsT(axis=axis))
    return graph.operator(_OP.CONCATENATION, parts, tuple(shape), options)


def slice_last(graph: Subgraph, x: int, begin: int, end: int | None) -> int:
    """``x[..., begin:end]``; without an end it follows the axis when the host resizes an input."""
    *rest, width = graph.shapes[x]
    whole_axes = (1 << len(rest)) - 1
    last_axis = 1 << len(rest)
    bounds = [
        graph.constant(np.array([0] * len(rest) + [bound], np.int32)) for bound in (begin, 0 if end is None else end)
    ]
    strides = graph.constant(np.ones(len(rest) + 1, np.int32))
    end_mask = whole_axes | last_axis if end is None else whole_axes
    options = schema.StridedSliceOptionsT(beginMask=whole_axes, endMask=end_mask)
    shape = (*rest, (width if end is None else end) - begin)
    return graph.operator(_OP.STRIDED_SLICE, [x, *bounds, strides], shape, (_OPTIONS.StridedSliceOptions, options))


def halves(graph: Subgraph, x: int) -> tuple[int, int]:
    """First and second half of the last axis."""
    axis = graph.constant(np.array([len(graph.shapes[x]) - 1], np.int32))
    shape = (*graph.shapes[x][:-1], graph.shapes[x][-1] // 2)
    options = (_OPTIONS.SplitOptions, schema.SplitOptionsT(numSplits=2))
    first, second = graph.operator_many(_OP.SPLIT, [axis, x], [shape, shape], options)
    return first, second


def pad_last(graph: Subgraph, x: int, size: int) -> int:
    """Zeros after the last axis, up to ``size``."""
    *rest, width = graph.shapes[x]
    if width == size:
        return x
    padding = graph.constant(np.array([[0, 0]] * len(rest) + [[0, size - width]], np.int32))
    return graph.operator(_OP.PAD, [x, padding], (*rest, size), (_OPTIONS.PadOptions, schema.PadOptionsT()))


def batch_matmul(graph: Subgraph, a: int, b: int, *, transpose_b: bool, transpose_a: bool = False) -> int:
    """a @ b over the last two axes, either of them transposed if so said."""
    rows = graph.shapes[a][-1] if transpose_a else graph.shapes[a][-2]
    columns = graph.shapes[b][-2] if transpose_b else graph.shapes[b][-1]
    options = (_OPTIONS.BatchMatMulOptions, schema.BatchMatMulOptionsT(adjX=transpose_a, adjY=transpose_b))
    return graph.operator(_OP.BATCH_MATMUL, [a, b], (*graph.shapes[a][:-2], rows, columns), options)


def fully_connected(graph: Subgraph, x: int, weight: int, bias: int | None, value: QuantizedTensor | np.ndarray) -> int:
    """x (T, K) @ weight (N, K)^T + bias (N,); ``value`` is what ``weight`` was made of."""
    options = schema.FullyConnectedOptionsT()
    version = 1 if bias is not None else 6
    if isinstance(value, QuantizedTensor) and value.bits == 4:
        version = 13
    elif isinstance(value, QuantizedTensor):
        # The old runtime's activations get a zero point too: a tenth less error for no time.
        options.asymmetricQuantizeInputs, version = True, 9
    shape = (graph.shapes[x][0], graph.shapes[weight][0])
    inputs = [x, weight, -1 if bias is None else bias]
    return graph.operator(_OP.FULLY_CONNECTED, inputs, shape, (_OPTIONS.FullyConnectedOptions, options), version)


def embedding_lookup(graph: Subgraph, ids: int, weight: int, value: QuantizedTensor | np.ndarray) -> int:
    """Rows ``ids`` (T,) of weight (V, H)."""
    version = 1
    if isinstance(value, QuantizedTensor):
        version = 4 if value.bits == 4 else 3
    shape = (*graph.shapes[ids], graph.shapes[weight][1])
    return graph.operator(_OP.EMBEDDING_LOOKUP, [ids, weight], shape, version=version)


def _broadcast(graph: Subgraph, a: int, b: int) -> tuple[int, ...]:
    return tuple(int(size) for size in np.broadcast_shapes(graph.shapes[a], graph.shapes[b]))
