"""The one external data file of an ONNX export: every tensor's bytes once, viewed by several graphs.

Tensors are written one group at a time, so that a 7B never has to fit in memory as a graph. The
members of a group that a graph may run as one matrix (query, key and value; gate and up) lie end
to end: their rows can then be viewed as one initializer, or one by one, without a second copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderSpec, module_name
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights
from pipeline.export.onnx_checks import refuse_tensor

DATA_FILE = "weights.bin"
_BLOCK_ROWS = 1024
ALIGNMENT_BYTES = 64  # a cache line; also the widest vector load
FUSED_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_ONNX_TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float16): TensorProto.FLOAT16} | {
    np.dtype(np.float32): TensorProto.FLOAT
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one array lies in the data file, and what it is."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def length_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in the data file: a float array alone, or codes (N, bytes a row) with scales (N, groups).

    ``columns`` and ``padded_columns`` are K without and with the padding to whole groups.
    """

    array: Stored
    scales: Stored | None = None
    bits: int = 0
    columns: int = 0
    padded_columns: int = 0

    @property
    def rows(self) -> int:
        """N."""
        return self.array.shape[0]

    @property
    def group(self) -> int:
        """Input dimensions that share one scale; 0 for float weights."""
        return 0 if self.scales is None else self.padded_columns // self.scales.shape[1]


def write_data(path: Path, spec: DecoderSpec, weights: Weights) -> dict[str, StoredWeight]:
    """Write all weights and return where each one lies, by its Hugging Face name.

    Raises:
        ExportError: A tensor is missing, has no place in the decoder, or has a shape or group that does not fit.
    """
    stored: dict[str, StoredWeight] = {}
    with path.open("wb") as file:
        for names in _groups(spec, weights):
            stored |= _write_group(file, spec, names, weights)
    unplaced = sorted(set(weights) - set(stored))
    if unplaced:
        raise ExportError(f"{unplaced[0]}: this decoder has no place for it ({len(unplaced)} such tensors)")
    return stored


def join(parts: Sequence[Stored]) -> Stored | None:
    """The rows of neighbours in the file as one array; None when they do not lie end to end."""
    first = parts[0]
    for before, after in pairwise(parts):
        if after.offset_bytes != before.offset_bytes + before.length_bytes:
            return None
        if (after.dtype, after.shape[1:]) != (first.dtype, first.shape[1:]):
            return None
    return Stored(first.dtype, (sum(part.shape[0] for part in parts), *first.shape[1:]), first.offset_bytes)


def external_tensor(name: str, stored: Stored, shape: Sequence[int] | None = None) -> TensorProto:
    """An initializer that refers to the data file, optionally in another shape."""
    tensor = TensorProto(
        name=name,
        data_type=_ONNX_TYPES[stored.dtype],
        dims=stored.shape if shape is None else shape,
        data_location=TensorProto.EXTERNAL,
    )
    location = {"location": DATA_FILE, "offset": stored.offset_bytes, "length": stored.length_bytes}
    for key, value in location.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _groups(spec: DecoderSpec, weights: Weights) -> Iterator[list[str]]:
    """Names that are written together, in the order in which a step reads them."""
    yield [_required(f"{EMBEDDING}.weight", weights)]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        yield [_required(f"{prefix}.input_layernorm.weight", weights)]
        yield [name for norm in "qk" if (name := f"{prefix}.self_attn.{norm}_norm.weight") in weights]
        yield [_required(f"{prefix}.post_attention_layernorm.weight", weights)]
        for projections in FUSED_PROJECTIONS:
            modules = [module_name(layer, projection) for projection in projections]
            yield [_required(f"{module}.weight", weights) for module in modules]
            yield [name for module in modules if (name := f"{module}.bias") in weights]
    yield [_required(f"{FINAL_NORM}.weight", weights)]
    if not spec.tied_embeddings:
        yield [_required(f"{HEAD}.weight", weights)]


def _required(name: str, weights: Weights) -> str:
    if name not in weights:
        raise ExportError(f"{name}: missing from the weights")
    return name


def _write_group(file: BinaryIO, spec: DecoderSpec, names: Sequence[str], weights: Weights) -> dict[str, StoredWeight]:
    """Codes of all members, then their scales; only this group is in memory."""
    group = {name: weights[name] for name in names}
    for name, value in group.items():
        refuse_tensor(spec, name, value)
    arrays: dict[str, Stored] = {}
    for name, value in group.items():
        arrays[name] = _append_codes(file, value) if isinstance(value, QuantizedTensor) else _append(file, value)
    stored = {}
    for name, value in group.items():
        if isinstance(value, QuantizedTensor):
            scales = _append(file, np.asarray(value.scales, np.float16))
            stored[name] = StoredWeight(arrays[name], scales, value.bits, value.columns, value.padded_columns)
        else:
            columns = arrays[name].shape[-1]
            stored[name] = StoredWeight(arrays[name], columns=columns, padded_columns=columns)
    file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
    return stored


def _append_codes(file: BinaryIO, tensor: QuantizedTensor) -> Stored:
    """(N, Kp * bits / 8): the operators' default zero point is half of the unsigned range, as in packed 4-bit codes."""
    if tensor.bits == 4:
        return _append(file, tensor.packed)
    stored = Stored(np.dtype(np.uint8), tensor.packed.shape, file.tell())
    for start in range(0, len(tensor.packed), _BLOCK_ROWS):
        file.write((tensor.packed[start : start + _BLOCK_ROWS].view(np.uint8) + np.uint8(128)).data)
    return stored


def _append(file: BinaryIO, array: NDArray[np.generic]) -> Stored:
    stored = Stored(array.dtype, array.shape, file.tell())
    file.write(np.ascontiguousarray(array).data)
    return stored
