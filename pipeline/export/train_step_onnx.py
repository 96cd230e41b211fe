"""The training step as ONNX files that read the ``weights.bin`` of the decoder beside them.

Products with W^T run over the codes (MatMulNBits). Products with W, which only gradients need, dequantize the same
codes at the moment of use and drop them again, so that no float copy of the base is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper, save_model

from edge_runtime.formats.decoder import DecoderSpec
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_data import StoredWeight
from pipeline.export.onnx_operators import (
    CONTRIB,
    Graph,
    embed,
    float_weight,
    in_features,
    matmul,
    slice_columns,
    to_model,
)
from pipeline.export.train_step import TrainStep, train_step
from pipeline.export.train_step_tape import Node, Tensor

STEP_FILE, LOSS_FILE = "train_{}.onnx", "loss_{}.onnx"
_LARGEST_FLOATS = 1 << 23  # of a weight in float32 at a time: 32 MB
_KINDS = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}


def write_onnx_train_steps(
    directory: Path,
    spec: DecoderSpec,
    stored: Mapping[str, StoredWeight],
    lora: LoraSlots,
    *,
    buckets: Sequence[int],
    batch_sequences: int,
) -> None:
    """Write ``train_<T>.onnx``, and ``loss_<T>.onnx`` without gradients, for every sequence length of ``buckets``.

    Args:
        directory: Holds the ``weights.bin`` that ``stored`` describes.
        spec: The decoder.
        stored: What ``write_onnx`` returned.
        lora: Projections whose adapters are trained; the graphs take any rank, the runtime up to ``lora.rank``.
        buckets: Sequence lengths in tokens.
        batch_sequences: Largest batch that a trainer may feed; the graphs take any.
    """
    properties = {
        "lora_rank": str(lora.rank),
        "lora_targets": ",".join(lora.targets),
        "batch_sequences": str(batch_sequences),
    }
    for tokens in buckets:
        for file, gradients in ((STEP_FILE, True), (LOSS_FILE, False)):
            graph = Graph(spec, stored, lora, accuracy_level=0)
            _emit(graph, train_step(spec, _shapes(graph), lora, tokens=tokens, batch="batch", gradients=gradients))
            save_model(to_model(graph, "train_step", properties), directory / file.format(tokens))


def _shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Of every stored weight, with the width that the one before down_proj really has."""
    shapes = {}
    for name, weight in graph.stored.items():
        matrix = len(weight.array.shape) > 1
        columns = in_features(graph, name.removesuffix(".weight"), weight)
        shapes[name] = (weight.rows, columns) if matrix else weight.array.shape
    return shapes


def _emit(graph: Graph, step: TrainStep) -> None:
    names = {tensor.name: name for name, tensor in step.outputs.items()}
    for node in step.tape.nodes:
        output = names.get(node.output.name, node.output.name)
        inputs = [names.get(tensor.name, tensor.name) for tensor in node.inputs]
        if node.operator == "source":
            graph.inputs.append(_value(output, node.output))
        elif node.operator == "parameter":
            float_weight(graph, output)
        elif node.operator == "constant":
            graph.constant(output, step.tape.constants[output])
        else:
            _EMITTERS[node.operator](graph, node, inputs, output)
    graph.outputs += [_value(name, tensor) for name, tensor in step.outputs.items()]


def _value(name: str, tensor: Tensor) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, _KINDS[tensor.kind], list(tensor.shape))


_Emitter = Callable[[Graph, Node, list[str], str], object]


def _plain(op: str) -> _Emitter:
    return lambda graph, node, inputs, output: graph.node(op, inputs, output)


def _embed(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    columns = node.output.shape[-1]
    assert isinstance(columns, int)
    embed(graph, node.attributes["weight"], inputs[0], output, columns)


def _linear(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    bias = node.attributes["bias"]
    matmul(graph, node.attributes["weight"], inputs[0], output, bias and float_weight(graph, bias))


def _linear_back(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    """dy W, where a long W (a head) is dequantized in parts."""
    name = node.attributes["weight"]
    weight, columns, dy = graph.stored[name], node.output.shape[1], inputs[0]
    assert isinstance(columns, int)
    if weight.scales is None:
        graph.node("MatMul", [dy, graph.external(name, weight.array)], output)
        return
    part_rows = max(1, _LARGEST_FLOATS // weight.padded_columns)
    starts = range(0, weight.rows, part_rows)
    products = []
    for start in starts:
        end = min(start + part_rows, weight.rows)
        part = dy if len(starts) == 1 else _columns(graph, dy, start, end)
        product = output if len(starts) == 1 else f"{output}.{start}"
        products.append(graph.node("MatMul", [part, _dequantized(graph, name, columns, part, (start, end))], product))
    if len(products) > 1:
        graph.node("Sum", products, output)


def _dequantized(graph: Graph, name: str, columns: int, dy: str, rows: tuple[int, int]) -> str:
    """Rows of a weight in float32, (end - start, columns).

    Looking rows up is twice as fast as DequantizeLinear, and reads the codes that the embedding reads. Their numbers
    are made to depend on ``dy`` (its length is never below 0): ONNX Runtime runs what depends on nothing first, and
    would keep every weight of the base in float32 until its turn comes.
    """
    start, end = rows
    bounds = [graph.constant(f"row.{number}", np.array(number, np.int64)) for number in (start, end, 1)]
    numbers = f"rows.{start}.{end}"
    if not any(node.output[0] == numbers for node in graph.nodes):
        graph.node("Range", bounds, numbers)
    stem = f"{name}.back.{start}"
    length = graph.node("Shape", [dy], f"{stem}.length", start=0, end=1)
    zero = graph.node("Min", [length, graph.constant("zero", np.array([0]))], f"{stem}.zero")
    return embed(graph, name, graph.node("Add", [numbers, zero], f"{stem}.rows"), stem, columns)


def _columns(graph: Graph, x: str, start: int, end: int) -> str:
    bounds = [graph.constant(f"columns_{number}", np.array([number])) for number in (start, end)]
    return graph.node("Slice", [x, *bounds, graph.constant("axis_1", np.array([1]))], f"{x}.{start}.{end}")


def _matmul(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    a, b = int(node.attributes["transpose_a"]), int(node.attributes["transpose_b"])
    if a or b:
        graph.node("FusedMatMul", inputs, output, domain=CONTRIB, transA=a, transB=b)
    else:
        graph.node("MatMul", inputs, output)


def _scale(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    factor = node.attributes["factor"]
    graph.node("Mul", [*inputs, graph.constant(f"factor.{factor!r}", np.array(factor, np.float32))], output)


def _inverse_rms(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    squared = graph.node("Mul", [inputs[0], inputs[0]], f"{output}.squared")
    mean = graph.node("ReduceMean", [squared, _axes(graph, (-1,))], f"{output}.mean")
    epsilon = graph.constant("epsilon", np.array(node.attributes["epsilon"], np.float32))
    root = graph.node("Sqrt", [graph.node("Add", [mean, epsilon], f"{output}.shifted")], f"{output}.root")
    graph.node("Reciprocal", [root], output)


def _total(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    axes = node.attributes["axes"]
    if axes is None:
        graph.node("ReduceSum", inputs, output, keepdims=0)
    else:
        graph.node("ReduceSum", [*inputs, _axes(graph, axes)], output)


def _reshape(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    sizes = [size if isinstance(size, int) else -1 for size in node.output.shape]
    shape = graph.constant("shape." + ".".join(map(str, sizes)), np.array(sizes, np.int64))
    graph.node("Reshape", [*inputs, shape], output)


def _swap_halves(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    first, second = f"{output}.first", f"{output}.second"
    graph.node("Split", inputs, first, [second], axis=-1, num_outputs=2)
    graph.node("Concat", [second, first], output, axis=-1)


def _next_tokens(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    one, end = graph.constant("one_column", np.array([1])), graph.constant("end", np.array([2**62]))
    first = slice_columns(graph, inputs[0], 1, 1, f"{output}.first")
    rest = graph.node("Slice", [inputs[0], one, end, graph.constant("axis_1", np.array([1]))], f"{output}.rest")
    graph.node("Concat", [rest, first], output, axis=1)


def _axes(graph: Graph, axes: Sequence[int]) -> str:
    return graph.constant("axes." + ".".join(map(str, axes)), np.array(axes, np.int64))


def _causal(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    """Folded when the file is loaded: the file stays small."""
    tokens = node.output.shape[0]
    assert isinstance(tokens, int)
    shape, above = graph.constant("causal.shape", np.array([tokens, tokens])), graph.constant("row.1", np.array(1))
    value = numpy_helper.from_array(np.array([node.attributes["hidden"]], np.float32))
    full = graph.node("ConstantOfShape", [shape], f"{output}.full", value=value)
    graph.node("Trilu", [full, above], output, upper=1)


_EMITTERS: dict[str, _Emitter] = {
    "causal": _causal,
    "next_tokens": _next_tokens,
    "embed": _embed,
    "linear": _linear,
    "linear_back": _linear_back,
    "matmul": _matmul,
    "add": _plain("Add"),
    "subtract": _plain("Sub"),
    "multiply": _plain("Mul"),
    "divide": _plain("Div"),
    "scale": _scale,
    "sigmoid": _plain("Sigmoid"),
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "softmax": lambda graph, node, inputs, output: graph.node("Softmax", inputs, output, axis=-1),
    "inverse_rms": _inverse_rms,
    "largest": lambda graph, node, inputs, output: graph.node("ReduceMax", [*inputs, _axes(graph, (-1,))], output),
    "total": _total,
    "reshape": _reshape,
    "transpose": lambda graph, node, inputs, output: graph.node(
        "Transpose", inputs, output, perm=node.attributes["order"]
    ),
    "swap_halves": _swap_halves,
}
