"""Codes and scales: the one set from which every container is packed.

A weight (N, K) is stored as integer codes in groups of ``group`` along K with one fp16 scale a
group; ``weight = code * scale``. Four-bit codes lie in [-8, 7]: the grid of GGUF Q4_0, of ONNX
MatMulNBits without zero points and of compressed-tensors. Eight-bit codes lie in [-127, 127].
Four-bit codes are offset by 8 and packed two a byte, low nibble first, on disk and in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import PackageError

CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
HEADER = "sevenfold"  # one key holds all: safetensors writes several in an order that changes from run to run
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes and fp16 scales of a weight (N, K).

    ``Kp`` is K rounded up to a whole group; the padding's codes are zero.

    Attributes:
        packed: (N, Kp / 2) uint8, two codes a byte, for 4 bits; (N, Kp) int8 for 8 bits. Possibly mapped from a file.
        scales: (N, Kp / group), or (1, 1): one for the whole weight.
        bits: 4 or 8.
        columns: K.
    """

    packed: NDArray[Any]
    scales: NDArray[np.float16]
    bits: int
    columns: int

    @classmethod
    def of_codes(cls, codes: NDArray[np.int8], scales: NDArray[np.float16], bits: int, columns: int) -> QuantizedTensor:
        """From codes (N, Kp) int8."""
        return cls(pack_nibbles(codes) if bits == 4 else codes, scales, bits, columns)

    @property
    def codes(self) -> NDArray[np.int8]:
        """(N, Kp) int8; with 4 bits unpacked anew at every call."""
        return unpack_nibbles(self.packed) if self.bits == 4 else self.packed

    @property
    def padded_columns(self) -> int:
        """Kp."""
        return int(self.packed.shape[1]) * (2 if self.bits == 4 else 1)

    @property
    def group(self) -> int:
        """Input dimensions that share one scale."""
        return self.padded_columns // int(self.scales.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return int(self.packed.shape[0]), self.columns

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed codes and fp16 scales."""
        return int(self.packed.nbytes + self.scales.nbytes)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """A view of some rows, so that a large weight can be worked on in blocks."""
        scales = self.scales if len(self.scales) == 1 else self.scales[start:stop]
        return QuantizedTensor(self.packed[start:stop], scales, self.bits, self.columns)


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
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = value.packed, value.scales
            layout[name] = {"bits": value.bits, "columns": value.columns}
        else:
            tensors[name] = np.ascontiguousarray(value, dtype=np.float32)
    header = json.dumps({"decoder": spec.to_dict(), "layout": layout}, sort_keys=True)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, metadata={HEADER: header})


def load_weights(path: Path) -> tuple[DecoderSpec, Weights]:
    """Inverse of ``save_weights``; a weight is mapped from the file each time that it is asked for.

    Nothing is kept between two lookups, so that going through a 7B takes the memory of its largest weight.

    Raises:
        PackageError: The file is cut, not safetensors, or its tensors are not what its header says.
    """
    try:
        places, metadata = _read_header(path)
        header = json.loads(metadata[HEADER])
        spec, layout = DecoderSpec.from_dict(header["decoder"]), dict(header["layout"].items())
        weights = _MappedWeights(path, places, layout)
        for name in layout:
            _require_fit(name, weights)
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackageError(f"{path}: not a weight file of this project, or a damaged one ({error})") from error
    return spec, weights


@dataclass(frozen=True, slots=True)
class _Place:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class _MappedWeights(Mapping[str, "QuantizedTensor | NDArray[np.float32]"]):
    path: Path
    places: dict[str, _Place]
    layout: dict[str, dict[str, int]]

    def __getitem__(self, name: str) -> QuantizedTensor | NDArray[np.float32]:
        if name not in self.layout:
            return self._map(name)
        entry = self.layout[name]
        return QuantizedTensor(self._map(f"{name}.codes"), self._map(f"{name}.scales"), entry["bits"], entry["columns"])

    def __iter__(self) -> Iterator[str]:
        yield from self.layout
        parts = {f"{name}.{part}" for name in self.layout for part in ("codes", "scales")}
        yield from (name for name in self.places if name not in parts)

    def __len__(self) -> int:
        return len(self.places) - len(self.layout)

    def _map(self, name: str) -> NDArray[Any]:
        place = self.places[name]
        if not prod(place.shape):
            return np.empty(place.shape, place.dtype)
        return np.asarray(np.memmap(self.path, place.dtype, "r", place.offset_bytes, place.shape))


def _read_header(path: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    """Where each tensor lies, and the metadata; safetensors checks that offsets fit the file."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = {
        name: _Place(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return places, metadata


def _require_fit(name: str, weights: _MappedWeights) -> None:
    """Raise ValueError unless codes, scales and layout of one weight fit each other."""
    bits, columns = _entry(**weights.layout[name])
    stored, scales = weights.places[f"{name}.codes"], weights.places[f"{name}.scales"]
    expected = np.uint8 if bits == 4 else np.int8
    if bits not in CODE_RANGE or len(stored.shape) != 2 or stored.dtype != expected or scales.dtype != np.float16:
        raise ValueError(f"{name}: {bits} bits as {stored.dtype} {stored.shape} with scales as {scales.dtype}")
    rows, padded = stored.shape[0], stored.shape[1] * (2 if bits == 4 else 1)
    groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] in (1, rows) else 0
    if not groups or padded % groups or not 0 <= padded - columns < padded // groups:
        raise ValueError(f"{name}: {columns} columns in codes {(rows, padded)} with scales {scales.shape}")


def _entry(bits: int, columns: int) -> tuple[int, int]:
    return bits, columns
