"""Checkpoints read and written in blocks of rows, so that no whole model stands in memory.

Reading goes through safetensors, which checks headers and offsets; every block maps its file anew, so that pages of
blocks already done leave memory. Writing lays the header down first: sizes are known before the first weight is read
(format: https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_runtime.formats.errors import UserError
from pipeline.export.checkpoint import ARCHITECTURES

BLOCK_BYTES = 64 << 20
SHARD_BYTES = 2_000_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_JSON_BYTES_MAX = 64 << 20
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: blocks are its rows in order, in any float type."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]


def read_config(directory: Path, field: str = "teacher.path") -> Any:
    """The transformers config of a causal checkpoint of a supported architecture.

    Raises:
        UserError: No config.json, another architecture, or weights that are stored quantized.
    """
    values = _read_object(directory / "config.json", field)
    names = values.get("architectures") or [f"model_type {values.get('model_type')}"]
    require_supported(str(names[0]), field)
    if values.get("quantization_config"):
        raise UserError(field, "a quantized checkpoint", "float weights", "use the checkpoint it was made from")
    import transformers

    config_class: Any = getattr(transformers, str(names[0])).config_class
    return config_class.from_pretrained(directory, local_files_only=True)


def require_supported(architecture: str, field: str = "teacher") -> None:
    """Refuse what has no place here.

    Raises:
        UserError: Not a causal language model, or not of an architecture that can be pruned.
    """
    if architecture not in ARCHITECTURES:
        kind = "" if architecture.endswith("ForCausalLM") else "causal language models only: "
        raise UserError(field, architecture, kind + ", ".join(ARCHITECTURES))


def tensor_files(directory: Path, field: str = "teacher.path") -> dict[str, Path]:
    """The file of each tensor of a checkpoint, single or sharded.

    Raises:
        UserError: No weights, a shard that the index names is missing, or a file is damaged.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise UserError(field, str(directory), "a folder with *.safetensors", "convert .bin files first")
        return dict.fromkeys(_names(single, field), single)
    shards = _read_object(index, field).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) and Path(v).name == v for v in shards.values()):
        raise UserError(field, str(index), "an index with a weight_map of file names", "download it again")
    missing = sorted({shard for shard in shards.values() if not (directory / shard).is_file()})
    if missing:
        raise UserError(field, f"missing {', '.join(missing)}", "every shard that the index names")
    present = {shard: _names(directory / shard, field) for shard in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in present[shard]:
            raise UserError(field, f"{shard} without {name}", "shards that hold what the index says", "download again")
    return {name: directory / shard for name, shard in shards.items()}


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """Shape of one tensor of a file.

    Raises:
        UserError: It is not a float tensor.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        piece = file.get_slice(name)
        if piece.get_dtype() not in _FLOATS:
            raise UserError(name, piece.get_dtype(), "float weights", "use the checkpoint before its quantization")
        return tuple(piece.get_shape())


def read_rows(
    path: Path, name: str, rows: torch.Tensor | None, columns: torch.Tensor | None, block_bytes: int = BLOCK_BYTES
) -> Iterator[torch.Tensor]:
    """Chosen rows (in the order given) and columns of one tensor, block after block; None chooses all.

    Args:
        path: A safetensors file.
        name: A tensor of at least one dimension.
        rows: Indices (R,).
        columns: Indices (C,); only for matrices.
        block_bytes: Most bytes of the file that one block is taken from (one row at least).

    Raises:
        UserError: A weight is not finite.
    """
    from safetensors import safe_open

    shape = tensor_shape(path, name)
    chosen = np.arange(shape[0]) if rows is None else rows.numpy()
    span = max(1, block_bytes // (4 * max(1, int(np.prod(shape[1:])))))
    for first, last in _spans(chosen, span):
        with safe_open(path, framework="pt") as file:
            low = int(chosen[first])
            block = file.get_slice(name)[low : int(chosen[first:last].max()) + 1]
            if last - first != len(block):
                block = block.index_select(0, torch.from_numpy(chosen[first:last] - low))
            block = block.index_select(1, columns) if columns is not None else block.clone()
        require_finite(name, block)
        yield block


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse weights that would spoil everything made of them.

    Raises:
        UserError: NaN or infinity.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"weights {name}", "NaN or infinity", "finite numbers", "get the checkpoint again")


def write_tensors(
    directory: Path, tensors: Sequence[NewTensor], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards with their index, one block in memory at a time.

    Raises:
        UserError: The disk is full.
    """
    width = torch.empty(0, dtype=dtype).element_size()
    shards: list[list[NewTensor]] = [[]]
    held = 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * width
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    total = len(shards)
    names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    if total == 1:
        names = ["model.safetensors"]
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(directory / name, shard, dtype, width)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError("free disk", str(directory), "room for the student", "free some space") from None
    if total > 1:
        placed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(int(np.prod(tensor.shape)) * width for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, output: Path) -> None:
    """The tokenizer's files and generation settings, as they are."""
    for name in (*_TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


def _read_object(path: Path, field: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise UserError(field, str(path), f"at most {_JSON_BYTES_MAX} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(field, str(path.parent), f"a folder with {path.name}") from None
    except ValueError:
        raise UserError(field, str(path), "JSON", "download it again") from None
    if not isinstance(values, dict):
        raise UserError(field, str(path), "a JSON object", "download it again")
    return values


def _names(path: Path, field: str) -> frozenset[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        message = " ".join(str(error).split())[:120]
        raise UserError(field, str(path), f"a whole safetensors file ({message})", "download it again") from None


def _spans(chosen: np.ndarray[Any, Any], span: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of indices that grow and lie within ``span`` rows of the file."""
    falls = np.flatnonzero(np.diff(chosen) <= 0) + 1
    for start, stop in zip([0, *falls], [*falls, len(chosen)], strict=True):
        first = int(start)
        while first < stop:
            last = first + int(np.searchsorted(chosen[first:stop], chosen[first] + span))
            yield first, last
            first = last


def _write_shard(path: Path, tensors: Sequence[NewTensor], dtype: torch.dtype, width: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + int(np.prod(tensor.shape)) * width
        header[tensor.name] = {"dtype": _CODES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            start = file.tell()
            for block in tensor.blocks():
                data = block.to(dtype).contiguous()
                file.write(data.view(torch.uint8).numpy().data if data.ndim else data.numpy().tobytes())
            written, expected = file.tell() - start, int(np.prod(tensor.shape)) * width
            if written != expected:
                raise ValueError(f"{tensor.name}: {written} bytes written, its shape {tensor.shape} needs {expected}")
