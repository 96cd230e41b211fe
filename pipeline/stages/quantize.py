"""quantize: the codes that every container is packed from."""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_runtime.formats.errors import ExportError
from edge_runtime.formats.int4 import QuantizedTensor, save_weights
from pipeline.artifacts import StageRun, write_json
from pipeline.export.assembly import LEGACY_FILE, WEIGHTS_FILE
from pipeline.progress import progress
from pipeline.quantization.allocation import grids_of
from pipeline.quantization.rounding import pad_intermediate, quantize_per_tensor, quantize_tensor, relative_error


def run(run: StageRun) -> None:
    """Write weights.safetensors, and legacy.safetensors when the legacy container is made."""
    from pipeline.export.checkpoint import float_weights, load_student, spec_of

    config, settings = run.config, run.config.quantize
    model = load_student(run.layout.student(run.submodel))
    spec, floats = pad_intermediate(spec_of(model, config.export.context_tokens), float_weights(model), settings.group)
    grids, sensitivity = grids_of(run, spec)
    codes: dict[str, Any] = {}
    legacy: dict[str, Any] = {}
    errors: dict[str, float] = {}
    with progress(f"quantize {run.submodel}", len(floats)) as report:
        for done, (name, weight) in enumerate(floats.items(), 1):
            if weight.ndim != 2:
                codes[name] = legacy[name] = weight
                continue
            try:
                codes[name] = quantize_tensor(
                    weight,
                    bits=grids[name].bits,
                    group=grids[name].group,
                    rounding=settings.rounding,
                    positive_scales=grids[name].positive_scales,
                )
                legacy[name] = quantize_per_tensor(weight)
            except ValueError as error:
                raise ExportError(f"{name}: {error}; the student cannot be quantized, distil it again") from error
            errors[name] = round(relative_error(weight, codes[name]), 8)
            report(done, name)
    save_weights(run.output / WEIGHTS_FILE, spec, codes)
    if "tflite_legacy" in config.export.containers:
        save_weights(run.output / LEGACY_FILE, spec, legacy)
    packed = sum(value.weight_bytes for value in codes.values() if isinstance(value, QuantizedTensor))
    unique = sum(parameter.numel() for parameter in model.parameters())
    metrics = {
        "relative_error_mean": round(float(np.mean(list(errors.values()))), 8),
        "relative_error": errors,
        "code_and_scale_bytes": packed,
        "fp16_weight_bytes": 2 * unique,
        "params": unique,
    } | sensitivity
    write_json(run.layout.metrics("quantize", run.submodel), metrics)
