"""The two torch variants of a submodel: its fp checkpoint, and the codes that ship, dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.formats.decoder import HEAD, DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, dequantize, load_weights
from edge_runtime.formats.lora import Adapter


def load_dequantized(checkpoint: Path, weights: Path) -> tuple[Any, DecoderSpec]:
    """A transformers model in fp32 that computes with the values of the codes.

    Args:
        checkpoint: The fp student that was quantized; its config alone is read.
        weights: ``weights.safetensors`` of the quantize stage.

    Returns:
        The model, for inference, and its spec; the intermediate size is the padded one.

    Raises:
        ExportError: Codes and checkpoint are not of one student.
        PackageError: The weights file is damaged.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    spec, values = load_weights(weights)
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    config.intermediate_size = spec.intermediate_size
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {
        name: torch.from_numpy(dequantize(value) if isinstance(value, QuantizedTensor) else np.array(value))
        for name, value in values.items()
    }
    try:
        found = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ExportError(f"{weights}: not the codes of {checkpoint} ({' '.join(str(error).split())[:200]})") from error
    missing = set(found.missing_keys) - ({f"{HEAD}.weight"} if spec.tied_embeddings else set())
    if missing or found.unexpected_keys:
        named = ", ".join(sorted(missing.union(found.unexpected_keys))[:3])
        raise ExportError(f"{weights}: not the codes of {checkpoint} ({named}); quantize it again")
    model.tie_weights()
    return model.eval(), spec


@contextmanager
def adapted(model: Any, adapter: Adapter | None) -> Iterator[Any]:
    """``model`` with an adapter beside its projections, as the runtimes compute it, for the block's duration.

    An intermediate size that only the package pads is cut to the model's: the padding multiplies zeros.

    Raises:
        ExportError: The adapter has a module that the model lacks.
    """
    import torch

    handles = []
    modules = dict(model.named_modules())
    for name, (lora_a, lora_b) in ({} if adapter is None else adapter.pairs).items():
        module = modules.get(name)
        if module is None:
            raise ExportError(f"{name}: the model has no such module; the adapter is of another submodel")
        down = torch.from_numpy(lora_a[:, : module.in_features].copy())
        up = torch.from_numpy(lora_b[: module.out_features].copy()) * (1.0 if adapter is None else adapter.scale)

        def add(_module: Any, inputs: Any, output: Any, down: Any = down, up: Any = up) -> Any:
            return output + (inputs[0] @ down.T) @ up.T

        handles.append(module.register_forward_hook(add))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
