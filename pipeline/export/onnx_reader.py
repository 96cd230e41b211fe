"""The weights of an exported ONNX file, read back from its own graph and data file.

Nothing of the exporter's memory is used: bits, groups and sizes come from the operators'
attributes and the tensors' dimensions, so that a comparison with the codes proves the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edge_runtime.formats.errors import PackageError
from edge_runtime.formats.int4 import QuantizedTensor, unpack_nibbles

_QUANTIZED_OPS = ("MatMulNBits", "GatherBlockQuantized")


def read_onnx_weights(path: Path) -> dict[str, QuantizedTensor | NDArray[np.float32]]:
    """Codes and scales, or float32 arrays, by Hugging Face name, of ``model.onnx`` or ``model_lora.onnx``.

    Raises:
        PackageError: The graph or its data file is damaged or cut.
    """
    model, arrays = _load(path)
    weights: dict[str, QuantizedTensor | NDArray[np.float32]] = {}
    for node in model.graph.node:
        if node.op_type in _QUANTIZED_OPS:
            weights |= _quantized(model, node, arrays)
    for name, array in arrays.items():
        if not name.endswith((".codes", ".blocks", ".scales")):
            weights |= dict(zip(_part_names(name), _split(model, name, array), strict=True))
    return weights


def weight_bytes(path: Path) -> int:
    """Bytes of codes, scales, norms and biases that the file refers to, shared ones counted once.

    Raises:
        PackageError: As ``read_onnx_weights``.
    """
    model, _ = _load(path)
    extents = {_extent(tensor) for tensor in _external_tensors(model)}
    return sum(length for _, length in extents)


def _load(path: Path) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
    """The graph and its external tensors as read-only views of the data file."""
    try:
        model = onnx.load(path, load_external_data=False)
        arrays = {tensor.name: _view(path.parent, tensor) for tensor in _external_tensors(model)}
    except (OSError, ValueError, KeyError) as error:
        raise PackageError(f"{path}: cannot read the weights back ({error})") from error
    except Exception as error:  # protobuf's DecodeError derives from Exception alone
        raise PackageError(f"{path}: not an ONNX file ({error})") from error
    return model, arrays


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


def _quantized(model: ModelProto, node: NodeProto, arrays: dict[str, NDArray[Any]]) -> dict[str, QuantizedTensor]:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    gathers = node.op_type == "GatherBlockQuantized"
    codes_name = node.input[0 if gathers else 1]
    stem = codes_name.rpartition(".")[0]
    columns = _hidden_size(model) if gathers else int(attributes["K"])
    packed = arrays[codes_name].reshape(arrays[codes_name].shape[0], -1)
    bits = int(attributes["bits"])
    codes = unpack_nibbles(packed) if bits == 4 else (packed - np.uint8(128)).view(np.int8)
    scales = arrays[f"{stem}.scales"]
    if codes.shape[1] != scales.shape[1] * int(attributes["block_size"]):
        raise PackageError(f"{stem}: {codes.shape[1]} codes a row do not match {scales.shape[1]} scales")
    parts = zip(_part_names(stem), _split(model, stem, codes), _split(model, stem, scales), strict=True)
    return {name: QuantizedTensor.of_codes(part, np.array(scale), bits, columns) for name, part, scale in parts}


def _hidden_size(model: ModelProto) -> int:
    """Width of the final norm, the one place where padding never shows."""
    return next(int(tensor.dims[0]) for tensor in model.graph.initializer if tensor.name == "model.norm.weight")


def _part_names(name: str) -> list[str]:
    """``x.q_proj+k_proj.weight`` -> ``x.q_proj.weight``, ``x.k_proj.weight``."""
    module, _, kind = name.rpartition(".")
    prefix, _, parts = module.rpartition(".")
    return [f"{prefix}.{part}.{kind}" if prefix else f"{part}.{kind}" for part in parts.split("+")]


def _split(model: ModelProto, name: str, array: NDArray[Any]) -> Sequence[NDArray[Any]]:
    """The rows of each part of a fused matrix: query, key and value by their heads, gate and up in halves."""
    parts = len(_part_names(name))
    if parts < 3:
        return np.split(array, parts)
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    heads = {attribute.name: attribute.i for attribute in attention.attribute}
    unit = array.shape[0] // (heads["num_heads"] + 2 * heads["kv_num_heads"])
    query = unit * heads["num_heads"]
    return np.split(array, [query, query + unit * heads["kv_num_heads"]])
