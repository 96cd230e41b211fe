"""The loop that ``stage=distill`` runs, with everything around a step: batches made ahead, gradients cut.

Draws lie decoded in host memory: what reading and decoding shards costs is measured by ``stored_targets.py``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.distillation_trial.models import Setting, build_model
from benchmarks.distillation_trial.steps import Case, draws_of
from pipeline.distillation.batches import Batch, Sequences
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.fast_layers import use_deterministic_kernels
from pipeline.distillation.objectives import LossSettings, signal_objective
from pipeline.distillation.signals import OnlineSource, SparseSignal
from pipeline.distillation.trainer import TrainPlan, train

WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Drawn:
    """Draws in host memory, as the store decodes them, in place of a store."""

    draws: SparseSignal

    def prepare(self, batch: Batch) -> Batch:
        return replace(batch, signal=self.draws)

    def signal(self, batch: Batch) -> SparseSignal:
        found: SparseSignal = batch.signal
        return found


def tokens_per_second(
    case: Case, setting: Setting, teacher: Any, device: torch.device, steps: int, compiled: bool
) -> tuple[float, float]:
    """Rate over ``steps`` after the warm-up, and the last loss."""
    student = build_model(setting.student, setting, device, 1, torch.float32)
    tokens = torch.randint(setting.vocabulary, (4 * case.batch_sequences, setting.sequence_tokens))
    gpu = device.type == "cuda"
    plan = TrainPlan(
        WARM_UP_STEPS + steps, case.batch_sequences, 1e-4, 0.01, 0.05, bf16=gpu, bf16_weights=gpu, seed=0,
        checkpoint_every_steps=10**9, compile=compiled,
    )  # fmt: skip
    times_s: list[float] = []

    def observe(_step: int, _figures: Mapping[str, float]) -> None:
        times_s.append(time.perf_counter())

    stored = teacher is None
    source = Drawn(_signal(case, setting)) if stored else OnlineSource.open(teacher, bf16=gpu)
    loss = LossSettings(LossKind.SAMPLED_KL if stored else LossKind.FORWARD_KL, chunk_tokens=case.chunk_tokens)
    with tempfile.TemporaryDirectory() as folder, _as_a_stage():
        history = train(
            student, signal_objective(source, loss), Sequences(tokens.numpy().astype("int32")), plan, Path(folder),
            case.name, prepare=getattr(source, "prepare", None), observe=observe,
        )  # fmt: skip
    rate = steps * case.tokens_per_step(setting) / (times_s[-1] - times_s[WARM_UP_STEPS - 1])
    return rate, history[-1]["loss"]


def _signal(case: Case, setting: Setting) -> SparseSignal:
    ids, weights = draws_of(case, setting, 0)
    shape = case.batch_sequences, setting.sequence_tokens
    return SparseSignal(ids.unflatten(0, shape), weights.unflatten(0, shape))


@contextmanager
def _as_a_stage() -> Iterator[None]:
    """With what every stage sets; the other cases go on without."""
    before = torch.are_deterministic_algorithms_enabled()
    use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
