"""What the configuration says of training, in the words of the libraries: plans and losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.distillation.aligned_signal import AlignedLoss
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.objectives import LossSettings
from pipeline.distillation.trainer import TrainPlan

if TYPE_CHECKING:
    from pipeline.settings import Config


def training_device() -> torch.device:
    """The GPU where there is one; under torchrun the loop moves each process to its own."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_bf16(config: Config) -> bool:
    """Whether matrices are multiplied in bfloat16 on this machine."""
    return {"auto": computes_bf16(training_device().type), "bf16": True, "fp32": False}[config.distill.precision]


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
        bf16_weights=uses_bf16(config) and training_device().type == "cuda",
        seed=config.seed,
        checkpoint_every_steps=distill.checkpoint_every_steps,
        micro_sequences=distill.micro_sequences,
        compile=distill.compile,
        recompute=distill.recompute,
        sharding=distill.sharding,
    )


def loss_settings(config: Config) -> LossSettings | AlignedLoss:
    """The loss against the teacher; stored draws have one only, the unbiased estimate of the forward KL."""
    distill = config.distill
    if distill.loss == "aligned":
        return AlignedLoss(distill.beta, chunk_positions=distill.chunk_tokens)
    stored = distill.signal == "stored" and config.submodel.learns_from == "teacher"
    kind = LossKind.SAMPLED_KL if stored else LossKind(distill.loss)
    return LossSettings(
        kind, temperature=distill.temperature, beta=distill.beta, skew=distill.skew, chunk_tokens=distill.chunk_tokens
    )


def computes_bf16(device: str = "cpu") -> bool:
    """Whether a device multiplies bfloat16 itself; elsewhere it is emulated and slow.

    Args:
        device: ``cpu`` (AVX512-BF16 or AMX) or ``cuda``.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
