"""What a TFLite file holds, read from the file itself: for verification and for honest sizes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from edge_runtime.formats.decoder import HEAD
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.export.tflite_flatbuffer import FILE_IDENTIFIER, SCALES_SUFFIX
from pipeline.export.tflite_graph import COLUMNS_METADATA


def read_tflite_weights(path: Path) -> dict[str, QuantizedTensor | NDArray[np.float32]]:
    """Every weight of the file under its checkpoint name, codes and scales as stored.

    Raises:
        ExportError: The file is not a TFLite model or a tensor is of a kind that this project does not write.
    """
    contents = _open(path)
    columns = json.loads(contents.metadata.get(COLUMNS_METADATA, b"{}"))
    return {
        stored.name: _decode(stored, contents.tensors, columns)
        for stored in contents.tensors
        if _is_weight(stored.name) and not stored.name.endswith(SCALES_SUFFIX)
    }


def weight_bytes(path: Path) -> int:
    """Bytes of codes, scales, norms and biases; what several tensors share counts once.

    Raises:
        ExportError: The file is not a TFLite model.
    """
    weights = [stored for stored in _open(path).tensors if _is_weight(stored.name)]
    return sum({stored.buffer: stored.data.nbytes + stored.table_scales.nbytes for stored in weights}.values())


@dataclass(frozen=True, slots=True)
class _Stored:
    """A constant tensor; ``scales`` is the index of its scale tensor, ``table_scales`` those kept in its table."""

    name: str
    index: int
    buffer: int
    type: int
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    scales: int | None
    table_scales: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Contents:
    tensors: list[_Stored]
    metadata: dict[str, bytes]


def _open(path: Path) -> _Contents:
    content = path.read_bytes()
    if content[4:8] != FILE_IDENTIFIER:
        raise ExportError(f"{path}: not a TFLite file")
    try:
        model = schema.Model.GetRootAs(content)
        metadata = {
            model.Metadata(index).Name().decode(): model.Buffers(model.Metadata(index).Buffer()).DataAsNumpy().tobytes()
            for index in range(model.MetadataLength())
        }
        # Signatures share their weights: the primary subgraph names them all.
        return _Contents(list(_constants(model, model.Subgraphs(0))), metadata)
    except (struct.error, AttributeError, IndexError, TypeError, ValueError) as error:
        raise ExportError(f"{path}: damaged or cut TFLite file ({error})") from error


def _constants(model: schema.Model, graph: schema.SubGraph) -> Iterator[_Stored]:
    for index in range(graph.TensorsLength()):
        tensor = graph.Tensors(index)
        buffer = model.Buffers(tensor.Buffer())
        if buffer.DataLength() == 0:
            continue
        scales, table_scales = _scales(tensor.Quantization())
        shape = tuple(int(size) for size in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()
        name = tensor.Name().decode()
        yield _Stored(name, index, tensor.Buffer(), tensor.Type(), shape, buffer.DataAsNumpy(), scales, table_scales)


def _scales(quantization: schema.QuantizationParameters | None) -> tuple[int | None, NDArray[np.float32]]:
    none = np.empty(0, np.float32)
    if quantization is None:
        return None, none
    if quantization.DetailsType() == schema.QuantizationDetails.BlockwiseQuantization:
        blockwise = schema.BlockwiseQuantization()
        details = quantization.Details()
        blockwise.Init(details.Bytes, details.Pos)
        return blockwise.Scales(), none
    return None, quantization.ScaleAsNumpy() if quantization.ScaleLength() else none


def _is_weight(name: str) -> bool:
    return name.startswith(("model.", f"{HEAD}."))


def _decode(stored: _Stored, tensors: list[_Stored], columns: dict[str, int]) -> QuantizedTensor | NDArray[np.float32]:
    width = columns.get(stored.name, stored.shape[-1])
    if stored.type == schema.TensorType.FLOAT32:
        return stored.data.view(np.float32).reshape(stored.shape)
    if stored.type == schema.TensorType.INT8:
        codes = stored.data.view(np.int8).reshape(stored.shape)
        return QuantizedTensor.of_codes(codes, stored.table_scales.astype(np.float16).reshape(1, -1), 8, width)
    if stored.type == schema.TensorType.INT4 and stored.scales is not None:
        scales = next(tensor for tensor in tensors if tensor.index == stored.scales)
        codes = _unpack(stored.data).reshape(stored.shape)
        return QuantizedTensor.of_codes(codes, scales.data.view(np.float16).reshape(scales.shape), 4, width)
    raise ExportError(f"{stored.name}: tensor type {stored.type} is not one that this project writes")


def _unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Two's complement nibbles, low one first, sign-extended."""
    nibbles = np.empty(packed.size * 2, np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 0xF, packed >> 4
    return (nibbles ^ 8).view(np.int8) - np.int8(8)
