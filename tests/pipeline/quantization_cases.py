"""Small checkpoints on disk for the streaming quantizer, and the in-memory path that it is compared with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, save_weights
from pipeline.export.checkpoint import float_weights, spec_of
from pipeline.quantization.grid import fitting_group
from pipeline.quantization.rounding import pad_intermediate, quantize_per_tensor, quantize_tensor

CONTEXT_TOKENS = 64
FloatArray = NDArray[np.float32]


def save_checkpoint(model: PreTrainedModel, folder: Path, dtype: str = "bfloat16", shards: str = "60KB") -> Path:
    """The model in shards; its own weights become what the file says, so that both sides start from the same."""
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shards)
    return folder


def in_memory(
    model: PreTrainedModel, group: int, quantize: Callable[[str, FloatArray], QuantizedTensor]
) -> tuple[DecoderSpec, dict[str, QuantizedTensor | FloatArray]]:
    """What the whole model in memory gives."""
    spec, floats = pad_intermediate(spec_of(model, CONTEXT_TOKENS), float_weights(model), group)
    return spec, {name: quantize(name, value) if value.ndim == 2 else value for name, value in floats.items()}


def expected_bytes(model: PreTrainedModel, path: Path, rounding: str, bits: int, group: int, positive: bool) -> bytes:
    """The file that ``save_weights`` makes of the whole model; group 0 is one scale a matrix."""

    def quantize(_name: str, weight: FloatArray) -> QuantizedTensor:
        if not group:
            return quantize_per_tensor(weight)
        fitting = fitting_group(weight.shape[1], group)
        return quantize_tensor(weight, bits=bits, group=fitting, rounding=rounding, positive_scales=positive)

    spec, weights = in_memory(model, group or 32, quantize)
    save_weights(path, spec, weights)
    return path.read_bytes()


@torch.no_grad()
def divergence(model: PreTrainedModel, weights: Mapping[str, Any], tokens: NDArray[np.int32]) -> float:
    """Mean KL at each position of (S, T) between a model, which is left as it is, and itself with its codes."""
    quantized, ids = copy.deepcopy(model), torch.from_numpy(tokens.astype(np.int64))
    codes = {name: value for name, value in weights.items() if isinstance(value, QuantizedTensor)}
    for name, tensor in codes.items():
        quantized.get_parameter(name).copy_(torch.from_numpy(dequantize(tensor)))
    log_p, log_q = (each(ids).logits.log_softmax(-1) for each in (model, quantized))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite one tensor of a checkpoint where it lies; None removes it, index and all."""
    index = folder / "model.safetensors.index.json"
    shards: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    path = folder / shards.get(name, "model.safetensors")
    tensors: dict[str, Any] = load_file(path)
    changed = change(tensors[name])
    tensors = {key: value for key, value in tensors.items() if key != name}
    save_file(tensors if changed is None else tensors | {name: changed}, path, metadata={"format": "pt"})
    if changed is None and shards:
        index.write_text(json.dumps({"weight_map": {key: shard for key, shard in shards.items() if key != name}}))
