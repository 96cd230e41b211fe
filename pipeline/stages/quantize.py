"""quantize: the codes that every container is packed from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_runtime.formats.int4 import QuantizedTensor, load_weights
from pipeline.artifacts import StageRun, write_json
from pipeline.export.assembly import LEGACY_FILE, WEIGHTS_FILE
from pipeline.progress import progress
from pipeline.quantization.allocation import grids_of
from pipeline.quantization.chosen import choose_codes, needs_text
from pipeline.quantization.grid import Grid
from pipeline.quantization.source import Checkpoint, open_checkpoint
from pipeline.quantization.streaming import TensorFigures, quantize_checkpoint, stored_codes, write_weights

_ONE_SCALE = Grid(bits=8, group=0, positive_scales=True)


def run(run: StageRun) -> None:
    """Write weights.safetensors, and legacy.safetensors when the legacy container is made."""
    config, settings = run.config, run.config.quantize
    student = run.layout.student(run.submodel)
    source = open_checkpoint(student, config.export.context_tokens, settings.group, f"student {run.submodel}")
    grids, sensitivity = grids_of(run, source)
    training: dict[str, Any] = {}
    if needs_text(settings):
        codes, training = choose_codes(run, source, grids)
        figures = _write_chosen(run, source, grids, codes)
    else:
        figures = _write(run, source, grids, WEIGHTS_FILE)
    if "tflite_legacy" in config.export.containers:
        _write(run, source, source.grids(_ONE_SCALE), LEGACY_FILE)
    write_json(run.layout.metrics("quantize", run.submodel), _metrics(run, source, figures) | sensitivity | training)
    shutil.rmtree(run.checkpoint, ignore_errors=True)


def _write(run: StageRun, source: Checkpoint, grids: dict[str, Grid], file: str) -> dict[str, TensorFigures]:
    settings = run.config.quantize
    with progress(f"quantize {run.submodel}", len(source.tensors)) as report:
        return quantize_checkpoint(
            source, grids, settings.rounding, run.output / file, run.checkpoint / file,
            workers=settings.workers, report=report,
        )  # fmt: skip


def _write_chosen(
    run: StageRun, source: Checkpoint, grids: dict[str, Grid], codes: Mapping[str, QuantizedTensor]
) -> dict[str, TensorFigures]:
    return write_weights(
        source, grids, stored_codes(codes), run.output / WEIGHTS_FILE, run.checkpoint / WEIGHTS_FILE,
        identity="chosen on text", workers=run.config.quantize.workers,
    )  # fmt: skip


def _metrics(run: StageRun, source: Checkpoint, figures: dict[str, TensorFigures]) -> dict[str, Any]:
    _, weights = load_weights(run.output / WEIGHTS_FILE)
    errors = {name: round(value.relative_error, 8) for name, value in figures.items()}
    return {
        "relative_error_mean": round(float(np.mean(list(errors.values()))), 8),
        "relative_error": errors,
        "scale_range": {name: [value.scale_min, value.scale_max] for name, value in figures.items()},
        "ends_share": {name: round(value.ends_share, 6) for name, value in figures.items()},
        "code_and_scale_bytes": sum(w.weight_bytes for w in weights.values() if isinstance(w, QuantizedTensor)),
        "fp16_weight_bytes": 2 * source.params,
        "params": source.params,
    }
