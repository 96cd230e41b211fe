"""The on-policy phase: the student writes, the teacher says how likely each of its tokens was.

Generalised knowledge distillation (GKD, arXiv 2306.13649): in a share of the steps the text of the
batch is replaced by what the student makes of its beginnings. Each draw is a function of seed, step
and sequence, so it does not depend on micro-batches, processes or an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Batch, LossSum
from pipeline.distillation.fast_layers import uncompiled
from pipeline.distillation.objectives import Objective

_STEPS, _TOKENS = 0, 1  # random streams of a step: whether it samples, and what


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the student's text is made.

    Attributes:
        ratio: Share of the steps that learn from the student's text (GKD's lambda), 0 to 1.
        prompt_tokens: Longest beginning that is given, 1 or more.
        new_tokens: Longest continuation, 1 or more.
        temperature: Divides the logits, above 0.
        eos_ids: Tokens that end a text.
        seed: 0 or more.
        bf16: Multiply in bfloat16.
    """

    ratio: float
    prompt_tokens: int
    new_tokens: int
    temperature: float
    eos_ids: tuple[int, ...]
    seed: int
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("ratio", "0 to 1", 0 <= self.ratio <= 1),
            ("prompt_tokens", "1 or more", self.prompt_tokens >= 1),
            ("new_tokens", "1 or more", self.new_tokens >= 1),
            ("temperature", "above 0", self.temperature > 0),
        ):
            if not fits:
                raise UserError(f"on_policy.{name}", getattr(self, name), allowed)


def on_policy_objective(inner: Objective, sampling: Sampling) -> Objective:
    """``inner`` on the student's own text in a share of the steps, on the batch itself in the others.

    Args:
        inner: With an online teacher: nothing is stored for text that did not exist before.
        sampling: How the text is made.
    """

    def objective(model: Any, batch: Batch) -> LossSum:
        return inner(model, sample_batch(model, batch, sampling) if samples_in(batch.step, sampling) else batch)

    return objective


def samples_in(step: int, sampling: Sampling) -> bool:
    """Whether the student writes in this step; the same in all processes."""
    return bool(np.random.default_rng([sampling.seed, _STEPS, step]).random() < sampling.ratio)


def sample_batch(model: Any, batch: Batch, sampling: Sampling) -> Batch:
    """The batch's beginnings continued by the student.

    The beginning of a sequence is what stands before its first answer, at most its last
    ``prompt_tokens``; where everything counts, its first ``prompt_tokens``.

    Returns:
        A batch of (B, prompt_tokens + new_tokens) in which only predictions of generated tokens
        count, an end of text included. It has no rows: stored targets do not fit it.
    """
    lengths, starts = _beginnings(batch.counts.numpy(), sampling.prompt_tokens)
    width = int(lengths.max())
    tokens = batch.tokens.cpu().numpy()
    prompts = np.zeros((len(tokens), width), np.int64)  # padded on the left, so that all continue at one place
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        prompts[row, width - length :] = tokens[row, start : start + length]
    uniforms = np.stack([
        np.random.default_rng([sampling.seed, _TOKENS, batch.step, int(row)]).random(sampling.new_tokens)
        for row in batch.rows
    ])  # fmt: skip
    device = batch.tokens.device
    new = continue_prompts(
        model, torch.from_numpy(prompts).to(device), torch.from_numpy(lengths), torch.from_numpy(uniforms), sampling
    ).cpu()
    written = _written(new, sampling.eos_ids)
    text = torch.zeros(len(tokens), sampling.prompt_tokens + sampling.new_tokens, dtype=torch.int64)
    counts = torch.zeros(text.shape, dtype=torch.bool)
    for row, (length, count) in enumerate(zip(lengths.tolist(), written.tolist(), strict=True)):
        text[row, :length] = torch.from_numpy(prompts[row, width - length :])
        text[row, length : length + count] = new[row, :count]
        counts[row, length - 1 : length - 1 + count] = True
    return Batch(np.empty(0, np.int64), text.to(device), counts, batch.step)


@torch.no_grad()
def continue_prompts(
    model: Any, prompts: torch.Tensor, lengths: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """Draw tokens (B, N) after prompts (B, P), padded on the left, through one cache of keys and values.

    Args:
        model: A causal transformers model; it is in evaluation mode meanwhile.
        prompts: (B, P) int64.
        lengths: (B,) tokens of each prompt.
        uniforms: (B, N) in [0, 1): each decides one token by the inverse of the distribution function.
        sampling: Temperature, and the tokens after which a row does not matter any more.
    """
    device, (rows, width) = prompts.device, prompts.shape
    positions = torch.arange(width, device=device) - (width - lengths.to(device))[:, None]
    mask = (positions >= 0).long()
    positions, uniforms = positions.clamp(min=0), uniforms.to(device)
    ends = torch.tensor(sampling.eos_ids, dtype=torch.int64, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    inputs, cache, drawn = prompts, None, []
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=sampling.bf16), uncompiled():
            for number in range(uniforms.shape[1]):
                out = model(
                    input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1,
                )  # fmt: skip
                cache = out.past_key_values
                chosen = _draw(out.logits[:, -1], uniforms[:, number], sampling.temperature)
                drawn.append(chosen)
                ended |= torch.isin(chosen, ends)
                if not _spread(model) and bool(ended.all()):
                    break
                inputs, positions = chosen[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
    finally:
        model.train(was_training)
    return torch.stack(drawn, dim=1)


def _beginnings(counts: NDArray[np.bool_], prompt_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(lengths, starts) of the prompts of (B, T) rows."""
    first = counts.argmax(axis=1).astype(np.int64)  # 0 also where nothing counts
    ends = np.where(first > 0, first + 1, min(prompt_tokens, counts.shape[1]))
    lengths = np.minimum(ends, prompt_tokens)
    return lengths, ends - lengths


def _draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def _written(new: torch.Tensor, eos_ids: tuple[int, ...]) -> torch.Tensor:
    """(B,) tokens up to the first end of text, itself included."""
    is_end = torch.isin(new, torch.tensor(eos_ids, dtype=torch.int64))
    before = is_end.long().cumsum(dim=1) - is_end.long()
    return (before == 0).sum(dim=1)


def _spread(model: Any) -> bool:
    """Whether the processes gather the model's parts together, and so must take the same number of steps."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
