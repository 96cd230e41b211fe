"""A GGUF file read back with the gguf package's own reader and dequantizer, against the stored codes.

Rows are compared in blocks through a mapping of each tensor, so that a 7B takes little memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights, dequantize
from pipeline.export.gguf import ROPE_FACTORS, Place, place_of, row_blocks


def require_same_gguf(path: Path, spec: DecoderSpec, weights: Weights) -> int:
    """Compare every code and every scale of the file with what was to be stored, bit for bit.

    Returns:
        Bytes of codes, scales, norms and biases in the file.

    Raises:
        ExportError: The file is no GGUF, a tensor is missing, or a number differs.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{path}: cannot be read back ({error})") from error
    stored = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    places = [place_of(weight, weights[weight], spec, architecture) for weight in weights]
    if missing := sorted({place.name for place in places} ^ set(stored)):
        raise ExportError(f"{path.name}: tensors differ: {', '.join(missing[:5])}")
    for place in places:
        _require_same(path, stored[place.name], place, weights[place.weight])
    return sum(int(tensor.n_bytes) for tensor in stored.values())


def _require_same(path: Path, tensor: Any, place: Place, value: QuantizedTensor | NDArray[np.float32]) -> None:
    from gguf import dequantize as dequantize_gguf

    kind, shape = tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape))
    if kind.name != place.kind or shape != place.shape:
        raise ExportError(f"{path.name}: {place.name} is {kind.name} {shape}, to be stored was {place.kind}")
    data = np.memmap(path, tensor.data.dtype, "r", int(tensor.data_offset), tensor.data.shape)
    for start, stop in row_blocks(place.shape):
        found, rows = np.asarray(data[start:stop]), place.source_rows(start, stop)
        if not isinstance(value, QuantizedTensor):
            same = np.array_equal(found.view(np.uint32), np.ascontiguousarray(value[rows]).view(np.uint32))
        else:
            scales = value.scales if len(value.scales) == 1 else value.scales[rows]
            expected = QuantizedTensor(value.packed[rows], scales, value.bits, value.columns)
            # Codes are told from equal products by their scales; both are compared as bits, for -0 too.
            numbers = np.ascontiguousarray(dequantize_gguf(found, kind)).view(np.uint32)
            same = np.array_equal(numbers, np.ascontiguousarray(dequantize(expected)).view(np.uint32))
            same &= np.array_equal(_stored_scales(found, expected.bits), _repeated_scales(expected))
        if not same:
            raise ExportError(f"{path.name}: {place.name} differs from the stored codes")


def _stored_scales(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint16]:
    """(n, K / 32): the first two bytes of each block, as bits."""
    blocks = rows.reshape(len(rows), -1, 2 + 4 * bits)
    return np.ascontiguousarray(blocks[:, :, :2]).view(np.uint16)[:, :, 0]


def _repeated_scales(rows: QuantizedTensor) -> NDArray[np.uint16]:
    """(n, K / 32) as bits, each as often as its group has blocks."""
    count, columns = rows.shape
    columns_of_blocks = np.arange(0, columns, 32) // rows.group
    return np.broadcast_to(rows.scales, (count, rows.scales.shape[1]))[:, columns_of_blocks].view(np.uint16)
