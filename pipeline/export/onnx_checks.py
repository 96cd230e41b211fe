"""What ONNX Runtime's operators cannot hold is refused here, before a byte is written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING, HEAD, PROJECTIONS, DecoderSpec
from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.export.lora_slots import LoraSlots

ACCURACY_LEVELS = (0, 4)
HEAD_DIM_STEP = 16  # rotary embedding inside GroupQueryAttention on CPU
SMALLEST_GROUP = 16


def refuse_options(spec: DecoderSpec, lora: LoraSlots | None, accuracy_level: int) -> None:
    """Raises ExportError when the spec, the slots or the accuracy level cannot be exported."""
    if accuracy_level not in ACCURACY_LEVELS:
        raise ExportError(f"accuracy_level {accuracy_level}: allowed are 0 (float32) and 4 (int8 activations)")
    if spec.head_dim % HEAD_DIM_STEP:
        raise ExportError(f"head_dim {spec.head_dim}: ONNX Runtime's attention takes multiples of {HEAD_DIM_STEP}")
    if spec.num_heads % spec.num_kv_heads:
        raise ExportError(f"{spec.num_heads} heads do not divide into {spec.num_kv_heads} key/value heads")
    if lora is None:
        return
    unknown = sorted(set(lora.targets) - set(PROJECTIONS))
    if unknown or not lora.targets:
        raise ExportError(f"lora targets {unknown or 'none'}: allowed are {', '.join(PROJECTIONS)}")
    if lora.rank < 1:
        raise ExportError(f"lora rank {lora.rank}: must be at least 1")


def refuse_tensor(spec: DecoderSpec, name: str, value: QuantizedTensor | NDArray[np.float32]) -> None:
    """Raises ExportError when a tensor's shape or grouping does not fit its place in the decoder."""
    expected = _shape(spec, name)
    # A padded intermediate dimension is exact: its extra rows and columns are zero.
    padded = spec.intermediate_size if ".mlp." in name else None
    fits = len(value.shape) == len(expected) and all(
        given == wanted or (wanted == padded and given > wanted)
        for given, wanted in zip(value.shape, expected, strict=True)
    )
    if not fits:
        raise ExportError(f"{name}: shape {tuple(value.shape)}, the decoder needs {expected}")
    if isinstance(value, QuantizedTensor):
        _refuse_grouping(name, value)


def _shape(spec: DecoderSpec, name: str) -> tuple[int, ...]:
    module, _, kind = name.rpartition(".")
    if module in (EMBEDDING, HEAD):
        return spec.vocab_size, spec.hidden_size
    last = module.rpartition(".")[2]
    if last in PROJECTIONS:
        shape = spec.projection_shape(last)
        return shape if kind == "weight" else shape[:1]
    return (spec.head_dim,) if last in ("q_norm", "k_norm") else (spec.hidden_size,)


def _refuse_grouping(name: str, tensor: QuantizedTensor) -> None:
    rows, padded = tensor.shape[0], tensor.padded_columns
    group = tensor.group
    if tensor.bits not in (4, 8):
        raise ExportError(f"{name}: {tensor.bits} bits, ONNX Runtime takes 4 or 8 here")
    if group < SMALLEST_GROUP or group & (group - 1):
        raise ExportError(f"{name}: group {group}, ONNX Runtime takes powers of two from {SMALLEST_GROUP}")
    if tensor.scales.shape != (rows, padded // group) or padded != -(-tensor.columns // group) * group:
        raise ExportError(
            f"{name}: codes {(rows, padded)} and scales {tensor.scales.shape} are not {tensor.columns} columns "
            f"in groups of {group}"
        )
