"""The one training loop: teacher, students and baselines differ in the loss they inject.

A run killed anywhere and started again ends with the same weights: batches are a function of the
step, and a checkpoint holds weights and both AdamW moments exactly.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.progress import progress

if TYPE_CHECKING:
    from pipeline.settings import Config

Loss = Callable[[torch.Tensor, NDArray[np.int64], torch.Tensor], torch.Tensor]
"""(logits (B, T, V), sequence numbers (B,), tokens (B, T)) -> scalar."""

_BETAS, _EPS, _GRADIENT_NORM_MAX = (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """How long and how fast; everything that the result depends on besides data and loss."""

    steps: int
    batch_sequences: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    bf16: bool
    seed: int
    checkpoint_every_steps: int


def train(
    model: torch.nn.Module, sequences: NDArray[np.int32], loss: Loss, plan: TrainPlan, checkpoint: Path, label: str
) -> list[dict[str, float]]:
    """Train ``model`` in place on sequences (S, T) with AdamW and a cosine schedule.

    Returns:
        The history: step, loss and learning rate, about a hundred entries.

    Raises:
        FloatingPointError: The loss or its gradient is not finite.
    """
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, plan.weight_decay), plan.learning_rate, _BETAS, _EPS, fused=True
    )
    step, history = _load_checkpoint(checkpoint, model, optimizer)
    model.train()
    with progress(label, plan.steps) as report:
        while step < plan.steps:
            rows = batch_rows(step, len(sequences), plan.batch_sequences, plan.seed)
            tokens = torch.from_numpy(sequences[rows].astype(np.int64))
            rate = learning_rate(step, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
                logits = model(input_ids=tokens, use_cache=False).logits
            value = loss(logits, rows, tokens)
            value.backward()
            loss_value = float(value.detach())
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM_MAX))
            if not (math.isfinite(loss_value) and math.isfinite(norm)):
                raise FloatingPointError(f"{label}: loss {loss_value}, gradient norm {norm} at step {step}")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % max(1, plan.steps // 100) == 0 or step == plan.steps:
                history.append({"step": step, "loss": round(loss_value, 5), "learning_rate": rate})
            report(step, f"loss {loss_value:.3f}")
            if step % plan.checkpoint_every_steps == 0 and step < plan.steps:
                _save_checkpoint(checkpoint, model, optimizer, step, history)
    model.eval()
    return history


def train_plan(config: Config, steps: int, batch_sequences: int, learning_rate: float) -> TrainPlan:
    """The plan of one training, the rest of it from the configuration."""
    distill = config.distill
    return TrainPlan(
        steps=steps,
        batch_sequences=batch_sequences,
        learning_rate=learning_rate,
        weight_decay=distill.weight_decay,
        warmup_ratio=distill.warmup_ratio,
        bf16=uses_bf16(config),
        seed=config.seed,
        checkpoint_every_steps=distill.checkpoint_every_steps,
    )


def uses_bf16(config: Config) -> bool:
    """Whether matrices are multiplied in bfloat16 on this machine."""
    return {"auto": computes_bf16(), "bf16": True, "fp32": False}[config.distill.precision]


def discard_checkpoint(checkpoint: Path) -> None:
    """Remove what an unfinished run left, once its result is stored."""
    shutil.rmtree(checkpoint, ignore_errors=True)


def learning_rate(step: int, plan: TrainPlan) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(plan.steps * plan.warmup_ratio))
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, plan.steps - warmup)
    return plan.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def batch_rows(step: int, num_sequences: int, batch_sequences: int, seed: int) -> NDArray[np.int64]:
    """Sequence numbers of a step: each epoch is its own permutation; a batch may span two."""
    first = step * batch_sequences
    positions = np.arange(first, first + batch_sequences)
    rows = np.empty(batch_sequences, np.int64)
    for epoch in np.unique(positions // num_sequences):
        order = np.random.default_rng([seed, int(epoch)]).permutation(num_sequences)
        inside = positions // num_sequences == epoch
        rows[inside] = order[positions[inside] % num_sequences]
    return rows


def computes_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); elsewhere it is emulated and slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _save_checkpoint(
    directory: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    temporary = directory / "state.partial"
    save_file(tensors, temporary, metadata={"step": str(step), "history": json.dumps(history)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(directory / "state.safetensors")


def _load_checkpoint(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    path = directory / "state.safetensors"
    if not path.exists():
        return 0, []
    with safe_open(path, framework="pt") as file, torch.no_grad():
        metadata = file.metadata()
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"parameter.{name}"))
            optimizer.state[parameter] = {
                key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(metadata["step"]), json.loads(metadata["history"])
