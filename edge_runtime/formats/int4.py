"""Codes and scales: the one set from which every container is packed.

A weight (N, K) is stored as integer codes in groups of ``group`` along K with one fp16 scale a
group; ``weight = code * scale``. Four-bit codes lie in [-8, 7]: the grid of GGUF Q4_0, of ONNX
MatMulNBits without zero points and of compressed-tensors. Eight-bit codes lie in [-127, 127]. On
disk four-bit codes are offset by 8 and packed two a byte, low nibble first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import PackageError

CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
_HEADER = "sevenfold"  # one key holds all: safetensors writes several in an order that changes from run to run


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes (N, Kp) int8 and scales (N, Kp / group) float16 of a weight (N, K).

    ``Kp`` is K rounded up to a whole group; the padding's codes are zero. ``columns`` is K.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    bits: int
    columns: int

    @property
    def group(self) -> int:
        """Input dimensions that share one scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return int(self.codes.shape[0]), self.columns

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed codes and fp16 scales."""
        return int(self.codes.size * self.bits // 8 + self.scales.nbytes)


Weights = Mapping[str, "QuantizedTensor | NDArray[np.float32]"]


def dequantize(tensor: QuantizedTensor) -> NDArray[np.float32]:
    """(N, K) float32."""
    scales = np.repeat(tensor.scales.astype(np.float32), tensor.group, axis=1)
    return (tensor.codes.astype(np.float32) * scales)[:, : tensor.columns]


def pack_nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """(N, K) in [-8, 7] -> (N, K / 2): code + 8, low nibble first. K is even."""
    offset = (codes + 8).astype(np.uint8)
    return (offset[:, 0::2] | (offset[:, 1::2] << 4)).astype(np.uint8, copy=False)


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of ``pack_nibbles``."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    codes[:, 0::2] = (packed & 0xF).astype(np.int8) - 8
    codes[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return codes


def save_weights(path: Path, spec: DecoderSpec, weights: Weights) -> None:
    """Write codes (packed), scales and float tensors to one safetensors file."""
    tensors: dict[str, NDArray[np.generic]] = {}
    layout: dict[str, dict[str, int]] = {}
    for name, value in sorted(weights.items()):
        if isinstance(value, QuantizedTensor):
            tensors[f"{name}.codes"] = pack_nibbles(value.codes) if value.bits == 4 else value.codes
            tensors[f"{name}.scales"] = value.scales
            layout[name] = {"bits": value.bits, "columns": value.columns}
        else:
            tensors[name] = np.ascontiguousarray(value, dtype=np.float32)
    header = json.dumps({"decoder": spec.to_dict(), "layout": layout}, sort_keys=True)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, metadata={_HEADER: header})


def load_weights(path: Path) -> tuple[DecoderSpec, dict[str, QuantizedTensor | NDArray[np.float32]]]:
    """Inverse of ``save_weights``.

    Raises:
        PackageError: The file is cut, not safetensors, or its tensors are not what its header says.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        spec = DecoderSpec.from_dict(header["decoder"])
        quantized = {name: _take_quantized(tensors, name, **entry) for name, entry in header["layout"].items()}
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackageError(f"{path}: not a weight file of this project, or a damaged one ({error})") from error
    return spec, quantized | tensors


def _take_quantized(tensors: dict[str, NDArray[Any]], name: str, bits: int, columns: int) -> QuantizedTensor:
    """Remove codes and scales of one weight from ``tensors`` and join them."""
    stored, scales = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scales")
    expected = np.uint8 if bits == 4 else np.int8
    if bits not in CODE_RANGE or stored.ndim != 2 or stored.dtype != expected or scales.dtype != np.float16:
        raise ValueError(f"{name}: {bits} bits as {stored.dtype} {stored.shape} with scales as {scales.dtype}")
    codes = unpack_nibbles(stored) if bits == 4 else stored
    rows, padded = codes.shape
    groups = scales.shape[1] if scales.ndim == 2 and scales.shape[0] in (1, rows) else 0
    if not groups or padded % groups or not 0 <= padded - columns < padded // groups:
        raise ValueError(f"{name}: {columns} columns in codes {codes.shape} with scales {scales.shape}")
    return QuantizedTensor(codes, scales, bits, columns)
