"""What training minimises: functions of a model and a batch, injected into the one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.distillation.batches import Batch, LossSum

Objective = Callable[[Any, Batch], LossSum]
"""(model, batch) -> loss summed over counted positions, and their number."""

LogitsLoss = Callable[[torch.Tensor, NDArray[Any], torch.Tensor], torch.Tensor]
"""(logits (B, T, V), sequence numbers (B,), tokens (B, T)) -> scalar, a mean."""


def next_token_objective(model: Any, batch: Batch) -> LossSum:
    """Cross entropy of each counted position against the token after it; the last position has none."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    counts = batch.counts[:, :-1]
    targets = batch.tokens[:, 1:].masked_fill(~counts, -100)
    total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return LossSum(total, counts.sum())


def logits_objective(loss: LogitsLoss) -> Objective:
    """An objective out of a mean over whole sequences, which ignores ``counts``."""

    def objective(model: Any, batch: Batch) -> LossSum:
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        sequences = len(batch.tokens)
        value = loss(logits, batch.rows, batch.tokens)
        return LossSum(value * sequences, torch.tensor(float(sequences), device=value.device))

    return objective
