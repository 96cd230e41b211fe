"""Codes that learn to say what the model said in floats, in rounds, resumable after every round and within it.

Training through rounding goes astray with time: more and more places lie at the border of two codes and cross it at
every step. So a few short rounds are run, each from the middle of the codes that the one before ended in, with fresh
moments and the learning rate high again; and at the end the codes stay and only their scales learn, which have no
rounding in their way. On the reference teacher three rounds of 100 steps and 100 of scales leave 0.36 of the divergence
of rounding to nearest, one round of 200 left 0.43 (benchmarks/README.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edge_runtime.formats.int4 import QuantizedTensor, load_weights, save_weights
from pipeline.artifacts import read_json, write_json
from pipeline.distillation.batches import Sequences
from pipeline.distillation.checkpoints import History, discard_checkpoint
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.head_losses import DEFAULT_CHUNK_TOKENS
from pipeline.distillation.hidden_losses import hidden_term
from pipeline.distillation.objectives import LossSettings, Objective, signal_objective
from pipeline.distillation.signals import OnlineSource
from pipeline.distillation.trainer import Observer, TrainPlan, train
from pipeline.quantization.calibration import load_model
from pipeline.quantization.grid import Grid
from pipeline.quantization.qad import QuantizedStudent, quantized_objective, trained_codes
from pipeline.quantization.source import Checkpoint

_SCALES_RATE = 2.0  # times the codes' learning rate; 0.5 to 5 differ by 1 % on the reference teacher
_SEEDS_APART = 1_000_003  # each round reads its sequences in another order


@dataclass(frozen=True, slots=True)
class Distillation:
    """How codes are trained.

    Attributes:
        training: Of one round; its steps may be 0.
        rounds: Of codes and scales together, 1 or more.
        scale_steps: Of scales alone, at the end; 0 or more, and not 0 when the rounds have no steps.
        hidden_weight: Of every layer's hidden states beside the KL, 0 or more.
        chunk_tokens: Of which logits are in memory at once.
    """

    training: TrainPlan
    rounds: int
    scale_steps: int
    hidden_weight: float = 0.0
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS


def distil_codes(
    source: Checkpoint,
    codes: Mapping[str, QuantizedTensor],
    grids: Mapping[str, Grid],
    sequences: Sequences,
    plan: Distillation,
    work: Path,
    label: str,
    *,
    device: torch.device | str = "cpu",
    observe: Observer | None = None,
) -> tuple[dict[str, QuantizedTensor], History]:
    """Train codes towards the model in floats, which runs beside them.

    Args:
        source: The model in floats; it is read anew in every round.
        codes: Where to start, by name of the matrix.
        grids: Of these matrices.
        sequences: What is learned from.
        plan: How.
        work: A folder of this run alone; what it holds is continued.
        label: For people.
        device: Computes.
        observe: Told how it goes; its steps count through all rounds.

    Returns:
        Codes by name, and what ``train`` says of every round, steps counted through.

    Raises:
        UserError: As ``train``.
    """
    rounds = _rounds(plan)
    finished = max((each.number for each in rounds if _file(work, each.number).is_file()), default=0)
    history: History = read_json(_history_file(work, finished)) if finished else []
    if finished < len(rounds):
        teacher = load_model(source, device)
    for each in rounds[finished:]:
        if each.number > 1:
            codes = _stored(work, each.number - 1)
        student = QuantizedStudent(load_model(source, device), codes, grids, codes_learn=each.codes_learn)
        part = train(
            student, _objective(student, teacher, plan), sequences, each.training, _states(work, each.number),
            f"{label}, {each.name}", observe=observe and _shifted(observe, each.start),
            identity=str(plan.hidden_weight),
        )  # fmt: skip
        history += [{**entry, "step": entry["step"] + each.start} for entry in part]
        _store(work, each.number, source, trained_codes(student), history)
    return _stored(work, len(rounds)), history


@dataclass(frozen=True, slots=True)
class _Round:
    number: int  # from 1
    start: int  # steps before it
    name: str
    training: TrainPlan
    codes_learn: bool


def _rounds(plan: Distillation) -> list[_Round]:
    """Codes and scales, then scales alone; no steps, no round."""
    codes, rate = plan.training, _SCALES_RATE * plan.training.learning_rate
    planned = [(f"round {number} of {plan.rounds}", codes, True) for number in range(1, plan.rounds + 1)]
    planned.append(("scales", replace(codes, steps=plan.scale_steps, learning_rate=rate), False))
    rounds, start = [], 0
    for number, (name, training, codes_learn) in enumerate((each for each in planned if each[1].steps), 1):
        seed = training.seed + _SEEDS_APART * (number - 1)
        rounds.append(_Round(number, start, name, replace(training, seed=seed), codes_learn))
        start += training.steps
    return rounds


def _objective(student: QuantizedStudent, teacher: Any, plan: Distillation) -> Objective:
    hidden = None
    if plan.hidden_weight:
        hidden = hidden_term(student.student, teacher, plan.hidden_weight, student.config.num_hidden_layers)
    loss = LossSettings(LossKind.FORWARD_KL, chunk_tokens=plan.chunk_tokens)
    return quantized_objective(signal_objective(OnlineSource.open(teacher, plan.training.bf16), loss, hidden))


def _shifted(observe: Observer, start: int) -> Observer:
    return lambda step, figures: observe(start + step, figures)


def _store(work: Path, number: int, source: Checkpoint, codes: Mapping[str, QuantizedTensor], history: History) -> None:
    """A round's result, which counts once its codes are there; what it began with is no longer needed."""
    write_json(_history_file(work, number), history)
    partial = _file(work, number).with_suffix(".partial")
    save_weights(partial, source.spec, codes)
    os.replace(partial, _file(work, number))
    discard_checkpoint(_states(work, number))
    if number > 1:
        _file(work, number - 1).unlink(missing_ok=True)


def _stored(work: Path, number: int) -> dict[str, QuantizedTensor]:
    found = load_weights(_file(work, number))[1]
    return {name: value for name in found if isinstance(value := found[name], QuantizedTensor)}


def _file(work: Path, number: int) -> Path:
    return work / f"round-{number}.safetensors"


def _states(work: Path, number: int) -> Path:
    return work / f"round-{number}"


def _history_file(work: Path, number: int) -> Path:
    return work / f"round-{number}.json"
