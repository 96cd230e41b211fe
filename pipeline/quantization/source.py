"""A checkpoint as quantization reads it: sizes, names and blocks of rows, never a whole model.

Everything that codes cannot be made from is refused when it is opened; a weight that is not finite, when it is read.
Rows are read from their place in the file and not mapped: pages of a mapped file would count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, HEAD, DecoderSpec
from edge_runtime.formats.errors import UserError
from pipeline.distillation.checkpoint_files import read_config, tensor_files
from pipeline.export.checkpoint import spec_of
from pipeline.quantization.grid import Grid, fitting_group, padded_columns

FloatArray = NDArray[np.float32]
BLOCK_WEIGHTS = 1 << 20
_BLOCK_ROWS_STEP = 16  # as many rows as the kernels work on at once
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_EMBEDDING, _HEAD = f"{EMBEDDING}.weight", f"{HEAD}.weight"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where a tensor lies and what it is.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``, as safetensors names them.
        stored: Shape in the file.
        shape: Shape with the zeros that fill the FFN to whole groups.
    """

    name: str
    path: Path
    offset_bytes: int
    dtype: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        spec: Sizes with the padded FFN; the head counts as tied when config.json or equal weights say so.
        tensors: Every tensor that codes or floats are made of, by Hugging Face name; no head when it is tied.
    """

    path: Path
    spec: DecoderSpec
    tensors: Mapping[str, SourceTensor]

    @property
    def matrices(self) -> list[str]:
        """Names of what is quantized, the largest first, so that several workers end together."""
        names = [name for name, tensor in self.tensors.items() if len(tensor.shape) == 2]
        return sorted(names, key=lambda name: (-math.prod(self.tensors[name].shape), name))

    @property
    def params(self) -> int:
        """Weights in the files, a tied head once."""
        return sum(math.prod(tensor.stored) for tensor in self.tensors.values())

    def grids(self, grid: Grid) -> dict[str, Grid]:
        """One grid for all matrices, in the groups that fit each one's columns."""
        return {
            name: replace(grid, group=fitting_group(self.tensors[name].shape[1], grid.group)) for name in self.matrices
        }


def open_checkpoint(path: Path, context_tokens: int, group: int, field: str = "checkpoint") -> Checkpoint:
    """Read what a Hugging Face checkpoint holds, single or sharded, without its weights.

    Args:
        path: Folder with config.json and safetensors.
        context_tokens: Longest sequence that the exported files shall hold, in tokens.
        group: Most input dimensions that share a scale; an FFN that no group up to it divides is padded to whole ones.
        field: What refusals call the folder.

    Raises:
        UserError: A shard is missing or cut, or a tensor is missing, unknown, or of another shape or type.
        ExportError: An architecture or an option that no container has.
    """
    import torch
    import transformers

    config, files = read_config(path, field), tensor_files(path, field)
    with torch.device("meta"):
        model: Any = getattr(transformers, config.architectures[0])(config)
    spec = spec_of(model, context_tokens)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = _read_places(files, field)
    _require_tensors(found, expected, config.tie_word_embeddings, field)
    spec = replace(spec, tied_embeddings=_is_tied(found, config.tie_word_embeddings, field))
    missing = padded_columns(spec.intermediate_size, group) - spec.intermediate_size
    tensors = {
        name: replace(found[name], shape=_padded(name, found[name].stored, missing))
        for name in expected
        if name in found and not (spec.tied_embeddings and name == _HEAD)
    }
    return Checkpoint(path, replace(spec, intermediate_size=spec.intermediate_size + missing), tensors)


def row_blocks(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    """Runs [start, stop) of rows that are worked on at once."""
    rows = max(1, BLOCK_WEIGHTS // max(1, math.prod(tensor.shape[1:])) // _BLOCK_ROWS_STEP) * _BLOCK_ROWS_STEP
    for start in range(0, tensor.shape[0], rows):
        yield start, min(start + rows, tensor.shape[0])


def read_rows(tensor: SourceTensor, start: int = 0, stop: int | None = None) -> FloatArray:
    """Rows [start, stop) in float32, zeros where the tensor is padded.

    Raises:
        UserError: A weight is not finite, or the file has become shorter.
    """
    stop = tensor.shape[0] if stop is None else stop
    inner, dtype = tensor.stored[1:], _DTYPES[tensor.dtype]
    row_bytes = math.prod(inner) * dtype.itemsize
    here = max(0, min(stop, tensor.stored[0]) - start)
    content = _read_exactly(tensor, tensor.offset_bytes + start * row_bytes, here * row_bytes)
    raw = np.frombuffer(content, dtype).reshape(here, *inner)
    values: FloatArray = (
        (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw.astype(np.float32)
    )
    if not np.isfinite(values).all():
        raise UserError(f"weights {tensor.name}", "NaN or infinity", "finite numbers", "get the checkpoint again")
    if values.shape == (stop - start, *tensor.shape[1:]):
        return values
    padded = np.zeros((stop - start, *tensor.shape[1:]), np.float32)
    padded[tuple(slice(size) for size in values.shape)] = values
    return padded


def _read_exactly(tensor: SourceTensor, offset_bytes: int, length_bytes: int) -> bytearray:
    content = bytearray(length_bytes)
    view, done = memoryview(content), 0
    with tensor.path.open("rb", buffering=0) as file:
        while done < length_bytes:
            count = os.preadv(file.fileno(), [view[done:]], offset_bytes + done)
            if not count:
                raise UserError(tensor.name, f"{tensor.path.name} ends in it", "a whole file", "download it again")
            done += count
    return content


def _read_places(files: Mapping[str, Path], field: str) -> dict[str, SourceTensor]:
    """Where each tensor lies; safetensors itself has checked the headers and that offsets fit the files."""
    found = {}
    headers = {path: _read_header(path) for path in sorted(set(files.values()))}
    for name, path in files.items():
        base_bytes, header = headers[path]
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise UserError(
                field, f"{name} as {entry['dtype']}", ", ".join(_DTYPES), "use the float checkpoint it was made from"
            )
        shape = tuple(entry["shape"])
        place = base_bytes + entry["data_offsets"][0]
        found[name] = SourceTensor(name, path, place, entry["dtype"], shape, shape)
    return found


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def _require_tensors(
    found: Mapping[str, SourceTensor], expected: Mapping[str, tuple[int, ...]], tied: bool, field: str
) -> None:
    for name in found:
        # Checkpoints of earlier years carry the rotary frequencies, which follow from config.json.
        if name not in expected and not name.endswith(".rotary_emb.inv_freq"):
            raise UserError(field, f"tensor {name}", "the tensors of its architecture", "remove it, or fix config.json")
    for name, shape in expected.items():
        if name not in found:
            if tied and name == _HEAD:
                continue
            raise UserError(field, f"no tensor {name}", "every weight of its config.json", "download it again")
        if found[name].stored != shape:
            raise UserError(field, f"{name} of shape {found[name].stored}", f"{shape}, as config.json says")


def _is_tied(found: Mapping[str, SourceTensor], tied: bool, field: str) -> bool:
    """Whether one matrix is embedding and head: by config.json, or because the file holds it twice."""
    if _HEAD not in found:
        return True
    head, embedding = found[_HEAD], found[_EMBEDDING]
    same = all(
        np.array_equal(read_rows(head, start, stop), read_rows(embedding, start, stop))
        for start, stop in row_blocks(embedding)
    )
    if tied and not same:
        raise UserError(
            field, f"{_HEAD} that differs from {_EMBEDDING}", "one matrix, as tie_word_embeddings=true says",
            "set tie_word_embeddings to false in config.json if both are meant",
        )  # fmt: skip
    return same


def _padded(name: str, shape: tuple[int, ...], missing: int) -> tuple[int, ...]:
    """A shape with the FFN's inner dimension filled up. Exact: silu(0) * 0 = 0, and zeros read it."""
    if ".mlp." not in name:
        return shape
    if name.endswith("down_proj.weight"):
        return shape[0], shape[1] + missing
    return (shape[0] + missing, *shape[1:]) if ".gate_proj." in name or ".up_proj." in name else shape
