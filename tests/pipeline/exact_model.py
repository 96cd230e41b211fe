"""A causal model in float64 and a short training of it: what is equal in it is equal to the last digits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.distillation.batches import Sequences
from pipeline.distillation.trainer import TrainPlan

VOCABULARY = 320
PLAN = TrainPlan(
    steps=11, batch_sequences=3, learning_rate=3e-3, weight_decay=0.05, warmup_ratio=0.2, bf16=False, seed=5,
    checkpoint_every_steps=3,
)  # fmt: skip
_RANDOM = np.random.default_rng(2)
TOKENS = _RANDOM.integers(0, VOCABULARY, (10, 16)).astype(np.int32)
UNEVEN = _RANDOM.random((10, 16)) < np.linspace(0.05, 0.95, 10)[:, None]
SEQUENCES, ANSWERS = Sequences(TOKENS), Sequences(TOKENS, UNEVEN)


class Exact(torch.nn.Module):
    """Those of transformers round to float32 in their norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(VOCABULARY, 24)
        pairs = [(torch.nn.Linear(24, 24), torch.nn.Tanh()) for _ in range(2)]
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(*pair) for pair in pairs])
        self.norm = torch.nn.LayerNorm(24)
        self.head = torch.nn.Linear(24, VOCABULARY)
        self.double()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embedding(input_ids).cumsum(dim=1)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return SimpleNamespace(logits=self.head(self.norm(hidden)))
