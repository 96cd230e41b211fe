"""Adapters: PEFT's directory format on disk, plain arrays in memory, bound to their base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA: ``y = W x + scale * lora_b (lora_a x)``.

    Attributes:
        rank: r, the same for every module.
        scale: alpha / r (alpha / r_max for a prefix of a nested adapter).
        pairs: Module name (``model.layers.0.self_attn.q_proj``) to (lora_a (r, in), lora_b (out, r)).
        base_digest: Digest of the base it was trained on, or None when the directory names none.
    """

    rank: int
    scale: float
    pairs: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    base_digest: str | None
