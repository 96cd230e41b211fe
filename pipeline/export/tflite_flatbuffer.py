"""A TFLite model as a flatbuffer: buffers, tensors, operators, signatures.

Written with the object API of LiteRT's generated schema, so that an export needs neither TensorFlow nor a
converter. Knows nothing of decoders; ``tflite_graph`` says which operators a decoder is made of.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor

FILE_IDENTIFIER = b"TFL3"
SCALES_SUFFIX = ".scales"
# Offsets in a flatbuffer are signed 32-bit numbers; tables and alignment need some room.
MAX_FILE_BYTES = 2**31 - 2**24
_BUFFER_ALIGNMENT_BYTES = 16

_TENSOR_TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.float16): schema.TensorType.FLOAT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int8): schema.TensorType.INT8,
}


@dataclass(slots=True)
class ModelFile:
    """What subgraphs share: buffers (each stored once), operator codes, signatures, metadata."""

    buffers: list[NDArray[np.uint8]] = field(default_factory=lambda: [np.empty(0, np.uint8)])
    operator_codes: dict[tuple[int, int], int] = field(default_factory=dict)
    subgraphs: list[Subgraph] = field(default_factory=list)
    metadata: dict[str, bytes] = field(default_factory=dict)
    _stored: dict[object, int] = field(default_factory=dict)

    def subgraph(self, name: str) -> Subgraph:
        """Start a subgraph; it becomes a signature of the same name. The first is the primary one."""
        graph = Subgraph(self, name)
        self.subgraphs.append(graph)
        return graph

    def store(self, key: object, data: NDArray[np.generic]) -> int:
        """Index of the buffer with ``data``'s bytes, made at the first call with ``key``."""
        if key not in self._stored:
            self._stored[key] = len(self.buffers)
            self.buffers.append(np.frombuffer(np.ascontiguousarray(data), np.uint8))
        return self._stored[key]

    def operator_code(self, builtin: int, version: int) -> int:
        """Index of an operator code."""
        return self.operator_codes.setdefault((builtin, version), len(self.operator_codes))


@dataclass(slots=True)
class Subgraph:
    """Tensors and operators of one signature; ``shapes[tensor]`` is known for every tensor."""

    model: ModelFile
    name: str
    tensors: list[schema.TensorT] = field(default_factory=list)
    operators: list[schema.OperatorT] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    _constants: dict[object, int] = field(default_factory=dict)

    def input(self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> int:
        """A tensor that the host fills."""
        self.inputs[name] = self._tensor(name, shape, _TENSOR_TYPES[np.dtype(dtype)])
        return self.inputs[name]

    def output(self, name: str, tensor: int) -> None:
        """Hand ``tensor`` to the host."""
        self.outputs[name] = tensor

    def constant(self, values: NDArray[np.generic]) -> int:
        """A small constant (shape, axis, epsilon), stored once in the file."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            buffer = self.model.store(key, values)
            name = f"constant.{len(self._constants)}"
            self._constants[key] = self._tensor(name, values.shape, _TENSOR_TYPES[values.dtype], buffer)
        return self._constants[key]

    def weight(self, name: str, value: QuantizedTensor | NDArray[np.float32]) -> int:
        """A weight under its checkpoint name: float, int8 with one scale, or int4 in groups."""
        if name not in self._constants:
            if not isinstance(value, QuantizedTensor):
                values = value.astype(np.float32, copy=False)
                tensor = self._tensor(name, values.shape, schema.TensorType.FLOAT32, self.model.store(name, values))
            elif value.bits == 4:
                tensor = self._blockwise(name, value)
            else:
                tensor = self._per_tensor(name, value)
            self._constants[name] = tensor
        return self._constants[name]

    def operator(
        self,
        builtin: int,
        inputs: list[int],
        shape: tuple[int, ...],
        options: tuple[int, object] | None = None,
        version: int = 1,
        dtype: type[np.generic] = np.float32,
    ) -> int:
        """Append an operator with one output of ``shape``; returns that tensor."""
        return self.operator_many(builtin, inputs, [shape], options, version, dtype)[0]

    def operator_many(
        self,
        builtin: int,
        inputs: list[int],
        shapes: list[tuple[int, ...]],
        options: tuple[int, object] | None = None,
        version: int = 1,
        dtype: type[np.generic] = np.float32,
    ) -> list[int]:
        """Append an operator with one output a shape. ``options`` is (BuiltinOptions member, its table)."""
        kind = _TENSOR_TYPES[np.dtype(dtype)]
        outputs = [self._tensor(f"t{len(self.tensors)}", shape, kind) for shape in shapes]
        operator = schema.OperatorT(self.model.operator_code(builtin, version), inputs, outputs)
        if options is not None:
            operator.builtinOptionsType, operator.builtinOptions = options
        self.operators.append(operator)
        return outputs

    def _blockwise(self, name: str, value: QuantizedTensor) -> int:
        scales_buffer = self.model.store(name + SCALES_SUFFIX, value.scales)
        scales = self._tensor(name + SCALES_SUFFIX, value.scales.shape, schema.TensorType.FLOAT16, scales_buffer)
        details = schema.BlockwiseQuantizationT(scales=scales, zeroPoints=-1, blockSize=value.group)
        quantization = schema.QuantizationParametersT(
            detailsType=schema.QuantizationDetails.BlockwiseQuantization, details=details
        )
        buffer = self.model.store(name, _twos_complement_nibbles(value.codes))
        return self._tensor(name, (value.shape[0], value.padded_columns), schema.TensorType.INT4, buffer, quantization)

    def _per_tensor(self, name: str, value: QuantizedTensor) -> int:
        scale = np.asarray(value.scales, np.float32).reshape(-1)
        quantization = schema.QuantizationParametersT(scale=scale, zeroPoint=np.zeros(1, np.int64))
        buffer = self.model.store(name, value.codes)
        return self._tensor(name, (value.shape[0], value.padded_columns), schema.TensorType.INT8, buffer, quantization)

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        tensor_type: int,
        buffer: int = 0,
        quantization: schema.QuantizationParametersT | None = None,
    ) -> int:
        self.shapes.append(tuple(shape))
        self.tensors.append(schema.TensorT(list(shape), tensor_type, buffer, name, quantization, hasRank=True))
        return len(self.tensors) - 1


def save_model(path: Path, model: ModelFile, description: str) -> None:
    """Serialize ``model`` and replace ``path`` by it.

    Raises:
        ExportError: The file would be larger than a flatbuffer can be.
    """
    data_bytes = sum(buffer.size + _BUFFER_ALIGNMENT_BYTES for buffer in model.buffers)
    if data_bytes > MAX_FILE_BYTES:
        raise ExportError(
            f"{path.name}: {data_bytes} bytes of weights, but a TFLite file holds at most {MAX_FILE_BYTES};"
            " export a smaller submodel or the ONNX container"
        )
    builder = flatbuffers.Builder(data_bytes + 2**20)
    builder.Finish(_model_table(model, description).Pack(builder), file_identifier=FILE_IDENTIFIER)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(memoryview(builder.Bytes)[builder.Head() :])
    os.replace(partial, path)


def _twos_complement_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """(N, K) in [-8, 7] -> (N, K / 2), low nibble first: TFLite's INT4, without the offset of ours."""
    nibbles = codes.view(np.uint8) & 0xF
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).astype(np.uint8, copy=False)


def _model_table(model: ModelFile, description: str) -> schema.ModelT:
    metadata = []
    for name, content in model.metadata.items():
        buffer = model.store(("metadata", name), np.frombuffer(content, np.uint8))
        metadata.append(schema.MetadataT(name, buffer))
    codes = [
        # Readers from before 2020 know only the 8-bit field; 127 there means "look at the other".
        schema.OperatorCodeT(min(builtin, 127), None, version, builtin)
        for builtin, version in model.operator_codes
    ]
    return schema.ModelT(
        version=3,
        operatorCodes=codes,
        subgraphs=[_subgraph_table(graph) for graph in model.subgraphs],
        description=description,
        buffers=[_AlignedBuffer(buffer) for buffer in model.buffers],
        metadata=metadata,
        signatureDefs=[_signature_table(graph, index) for index, graph in enumerate(model.subgraphs)],
    )


def _subgraph_table(graph: Subgraph) -> schema.SubGraphT:
    return schema.SubGraphT(
        graph.tensors, list(graph.inputs.values()), list(graph.outputs.values()), graph.operators, graph.name
    )


def _signature_table(graph: Subgraph, index: int) -> schema.SignatureDefT:
    inputs = [schema.TensorMapT(name, tensor) for name, tensor in graph.inputs.items()]
    outputs = [schema.TensorMapT(name, tensor) for name, tensor in graph.outputs.items()]
    return schema.SignatureDefT(inputs, outputs, graph.name, index)


class _AlignedBuffer(schema.BufferT):  # type: ignore[misc]
    """A buffer whose data is 16-byte aligned, as the schema demands and its Python code forgets."""

    def Pack(self, builder: flatbuffers.Builder) -> int:
        if self.data.size == 0:
            schema.BufferStart(builder)
            return int(schema.BufferEnd(builder))
        builder.StartVector(1, self.data.size, _BUFFER_ALIGNMENT_BYTES)
        head = builder.head - self.data.size
        builder.Bytes[head : builder.head] = memoryview(self.data)
        builder.head = head
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return int(schema.BufferEnd(builder))
