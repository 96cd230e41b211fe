"""GGUF: one file that llama.cpp and Ollama run as it is, made of the stored codes bit for bit.

Four-bit codes become Q4_0, eight-bit ones Q8_0, both with one fp16 scale for 32 columns (a longer group's scale is
repeated); norms and biases stay float32. Rows are packed in blocks, so that a 7B takes little memory. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks: ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, Weights
from pipeline.export.gguf_metadata import add_metadata, architecture_of, rope_factors
from pipeline.export.gguf_vocabulary import Vocabulary

MODEL_FILE = "model.gguf"
BLOCK_COLUMNS = 32  # of Q4_0 and Q8_0
_BLOCK_WEIGHTS = 1 << 20  # that are packed, or compared, at once: more than a cache holds is slower
ROPE_FACTORS = "rope_freqs.weight"
_ALIGNMENT_BYTES = 32
_OUTER_NAMES = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    path: Path,
    spec: DecoderSpec,
    weights: Weights,
    *,
    config: Any,
    vocabulary: Vocabulary | None,
    name: str,
    licence: str = "",
) -> None:
    """Write a model that llama.cpp loads.

    Args:
        path: The file, overwritten.
        spec: Sizes of ``weights``.
        weights: Codes and scales by Hugging Face name, possibly mapped from a file.
        config: The model's transformers config: its type, rope and longest context.
        vocabulary: None: a file without one, which runs on token ids only.
        name: What the model calls itself.
        licence: An SPDX name, or nothing.

    Raises:
        ExportError: llama.cpp's graph of this architecture, or its blocks, cannot hold the model.
        OSError: The disk is full; what was written is to be removed.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    architecture = architecture_of(config, spec)
    tensors = [place_of(weight, weights[weight], spec, architecture) for weight in _ordered(weights)]
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, spec, config, vocabulary, name, licence, eight_bit=any(t.kind == "Q8_0" for t in tensors))
    factors = rope_factors(config, spec)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.uint8)
        raw = None if tensor.kind == "F32" else GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.stored_shape, dtype, tensor.length_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        if factors is not None:
            _write_aligned(file, [factors])
        for tensor in tensors:
            _write_aligned(file, _encoded_blocks(tensor, weights[tensor.weight]))
        _align(file)


@dataclass(frozen=True, slots=True)
class Place:
    """A weight in the file.

    Attributes:
        name: llama.cpp's.
        weight: Hugging Face's.
        kind: Q4_0, Q8_0 or F32.
        shape: Of the weight, (N, K) or (N,).
        order: Which row of the weight each row of the file is; None: the same.
    """

    name: str
    weight: str
    kind: str
    shape: tuple[int, ...]
    order: NDArray[np.intp] | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the file's array: of bytes in blocks, of numbers in F32."""
        bytes_a_block = {"Q4_0": 18, "Q8_0": 34}.get(self.kind)
        return self.shape if bytes_a_block is None else (self.shape[0], self.shape[1] // BLOCK_COLUMNS * bytes_a_block)

    @property
    def length_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.stored_shape)) * (4 if self.kind == "F32" else 1)

    def source_rows(self, start: int, stop: int) -> slice | NDArray[np.intp]:
        """Rows of the weight that the file's rows from ``start`` to ``stop`` are."""
        return slice(start, stop) if self.order is None else self.order[start:stop]


def place_of(weight: str, value: QuantizedTensor | NDArray[np.float32], spec: DecoderSpec, architecture: str) -> Place:
    """Where a weight goes in the file.

    Raises:
        ExportError: Its columns are not whole blocks, or the architecture has no such tensor.
    """
    module, _, kind = weight.rpartition(".")
    layer = module.split(".")
    if module in _OUTER_NAMES:
        name = f"{_OUTER_NAMES[module]}.{kind}"
    else:
        name = f"blk.{layer[2]}.{_LAYER_NAMES['.'.join(layer[3:])]}.{kind}"
    if architecture != "llama" and kind == "bias" and layer[-1] not in ("q_proj", "k_proj", "v_proj"):
        raise ExportError(f"{weight}: llama.cpp's {architecture} has no such bias; leave gguf out of export.containers")
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(layer[-1])
    order = _interleaved(heads, spec.head_dim) if architecture == "llama" and heads is not None else None
    if not isinstance(value, QuantizedTensor):
        return Place(name, weight, "F32", value.shape, order)
    _require_blocks(weight, value)
    return Place(name, weight, "Q4_0" if value.bits == 4 else "Q8_0", value.shape, order)


def encode_blocks(rows: QuantizedTensor) -> NDArray[np.uint8]:
    """(n, K) -> (n, bytes of its Q4_0 or Q8_0 blocks): a scale, then 32 codes."""
    count, columns = rows.shape
    blocks = columns // BLOCK_COLUMNS
    scales = np.broadcast_to(rows.scales, (count, rows.scales.shape[1]))
    scales = np.repeat(scales, rows.group // BLOCK_COLUMNS, axis=1)[:, :blocks]
    codes = _q4_0_codes(rows.packed) if rows.bits == 4 else rows.packed.view(np.uint8)
    codes = codes.reshape(count, -1, BLOCK_COLUMNS * rows.bits // 8)[:, :blocks]
    encoded = np.empty((count, blocks, 2 + codes.shape[2]), np.uint8)
    encoded[:, :, :2] = np.ascontiguousarray(scales).view(np.uint8).reshape(count, blocks, 2)
    encoded[:, :, 2:] = codes
    return encoded.reshape(count, -1)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows of an (N, K) or (N,) array that are worked on at once."""
    step = max(1, _BLOCK_WEIGHTS // (shape[1] if len(shape) > 1 else 1))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _ordered(weights: Weights) -> list[str]:
    """Names with layer 2 before layer 10, whichever order the mapping has."""
    return sorted(weights, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])


def _interleaved(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Rows so that rotary pairs lie side by side, as llama.cpp's graph of a Llama wants them, not in halves."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def _require_blocks(weight: str, value: QuantizedTensor) -> None:
    if value.columns % BLOCK_COLUMNS:
        raise ExportError(
            f"{weight}: GGUF packs rows in blocks of {BLOCK_COLUMNS}, {value.columns} columns are no multiple of it;"
            " leave gguf out of export.containers"
        )
    if value.group % BLOCK_COLUMNS:
        raise ExportError(f"{weight}: GGUF holds a scale for {BLOCK_COLUMNS} columns, the group is {value.group}")


def _encoded_blocks(place: Place, value: QuantizedTensor | NDArray[np.float32]) -> Iterator[NDArray[Any]]:
    for start, stop in row_blocks(place.shape):
        rows = place.source_rows(start, stop)
        if isinstance(value, QuantizedTensor):
            scales = value.scales if len(value.scales) == 1 else value.scales[rows]
            yield encode_blocks(QuantizedTensor(value.packed[rows], scales, value.bits, value.columns))
        else:
            yield np.ascontiguousarray(value[rows], dtype=np.float32)


def _q4_0_codes(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nibbles of neighbours become nibbles of columns 16 apart: byte j holds column j low, column j + 16 high."""
    halves = packed.reshape(len(packed), -1, 2, 8)
    low, high = halves[:, :, 0], halves[:, :, 1]
    codes = np.empty((*low.shape, 2), np.uint8)
    codes[..., 0] = (low & 0x0F) | (high << 4)
    codes[..., 1] = (low >> 4) | (high & 0xF0)
    return codes


def _write_aligned(file: BinaryIO, blocks: Sequence[NDArray[Any]] | Iterator[NDArray[Any]]) -> None:
    _align(file)
    for block in blocks:
        file.write(block.data)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT_BYTES))
