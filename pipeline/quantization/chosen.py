"""Codes chosen on text, as the settings say: by calibration, by distillation from the fp student, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.artifacts import StageRun
from pipeline.quantization.grid import Grid
from pipeline.quantization.rounding import quantize_tensor
from pipeline.quantization.source import Checkpoint, read_rows

if TYPE_CHECKING:
    from pipeline.distillation.batches import Sequences
    from pipeline.settings import QuantizeConfig

CALIBRATED = ("weighted_mse", "gptq")
_WARMUP_RATIO = 0.05


def needs_text(settings: QuantizeConfig) -> bool:
    """Whether codes depend on more than the weights."""
    return settings.rounding in CALIBRATED or _distils(settings)


def choose_codes(
    run: StageRun, source: Checkpoint, grids: Mapping[str, Grid]
) -> tuple[Mapping[str, QuantizedTensor], dict[str, Any]]:
    """Codes of every matrix, and figures: ``qad_history`` where there was any training.

    Text is that of the student's training sequences, never held out. What an earlier run finished is continued.

    Raises:
        UserError: A weight is not finite, sequences are missing, or training diverges.
        ExportError: A weight or its inputs cannot be quantized.
    """
    from pipeline.distillation.student_text import read_sequences

    settings = run.config.quantize
    sequences = read_sequences(run.layout.sequences(run.submodel))
    if settings.rounding in CALIBRATED:
        codes = _calibrated(run, source, grids, sequences)
    else:
        codes = {name: _rounded(source, name, grid, settings.rounding) for name, grid in grids.items()}
    return _distilled(run, source, codes, grids, sequences) if _distils(settings) else (codes, {})


def _distils(settings: QuantizeConfig) -> bool:
    return settings.qad_steps + settings.qad_scale_steps > 0


def _calibrated(
    run: StageRun, source: Checkpoint, grids: Mapping[str, Grid], sequences: Sequences
) -> Mapping[str, QuantizedTensor]:
    from pipeline.distillation.from_config import training_device
    from pipeline.quantization.calibrated import Calibration, quantize_calibrated

    settings = run.config.quantize
    order = np.random.default_rng([run.config.seed, 0]).permutation(len(sequences))
    rows = np.sort(order[: settings.calibration_sequences])
    plan = Calibration(settings.rounding, grids)  # type: ignore[arg-type]  # one of CALIBRATED
    label = f"quantize {run.submodel}, {settings.rounding}"
    found = quantize_calibrated(
        source, sequences.tokens[rows], plan, run.checkpoint / "calibrated", label, device=training_device()
    )
    return {name: found[name] for name in grids}


def _rounded(source: Checkpoint, name: str, grid: Grid, rounding: str) -> QuantizedTensor:
    return quantize_tensor(
        read_rows(source.tensors[name]), bits=grid.bits, group=grid.group, rounding=rounding,
        positive_scales=grid.positive_scales,
    )  # fmt: skip


def _distilled(
    run: StageRun,
    source: Checkpoint,
    codes: Mapping[str, QuantizedTensor],
    grids: Mapping[str, Grid],
    sequences: Sequences,
) -> tuple[Mapping[str, QuantizedTensor], dict[str, Any]]:
    """Train codes towards the fp student, which runs beside them."""
    from pipeline.distillation.from_config import train_plan, training_device
    from pipeline.quantization.distilled import Distillation, distil_codes

    config, settings = run.config, run.config.quantize
    training = train_plan(config, settings.qad_steps, settings.qad_batch_sequences, settings.qad_learning_rate)
    training = replace(training, weight_decay=0.0, warmup_ratio=_WARMUP_RATIO, bf16_weights=False, recompute=False)
    plan = Distillation(
        training, settings.qad_rounds, settings.qad_scale_steps, settings.qad_hidden_weight, config.distill.chunk_tokens
    )
    label = f"quantize {run.submodel}, QAD"
    codes, history = distil_codes(
        source, codes, grids, sequences, plan, run.checkpoint / "qad", label,
        device=training_device(), observe=run.watch(label),
    )  # fmt: skip
    return codes, {"qad_history": history}
