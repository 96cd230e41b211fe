"""A file of codes, laid out before its first weight is known and written in any order.

Bytes are those of ``formats/int4.save_weights``: safetensors puts wide types first, and names in order within a type.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import DTYPES, HEADER
from pipeline.quantization.grid import Grid

_WIDE_FIRST = ("F32", "F16", "I8", "U8")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one array of the file lies."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def length_bytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """The header of a file, and where its arrays lie: ``x.codes`` and ``x.scales`` of a quantized ``x``."""

    header: bytes
    places: Mapping[str, Place]
    total_bytes: int


def lay_out(spec: DecoderSpec, shapes: Mapping[str, tuple[int, ...]], grids: Mapping[str, Grid]) -> WeightLayout:
    """The layout of all weights, codes for those that have a grid and float32 for the others.

    Args:
        spec: The decoder, as the file's header holds it.
        shapes: (N, K) or (N,) of every weight, by name.
        grids: Of the quantized ones; group 0 is one scale for the whole weight.
    """
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    columns = {}
    for name, shape in shapes.items():
        if name not in grids:
            arrays[name] = "F32", shape
            continue
        grid, (rows, width) = grids[name], shape
        group = grid.group or width
        padded = -(-width // group) * group
        arrays[f"{name}.codes"] = ("U8", (rows, padded // 2)) if grid.bits == 4 else ("I8", (rows, padded))
        arrays[f"{name}.scales"] = "F16", (rows, padded // group) if grid.group else (1, 1)
        columns[name] = {"bits": grid.bits, "columns": width}
    described = json.dumps({"decoder": spec.to_dict(), "layout": columns}, sort_keys=True)
    return _lay_out_arrays(arrays, described)


def allocate(descriptor: int, size_bytes: int) -> None:
    """Give a file its size, with room on the disk where the system can promise it: no work is lost to a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size_bytes)
    os.ftruncate(descriptor, size_bytes)


def write_at(descriptor: int, content: bytes, offset_bytes: int) -> None:
    """Write all of ``content`` at its place."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written


def _lay_out_arrays(arrays: Mapping[str, tuple[str, tuple[int, ...]]], described: str) -> WeightLayout:
    header: dict[str, Any] = {"__metadata__": {HEADER: described}}
    end = 0
    for name, (code, shape) in sorted(arrays.items(), key=lambda item: (_WIDE_FIRST.index(item[1][0]), item[0])):
        start, end = end, end + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = {
        name: Place(DTYPES[entry["dtype"]], tuple(entry["shape"]), base + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return WeightLayout(len(text).to_bytes(8, "little") + text, places, base + end)
