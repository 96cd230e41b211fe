"""The weights of an exported ONNX file, read back from its own graph and data file.

Nothing of the exporter's memory is used: bits, groups and sizes come from the operators'
attributes and the tensors' dimensions, so that a comparison with the codes proves the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edge_runtime.formats.errors import PackageError
from edge_runtime.formats.int4 import QuantizedTensor, Weights

_QUANTIZED_OPS = ("MatMulNBits", "GatherBlockQuantized")


def read_onnx_weights(path: Path) -> Weights:
    """Codes and scales, or float32 arrays, by Hugging Face name, of ``model.onnx`` or ``model_lora.onnx``.

    A weight is mapped from the data file each time that it is asked for, and nothing is kept.

    Raises:
        PackageError: The graph or its data file is damaged or cut.
    """
    model, tensors = _load(path)
    views = {name: partial(_view, path.parent, tensor) for name, tensor in tensors.items()}
    readers: dict[str, _Reader] = {}
    for node in model.graph.node:
        if node.op_type in _QUANTIZED_OPS:
            readers |= _quantized(model, node, views)
    for name, tensor in tensors.items():
        if not name.endswith((".codes", ".blocks", ".scales")):
            parts = zip(_part_names(name), _part_rows(model, name, tensor.dims[0]), strict=True)
            readers |= {part: partial(_rows, views[name], rows) for part, rows in parts}
    return _ReadWeights(readers)


def weight_bytes(path: Path) -> int:
    """Bytes of codes, scales, norms and biases that the file refers to, shared ones counted once.

    Raises:
        PackageError: As ``read_onnx_weights``.
    """
    model, _ = _load(path)
    extents = {_extent(tensor) for tensor in _external_tensors(model)}
    return sum(length for _, length in extents)


_Reader = Callable[[], "QuantizedTensor | NDArray[np.float32]"]
_View = Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _ReadWeights(Mapping[str, "QuantizedTensor | NDArray[np.float32]"]):
    readers: dict[str, _Reader]

    def __getitem__(self, name: str) -> QuantizedTensor | NDArray[np.float32]:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def _load(path: Path) -> tuple[ModelProto, dict[str, TensorProto]]:
    """The graph and its external tensors, each of which lies in the data file as a whole."""
    try:
        model = onnx.load(path, load_external_data=False)
        tensors = {tensor.name: tensor for tensor in _external_tensors(model)}
        for tensor in tensors.values():
            _view(path.parent, tensor)  # refuses what the file is too short for; reads nothing
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{path}: cannot read the weights back ({error})") from error
    except Exception as error:  # protobuf's DecodeError derives from Exception alone
        raise PackageError(f"{path}: not an ONNX file ({error})") from error
    return model, tensors


def _external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _extent(tensor: TensorProto) -> tuple[int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["offset"]), int(entries["length"])


def _view(directory: Path, tensor: TensorProto) -> NDArray[Any]:
    location = next(entry.value for entry in tensor.external_data if entry.key == "location")
    if Path(location).name != location:
        raise ValueError(f"{tensor.name} lies outside of the directory, in {location}")
    offset, length = _extent(tensor)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    view = np.memmap(directory / location, dtype=dtype, mode="r", offset=offset, shape=(length // dtype.itemsize,))
    return np.asarray(view).reshape(tuple(tensor.dims))


def _quantized(model: ModelProto, node: NodeProto, views: Mapping[str, _View]) -> dict[str, _Reader]:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    gathers = node.op_type == "GatherBlockQuantized"
    codes_name = node.input[0 if gathers else 1]
    stem = codes_name.rpartition(".")[0]
    columns = _hidden_size(model) if gathers else int(attributes["K"])
    codes, scales, bits = views[codes_name], views[f"{stem}.scales"], int(attributes["bits"])
    shape, groups = codes().shape, scales().shape[1]
    width = prod(shape[1:]) * 8 // bits
    if width != groups * int(attributes["block_size"]):
        raise PackageError(f"{stem}: {width} codes a row do not match {groups} scales")
    parts = zip(_part_names(stem), _part_rows(model, stem, shape[0]), strict=True)
    return {name: partial(_decode, codes, scales, rows, bits, columns) for name, rows in parts}


def _decode(codes: _View, scales: _View, rows: slice, bits: int, columns: int) -> QuantizedTensor:
    packed = codes()[rows].reshape(rows.stop - rows.start, -1)
    return QuantizedTensor(
        packed if bits == 4 else (packed - np.uint8(128)).view(np.int8), scales()[rows], bits, columns
    )


def _rows(array: _View, rows: slice) -> NDArray[np.float32]:
    return array()[rows]


def _hidden_size(model: ModelProto) -> int:
    """Width of the final norm, the one place where padding never shows."""
    return next(int(tensor.dims[0]) for tensor in model.graph.initializer if tensor.name == "model.norm.weight")


def _part_names(name: str) -> list[str]:
    """``x.q_proj+k_proj.weight`` -> ``x.q_proj.weight``, ``x.k_proj.weight``."""
    module, _, kind = name.rpartition(".")
    prefix, _, parts = module.rpartition(".")
    return [f"{prefix}.{part}.{kind}" if prefix else f"{part}.{kind}" for part in parts.split("+")]


def _part_rows(model: ModelProto, name: str, rows: int) -> list[slice]:
    """The rows of each part of a fused matrix: query, key and value by their heads, gate and up in halves."""
    parts = len(_part_names(name))
    if parts < 3:
        step = rows // parts
        return [slice(start, start + step) for start in range(0, rows, step)]
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    heads = {attribute.name: attribute.i for attribute in attention.attribute}
    unit = rows // (heads["num_heads"] + 2 * heads["kv_num_heads"])
    query, value = unit * heads["num_heads"], unit * (heads["num_heads"] + heads["kv_num_heads"])
    return [slice(0, query), slice(query, value), slice(value, rows)]
