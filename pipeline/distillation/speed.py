"""How fast training goes: tokens a second, the share of the device's peak, memory.

For people and MLflow only; nothing that a result depends on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_WINDOW_STEPS, _REFRESH_S = 20, 0.5
# Dense bf16 with fp32 sums, operations a second, from the vendors' data sheets.
_PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 112e12, "T4": 65e12,
}  # fmt: skip


@dataclass(slots=True)
class Speedometer:
    """Figures over the last steps, brought up to date by ``count``.

    Attributes:
        tokens_per_step: Over all processes.
        flops_per_token: See ``training_flops_per_token``, plus what a teacher costs.
        peak_flops: Operations a second of all devices together; None: MFU is left out.
    """

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    device: torch.device
    clock: Callable[[], float] = time.monotonic
    _times_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW_STEPS + 1))
    _figures: dict[str, float] = field(default_factory=dict)
    _shown_s: float = float("-inf")

    def count(self) -> Mapping[str, float]:
        """A step has ended: tokens_per_s, mfu (0..1) and memory_bytes, looked at twice a second."""
        now_s = self.clock()
        self._times_s.append(now_s)
        if now_s - self._shown_s >= _REFRESH_S:
            self._shown_s = now_s
            self._figures = self._measure()
        return self._figures

    def left(self, steps: int) -> Mapping[str, float]:
        """``left_s``: seconds that so many more steps will take; nothing before the rate is known."""
        rate = self._figures.get("tokens_per_s")
        return {} if rate is None else {"left_s": steps * self.tokens_per_step / rate}

    def _measure(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        elapsed_s = self._times_s[-1] - self._times_s[0]
        if elapsed_s > 0:
            rate = self.tokens_per_step * (len(self._times_s) - 1) / elapsed_s
            figures["tokens_per_s"] = rate
            if self.peak_flops is not None:
                figures["mfu"] = rate * self.flops_per_token / self.peak_flops
        figures["memory_bytes"] = float(memory_bytes(self.device))
        return figures


def describe(figures: Mapping[str, float]) -> str:
    """``41.2k tokens/s, MFU 38 %, 12.3 GB``; what is not known is left out."""
    parts = []
    if "tokens_per_s" in figures:
        rate = figures["tokens_per_s"]
        parts.append(f"{rate / 1000:.1f}k tokens/s" if rate >= 1000 else f"{rate:.0f} tokens/s")
    if "mfu" in figures:
        parts.append(f"MFU {figures['mfu']:.0%}".replace("%", " %"))
    if "memory_bytes" in figures:
        parts.append(f"{figures['memory_bytes'] / 1e9:.1f} GB")
    return ", ".join(parts)


def training_flops_per_token(model: Any, sequence_tokens: int) -> float:
    """Operations of forward and backward a token: 6 N + 6 L (heads x head_dim) T, the last for causal attention.

    N are the parameters that multiply: all but an embedding that is only looked up. A frozen
    parameter costs 4 instead of 6, because its own gradient is not computed. Source: PaLM,
    appendix B (arXiv 2204.02311), attention halved because half of it is masked.
    """
    embedding = _embedding(model)
    head = _head(model)
    trained = frozen = 0
    for parameter in model.parameters():
        if parameter is embedding and parameter is not head:
            continue
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    attention = getattr(config, "num_hidden_layers", 0) * heads * head_dim * sequence_tokens
    return 6.0 * trained + 4.0 * frozen + 6.0 * attention


def peak_flops(device: torch.device) -> float | None:
    """bf16 operations a second that the device's maker promises; None: not known, or a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)


def memory_bytes(device: torch.device) -> int:
    """What this process holds now: of the GPU at its peak, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def _embedding(model: Any) -> nn.Parameter | None:
    get = getattr(model, "get_input_embeddings", None)
    return None if get is None else getattr(get(), "weight", None)


def _head(model: Any) -> nn.Parameter | None:
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else getattr(get(), "weight", None)
