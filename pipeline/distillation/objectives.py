"""What training minimises: functions of a model and a batch, injected into the one loop.

An objective returns a sum and the weight of what it summed. It sees the model itself, so it may
take hidden states and the output matrix instead of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch, LossSum, to_device
from pipeline.distillation.divergences import LossKind
from pipeline.distillation.head_losses import DEFAULT_CHUNK_TOKENS, Labels, head_loss
from pipeline.distillation.hidden_losses import HiddenTerm, add_hidden, kept_states
from pipeline.distillation.signals import DenseSignal, SignalSource, SparseSignal

Objective = Callable[[Any, Batch], LossSum]
"""(model, batch) -> loss summed over counted positions, and their number."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """A loss against the teacher's signal; see ``head_loss`` for each number and its range."""

    kind: LossKind
    temperature: float = 1.0
    beta: float = 0.5
    skew: float = 0.1
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS


def text_objective(chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Objective:
    """Cross entropy of each counted position against the token after it; the last position has none."""

    def objective(model: Any, batch: Batch) -> LossSum:
        hidden, head = hidden_and_head(model, batch.tokens)
        labels = Labels(batch.tokens[:, 1:].flatten())
        counts = batch.counts[:, :-1].flatten()
        return head_loss(hidden[:, :-1].flatten(0, 1), head, labels, LossKind.CROSS_ENTROPY, counts, chunk_tokens)

    return objective


def signal_objective(source: SignalSource, loss: LossSettings, hidden: HiddenTerm | None = None) -> Objective:
    """A loss against the teacher's distribution at each counted position.

    Args:
        source: Where the distribution comes from.
        loss: Which one.
        hidden: Added to it, from the same forward pass of the source's teacher.
    """
    ours, theirs = zip(*hidden.pairs, strict=True) if hidden else ((), ())

    def objective(model: Any, batch: Batch) -> LossSum:
        with kept_states(hidden and hidden.teacher, theirs) as teacher_states:
            signal = to_device(source.signal(batch), batch.tokens.device)
        flat: DenseSignal | SparseSignal
        if isinstance(signal, DenseSignal):
            flat = DenseSignal(signal.hidden.flatten(0, 1), signal.head)
        else:
            flat = SparseSignal(signal.ids.flatten(0, 1), signal.weights.flatten(0, 1))
        with kept_states(model, ours) as states:
            last, head = hidden_and_head(model, batch.tokens)
        total = head_loss(
            last.flatten(0, 1), head, flat, loss.kind, batch.counts.flatten(), loss.chunk_tokens,
            temperature=loss.temperature, beta=loss.beta, skew=loss.skew,
        )  # fmt: skip
        return add_hidden(total, hidden, model, states, teacher_states, batch.counts) if hidden else total

    return objective


def next_token_objective(model: Any, batch: Batch) -> LossSum:
    """As ``text_objective`` from whole logits: for models whose logits are not hidden states times one matrix."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = batch.counts[:, :-1]
    targets = batch.tokens[:, 1:].masked_fill(~counts.to(batch.tokens.device), -100)
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return LossSum(total, counts.sum())


def hidden_and_head(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Last normalised hidden states (B, T, H) and the output matrix (V, H) of a transformers or PEFT model.

    Raises:
        UserError: The output is not one plain matrix, for example because an adapter sits on it.
    """
    output: Any = model.get_output_embeddings()
    if type(output) is not nn.Linear or getattr(output, "bias", None) is not None:
        raise UserError(
            "the student's output", type(output).__name__, "one matrix without bias or adapter",
            "leave lm_head out of the adapter's targets",
        )  # fmt: skip
    return model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state, output.weight
