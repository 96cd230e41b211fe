"""What it costs to store a weight in few bits: the divergence of a model from itself with that weight changed.

Measured, not estimated: each change runs the model over the same text, from the first layer that it touches on, so that
a sweep over all weights costs about half a forward pass a weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.decoder import EMBEDDING
from edge_runtime.formats.int4 import QuantizedTensor, dequantize

Change = Mapping[str, QuantizedTensor]  # weights by name, and what they become
BATCH_TOKENS = 2048  # whose hidden states behind every layer, and log-probabilities, exist at once
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@torch.no_grad()
def divergences(
    model: Any, tokens: NDArray[np.int32], changes: Sequence[Change], report: Callable[[int], None] = lambda done: None
) -> list[float]:
    """KL(model || changed model) of each change, in nats a position.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 causal language model on any device; its weights come back as they were.
            In fp32: the rounding of bf16 alone diverges more than one 4-bit weight does.
        tokens: (S, T) ids of text.
        changes: Sets of weights that are changed together.
        report: Called with how much is done, of S times the number of changes.
    """
    totals, done = np.zeros(len(changes)), 0
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), rows):
        ids = torch.from_numpy(tokens[start : start + rows].astype(np.int64)).to(model.device)
        recorded = _record(model, ids)
        expected = _log_p(model, recorded.hidden[-1])
        for index, change in enumerate(changes):
            with _substituted(model, change):
                found = _log_p(model, _last_hidden(model, ids, recorded, _first_layer(change, len(recorded.inputs))))
            totals[index] += _summed_kl(expected, found)
            done += len(ids)
            report(done)
    return [float(total) / tokens.size for total in totals]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One pass: hidden states (B, T, H) in front of each layer and behind the last, and each layer's other inputs."""

    hidden: list[torch.Tensor]
    inputs: list[dict[str, Any]]


def _record(model: Any, ids: torch.Tensor) -> _Recorded:
    recorded = _Recorded([], [])

    def keep(layer: Any, given: tuple[torch.Tensor], more: dict[str, Any]) -> None:
        recorded.hidden.append(given[0])
        recorded.inputs.append(more)

    def keep_last(norm: Any, given: tuple[torch.Tensor]) -> None:
        recorded.hidden.append(given[0])

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(keep_last))
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


def _last_hidden(model: Any, ids: torch.Tensor, recorded: _Recorded, first: int) -> torch.Tensor:
    """States behind the last layer, with the layers from ``first`` on run anew; -1 starts at the embedding."""
    hidden = model.model.embed_tokens(ids) if first < 0 else recorded.hidden[first]
    start = max(first, 0)
    for layer, inputs in zip(model.model.layers[start:], recorded.inputs[start:], strict=True):
        hidden = layer(hidden, **inputs)
    return hidden


def _first_layer(change: Change, layers: int) -> int:
    """Where a change begins to show: -1 for the embedding, ``layers`` for the head alone."""
    if f"{EMBEDDING}.weight" in change:
        return -1
    return min((int(found[1]) for name in change if (found := _LAYER.match(name))), default=layers)


def _log_p(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.lm_head(model.model.norm(hidden))
    return logits.float().log_softmax(dim=-1)


def _summed_kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(dim=-1, dtype=torch.float64).sum())


@contextmanager
def _substituted(model: Any, change: Change) -> Iterator[None]:
    parameters = [model.get_parameter(name) for name in change]
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, change.values(), strict=True):
            parameter.data = torch.from_numpy(dequantize(value)).to(parameter)
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
