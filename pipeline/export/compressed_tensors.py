"""compressed-tensors: a folder that transformers and vLLM load, made of the stored codes bit for bit.

``pack-quantized`` holds eight 4-bit codes, or four 8-bit ones, an int32 of the row. Two variants: with embedding and
head packed too, and with both as code * scale for engines that pack linear layers only: in float32, since fp16 lacks
bits for the product and engines that know no packed head read garbage. transformers 5.23 decides two things. Packed
embeddings load only when it unpacks everything at once (``run_compressed: false``); it multiplies in the scales' type
then whatever the model's is, so they are stored as float32 to stay exact, and it reads one grid for all: scales of
longer groups are repeated for the shortest. Linear layers alone are unpacked at the first pass in the model's type:
fp16 scales stay exact, and grids may be mixed.
Layout: https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, HEAD, DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights, dequantize
from edge_runtime.formats.manifest import TOKENIZER_FILE
from edge_runtime.formats.package import CHAT_TEMPLATE_FILE
from pipeline.export.gguf import row_blocks

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
UNPACKED_IN_LINEAR = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
_SHARD_BYTES = 4_000_000_000
_DTYPES = {"I32": 4, "I64": 8, "F16": 2, "F32": 4}


def write_compressed_tensors(
    folder: Path,
    spec: DecoderSpec,
    weights: Weights,
    *,
    config: Path,
    linear_only: bool,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write config.json and the weights; tokenizer files are ``copy_texts``'s.

    Args:
        folder: Exists and is empty.
        spec: Sizes of ``weights``.
        weights: Codes and scales by Hugging Face name, possibly mapped from a file.
        config: The model's config.json.
        linear_only: Embedding and head in float32, not packed.
        shard_bytes: Most bytes of tensors in one file.

    Raises:
        ExportError: The columns of a weight are not whole groups, or the variant cannot hold the grids.
        OSError: The disk is full; what was written is to be removed.
    """
    grids = _grids(weights, linear_only)
    shortest = None if linear_only else min(group for _, group in grids)
    entries = [entry for name in sorted(weights) for entry in _entries(name, weights, shortest)]
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    values["intermediate_size"] = spec.intermediate_size
    values["quantization_config"] = _quantization_config(spec, grids, linear_only)
    _write_json(folder / "config.json", values)
    shards = _shards(entries, shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / WEIGHTS_FILE, shards[0])
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.length_bytes for entry in entries)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def copy_texts(folder: Path, *, student: Path, tokenizer: Path, bos: int | None, eos: Sequence[int]) -> None:
    """What transformers wants beside the weights: generation settings, tokenizer, chat template.

    Args:
        folder: Where to.
        student: Perhaps holds generation_config.json.
        tokenizer: Holds tokenizer.json, perhaps its settings and a chat template.
        bos: Id put before a prompt, or None.
        eos: Ids that end a generation.
    """
    if (source := student / "generation_config.json").is_file():
        shutil.copyfile(source, folder / source.name)
    for name in (TOKENIZER_FILE, CHAT_TEMPLATE_FILE, "tokenizer_config.json"):
        if (source := tokenizer / name).is_file():
            shutil.copyfile(source, folder / name)
    if not (folder / "tokenizer_config.json").is_file():
        from tokenizers import Tokenizer

        read = Tokenizer.from_file(str(tokenizer / TOKENIZER_FILE))
        named = {"bos_token": bos, "eos_token": eos[0] if eos else None}
        texts = {key: read.id_to_token(index) for key, index in named.items() if index is not None}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write_json(folder / "tokenizer_config.json", settings | texts)


def pack_int32(rows: QuantizedTensor) -> NDArray[np.int32]:
    """(n, K) -> (n, K bits / 32): codes plus half of their range, the first in the lowest bits."""
    packed = rows.packed if rows.bits == 4 else rows.packed.view(np.uint8) ^ 0x80
    return np.ascontiguousarray(packed).view("<i4")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file; ``blocks`` gives its rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[NDArray[Any]]]

    @property
    def length_bytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype]


def _grids(weights: Weights, linear_only: bool) -> dict[tuple[int, int], list[str]]:
    """Modules by their bits and group as they are written: all in the shortest group where embeddings are packed."""
    grids: dict[tuple[int, int], list[str]] = {}
    for name in sorted(weights):
        value = weights[name]
        if isinstance(value, QuantizedTensor) and not (linear_only and name in UNPACKED_IN_LINEAR):
            grids.setdefault((value.bits, value.group), []).append(name.removesuffix(".weight"))
    if linear_only:
        return grids
    if len({bits for bits, _ in grids}) > 1:
        found = ", ".join(f"{bits} bits in groups of {group}" for bits, group in sorted(grids))
        raise ExportError(
            f"safetensors: transformers reads one grid beside packed embeddings, there are {found};"
            " choose safetensors_linear in export.containers"
        )
    shortest = min(grids)[0], gcd(*(group for _, group in grids))
    return {shortest: [module for modules in grids.values() for module in modules]}


def _entries(name: str, weights: Weights, shortest: int | None) -> Iterator[_Entry]:
    """The tensors that a weight becomes; each looks its weight up again, so that none is kept.

    Scales are repeated for the group ``shortest``; None: in their own groups, embedding and head unpacked.
    """
    value = weights[name]
    if not isinstance(value, QuantizedTensor):
        yield _Entry(name, "F32", value.shape, lambda: iter([np.asarray(weights[name], dtype="<f4")]))
        return
    rows, columns = value.shape

    def blocks(encode: Callable[[QuantizedTensor], NDArray[Any]]) -> Callable[[], Iterator[NDArray[Any]]]:
        def read() -> Iterator[NDArray[Any]]:
            tensor = weights[name]
            return (encode(tensor.rows(start, stop)) for start, stop in row_blocks((rows, columns)))  # type: ignore[union-attr]

        return read

    if shortest is None and name in UNPACKED_IN_LINEAR:
        yield _Entry(name, "F32", (rows, columns), blocks(lambda part: dequantize(part).astype("<f4")))
        return
    _require_groups(name, value)
    module = name.removesuffix(".weight")
    dtype, code, group = ("F16", "<f2", value.group) if shortest is None else ("F32", "<f4", shortest)
    yield _Entry(f"{module}.weight_packed", "I32", (rows, columns * value.bits // 32), blocks(pack_int32))
    yield _Entry(
        f"{module}.weight_scale", dtype, (rows, columns // group),
        blocks(lambda part: np.repeat(part.scales, part.group // group, axis=1).astype(code)),
    )  # fmt: skip
    yield _Entry(f"{module}.weight_shape", "I64", (2,), lambda: iter([np.array([rows, columns], "<i8")]))


def _require_groups(name: str, value: QuantizedTensor) -> None:
    if value.columns % value.group:
        raise ExportError(
            f"{name}: compressed-tensors wants whole groups, {value.columns} columns are no multiple of {value.group};"
            " leave safetensors out of export.containers"
        )
    if len(value.scales) != value.shape[0]:
        raise ExportError(f"{name}: one scale for the whole weight; compressed-tensors is written with groups")


def _quantization_config(
    spec: DecoderSpec, grids: dict[tuple[int, int], list[str]], linear_only: bool
) -> dict[str, Any]:
    # The most frequent grid goes by the modules' class, the others by name; names are matched first.
    ordered = sorted(grids, key=lambda grid: (-len(grids[grid]), grid))
    classes = ["Linear"] if linear_only else ["Linear", "Embedding"]
    groups = {
        f"group_{number}": _scheme(classes if not number else grids[grid], *grid) for number, grid in enumerate(ordered)
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [HEAD] if linear_only or spec.tied_embeddings else [],
    }
    return config if linear_only else config | {"run_compressed": False}


def _scheme(targets: list[str], bits: int, group: int) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "format": "pack-quantized"}


def _shards(entries: list[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if entry.length_bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.length_bytes
    return shards


def _write_shard(path: Path, entries: list[_Entry]) -> None:
    """The safetensors format by hand: its library wants all of a file's tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.length_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for block in entry.blocks():
                file.write(np.ascontiguousarray(block).data)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
