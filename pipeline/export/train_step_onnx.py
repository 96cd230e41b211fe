"""The training step as ONNX files that read the ``weights.bin`` of the decoder beside them.

Products with W^T run over the codes (MatMulNBits). Products with W, which only gradients need, view the same bytes
as 4-bit numbers and dequantize them when they are used, so that no float copy of the base is kept: ONNX Runtime does
not fold DequantizeLinear when it loads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper, save_model

from edge_runtime.formats.decoder import DecoderSpec
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_data import StoredWeight, external_tensor
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

STEP_FILE = "train_{}.onnx"
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
    """Write ``train_<T>.onnx`` for every sequence length of ``buckets``.

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
        graph = Graph(spec, stored, lora, accuracy_level=0)
        step = train_step(spec, _shapes(graph), lora, tokens=tokens, batch="batch")
        _emit(graph, step)
        save_model(to_model(graph, "train_step", properties), directory / STEP_FILE.format(tokens))


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


def _linear(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    bias = node.attributes["bias"]
    matmul(graph, node.attributes["weight"], inputs[0], output, bias and float_weight(graph, bias))


def _linear_back(graph: Graph, node: Node, inputs: list[str], output: str) -> None:
    name = node.attributes["weight"]
    weight, columns = graph.stored[name], node.output.shape[1]
    assert isinstance(columns, int)
    if weight.scales is None:
        graph.node("MatMul", [inputs[0], graph.external(name, weight.array)], output)
    elif columns == weight.padded_columns:
        graph.node("MatMul", [inputs[0], _dequantized(graph, name, weight)], output)
    else:
        padded = graph.node("MatMul", [inputs[0], _dequantized(graph, name, weight)], f"{output}.padded")
        slice_columns(graph, padded, columns, 1, output)


def _dequantized(graph: Graph, name: str, weight: StoredWeight) -> str:
    """(N, Kp) in float32, made anew wherever it is used."""
    assert weight.scales is not None
    kind = TensorProto.UINT4 if weight.bits == 4 else TensorProto.UINT8
    codes, zeros = f"{name}.nibbles", f"zero_point.{weight.scales.shape[0]}.{weight.scales.shape[1]}.{weight.bits}"
    if codes not in graph.initializers:
        tensor = external_tensor(codes, weight.array, (weight.rows, weight.padded_columns))
        tensor.data_type = kind
        graph.initializers[codes] = tensor
    if zeros not in graph.initializers:
        zero_bytes = -(-int(np.prod(weight.scales.shape)) * weight.bits // 8)
        fill = b"\x88" if weight.bits == 4 else b"\x80"
        graph.initializers[zeros] = TensorProto(
            name=zeros, data_type=kind, dims=weight.scales.shape, raw_data=fill * zero_bytes
        )
    inputs = [codes, graph.scales(f"{name}.scales", weight.scales), zeros]
    output = f"{name}.float"
    if not any(node.output[0] == output for node in graph.nodes):
        graph.node("DequantizeLinear", inputs, output, axis=1, block_size=weight.group)
    return output


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


_EMITTERS: dict[str, _Emitter] = {
    "next_tokens": _next_tokens,
    "embed": lambda graph, node, inputs, output: embed(graph, node.attributes["weight"], inputs[0], output),
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
