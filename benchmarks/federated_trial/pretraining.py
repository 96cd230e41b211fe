"""The base model: public text, plain AdamW, a minute at most."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.federated_trial.model import Base, Shape, decoder_block, head_losses, initial_base, window_losses

_BATCH = 128
_PEAK_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 100


def pretrained_base(shape: Shape, text: Tensor, steps: int, seed: int, device: torch.device) -> tuple[Base, float]:
    """A base trained on ``text`` (n,) and its last training loss, averaged over 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    start = initial_base(shape, generator)
    base = Base(
        start.embedding.to(device).requires_grad_(),
        start.norms.to(device).requires_grad_(),
        [linear.to(device).requires_grad_() for linear in start.linears],
    )
    optimizer = torch.optim.AdamW(
        base.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    text = text.to(device)
    positions = torch.arange(shape.context + 1, device=device)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(step, steps)
        first = torch.randint(len(text) - shape.context - 1, (_BATCH,), generator=generator).to(device)
        tokens = text[first[:, None] + positions].unsqueeze(0)
        loss = base_losses(base, shape, tokens).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    frozen = Base(base.embedding.detach(), base.norms.detach(), [linear.detach() for linear in base.linears])
    return frozen, float(torch.stack(losses[-50:]).mean())


def write_base(base: Base, path: Path) -> None:
    """Keep a base for later stages."""
    tensors = {"embedding": base.embedding, "norms": base.norms}
    tensors |= {f"linears.{slot:03d}": linear for slot, linear in enumerate(base.linears)}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)


def read_base(path: Path, device: torch.device) -> Base:
    """A base that ``write_base`` wrote."""
    tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
    linears = [tensors[name] for name in sorted(tensors) if name.startswith("linears.")]
    return Base(tensors["embedding"], tensors["norms"], linears)


def base_losses(base: Base, shape: Shape, tokens: Tensor) -> Tensor:
    """Losses (1,) of the base alone on windows (1, B, T + 1)."""
    weights = [linear.reshape(1, -1, linear.shape[-1]) for linear in base.linears]
    return window_losses(weights, base, shape, tokens, decoder_block, head_losses)


def _learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / _WARMUP_STEPS)
    return _PEAK_LEARNING_RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
