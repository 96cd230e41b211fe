"""A graph under construction and the operators over stored weights, shared by the decoder and its training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.onnx_data import Stored, StoredWeight, external_tensor

CONTRIB = "com.microsoft"
OPSET, IR_VERSION = 23, 11  # the first opset with RMSNormalization


@dataclass(slots=True)
class Graph:
    """A graph under construction; what is constant for all of it rides along."""

    spec: DecoderSpec
    stored: Mapping[str, StoredWeight]
    lora: LoraSlots | None
    accuracy_level: int
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    casts: dict[str, str] = field(default_factory=dict)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)

    def node(
        self, op: str, inputs: Sequence[str], output: str, more: Sequence[str] = (), domain: str = "", **attributes: Any
    ) -> str:
        """Append a node named after its first output, which is returned."""
        self.nodes.append(helper.make_node(op, inputs, [output, *more], name=output, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """A small initializer, stored in the graph itself; the first value of a name stays."""
        self.initializers.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def external(self, name: str, stored: Stored, shape: Sequence[int] | None = None) -> str:
        """An initializer in the data file."""
        self.initializers.setdefault(name, external_tensor(name, stored, shape))
        return name

    def scales(self, name: str, stored: Stored) -> str:
        """float32 scales; the cast is folded when the file is loaded, before weights are repacked."""
        if name not in self.casts:
            self.casts[name] = self.node("Cast", [self.external(name, stored)], f"{name}.f32", to=TensorProto.FLOAT)
        return self.casts[name]


def embed(graph: Graph, name: str, ids: str, output: str, columns: int) -> str:
    """Rows ``ids`` of the matrix ``name``, without the padding behind its first ``columns``."""
    weight = graph.stored[name]
    if weight.scales is None:
        return graph.node("Gather", [graph.external(name, weight.array), ids], output)
    rows = graph.node(
        "GatherBlockQuantized",
        [graph.external(f"{name}.codes", weight.array), ids, graph.scales(f"{name}.scales", weight.scales)],
        output if weight.padded_columns == columns else f"{output}.padded",
        domain=CONTRIB,
        bits=weight.bits,
        block_size=weight.group,
        gather_axis=0,
        quantize_axis=1,
    )
    return rows if weight.padded_columns == columns else slice_columns(graph, rows, columns, -1, output)


def slice_columns(graph: Graph, x: str, columns: int, axis: int, output: str) -> str:
    """The first ``columns`` along ``axis``."""
    ends = graph.constant(f"columns_{columns}", np.array([columns]))
    zero, axes = graph.constant("zero", np.array([0])), graph.constant(f"axis_{axis}", np.array([axis]))
    return graph.node("Slice", [x, zero, ends, axes], output)


def matmul(graph: Graph, name: str, states: str, output: str, bias: str | None) -> str:
    """states W^T + bias with the stored weight ``name`` (N, K), quantized or not."""
    weight = graph.stored[name]
    if weight.scales is not None:
        columns = in_features(graph, name.removesuffix(".weight"), weight)
        return matmul_nbits(graph, name, weight, columns, states, output, bias)
    # Stored as the checkpoint has it, (N, K); the transpose is folded when the file is loaded.
    transposed = graph.node("Transpose", [graph.external(name, weight.array)], f"{name}.transposed", perm=[1, 0])
    if bias is None:
        return graph.node("MatMul", [states, transposed], output)
    return graph.node("Add", [graph.node("MatMul", [states, transposed], f"{output}.unbiased"), bias], output)


def matmul_nbits(
    graph: Graph, name: str, weight: StoredWeight, columns: int, states: str, output: str, bias: str | None
) -> str:
    """states W^T + bias over codes."""
    assert weight.scales is not None
    blocks = (weight.rows, weight.scales.shape[1], weight.group * weight.bits // 8)
    codes = graph.external(f"{name}.blocks", weight.array, blocks)
    inputs = [states, codes, graph.scales(f"{name}.scales", weight.scales)]
    return graph.node(
        "MatMulNBits",
        inputs if bias is None else [*inputs, "", "", bias],
        output,
        domain=CONTRIB,
        bits=weight.bits,
        block_size=weight.group,
        K=columns,
        N=weight.rows,
        accuracy_level=graph.accuracy_level,
    )


def in_features(graph: Graph, module: str, weight: StoredWeight) -> int:
    """Width of a projection's input: the gate's rows (they may be padded) in front of down_proj."""
    if not module.endswith("down_proj"):
        return weight.columns
    prefix = module.removesuffix("down_proj")
    gate, up = graph.stored[f"{prefix}gate_proj.weight"].rows, graph.stored[f"{prefix}up_proj.weight"].rows
    if gate != up or not weight.columns <= gate <= weight.padded_columns:
        raise ExportError(f"{module}: {weight.columns} columns behind {gate} gate and {up} up rows")
    return gate


def float_weight(graph: Graph, name: str) -> str:
    """A vector of the checkpoint."""
    return graph.external(name, graph.stored[name].array)


def to_model(graph: Graph, name: str, properties: Mapping[str, str]) -> ModelProto:
    """The finished graph; ``properties`` are strings that a runtime reads before it runs anything."""
    body = helper.make_graph(graph.nodes, name, graph.inputs, graph.outputs, list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="sevenfold")
    helper.set_model_props(model, dict(properties))
    return model
