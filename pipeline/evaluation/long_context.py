"""What a model makes of long texts: perplexity against position, and needles found by depth.

Both run any causal Hugging Face model piece by piece over a key/value cache, with full attention or with a
window and sinks (G. Xiao et al., StreamingLLM, 2023, arXiv 2309.17453). The window is a mask: positions stay
where they are, and what lies outside is never seen again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.distillation.needles import NeedleFormat, needle_prompt

DEFAULT_EDGES = (0, 256, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
DEFAULT_DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_HEAD_ROWS = 256  # positions whose logits exist at a time
_Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class AttentionPattern:
    """What a token sees: everything before it, or a window and the first few.

    Attributes:
        window_tokens: The token itself and those just before it; None: all.
        sink_tokens: The first ones of the text, seen besides the window.
    """

    window_tokens: int | None = None
    sink_tokens: int = 4

    @property
    def name(self) -> str:
        """For tables."""
        return "full" if self.window_tokens is None else f"window {self.window_tokens} + {self.sink_tokens} sinks"


@dataclass(frozen=True, slots=True)
class PositionLoss:
    """Loss in nats a token over the positions [first, end), and how many tokens it is the mean of."""

    first: int
    end: int
    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss)


@dataclass(frozen=True, slots=True)
class NeedleScore:
    """Needles found at one length and depth; ``recall`` with its 95 % Wilson interval."""

    tokens: int
    depth: float
    found: int
    trials: int

    @property
    def recall(self) -> float:
        """Share found."""
        return self.found / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Of the recall."""
        return wilson_interval(self.found, self.trials)


def perplexity_by_position(
    model: Any,
    sequences: NDArray[np.int32],
    pattern: AttentionPattern,
    *,
    edges: Sequence[int] = DEFAULT_EDGES,
    chunk_tokens: int = 2_048,
    bf16: bool = False,
) -> list[PositionLoss]:
    """Mean loss of each token given those before it, by where it stands.

    Args:
        model: A causal language model.
        sequences: (N, T) tokens of text that it was not trained on.
        pattern: What a token sees.
        edges: Ascending bounds of the buckets, in tokens; those beyond T are left out. The first token of a
            sequence has no loss.
        chunk_tokens: Positions computed at a time; with full attention and T or more, nothing is cached.
        bf16: Multiply in bfloat16.

    Raises:
        UserError: The edges do not ascend, or a sequence is shorter than two tokens.
    """
    length = sequences.shape[1]
    if length < 2 or list(edges) != sorted(set(edges)):
        raise UserError("edges", list(edges), "ascending bounds, and sequences of two tokens or more")
    bounds = [edge for edge in edges if edge < length]
    bounds.append(min([edge for edge in edges if edge >= length], default=length))
    totals, counts = np.zeros(length), np.zeros(length, np.int64)
    for row in sequences:
        tokens = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
        for start, hidden in _hidden_states(model, tokens, pattern, chunk_tokens, bf16):
            losses = _losses(model, hidden[0], tokens[0, start + 1 :], bf16)
            totals[start + 1 : start + 1 + len(losses)] += losses
            counts[start + 1 : start + 1 + len(losses)] += 1
    found = []
    for first, end in pairwise(bounds):
        number = int(counts[first:end].sum())
        if number:
            found.append(PositionLoss(first, min(end, length), float(totals[first:end].sum()) / number, number))
    return found


def needle_recall(
    model: Any,
    form: NeedleFormat,
    haystack: NDArray[np.int32],
    pattern: AttentionPattern,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = DEFAULT_DEPTHS,
    trials: int = 20,
    distractors: int = 3,
    seed: int = 0,
    batch_sequences: int = 1,
    chunk_tokens: int = 2_048,
    bf16: bool = False,
) -> list[NeedleScore]:
    """How often the greedy answer to a question is exactly what the text said, by length and depth.

    The same texts for every pattern and model, as they depend on seed, length, depth and trial alone. The
    answer is given along and each of its tokens has to be the most likely one: that is the case exactly when
    greedy decoding writes it.

    Args:
        model: A causal language model.
        form: How needles are written.
        haystack: (H,) tokens of text that it was not trained on.
        pattern: What a token sees.
        lengths: Of text, question and answer together, in tokens.
        depths: 0 at the start of the text to 1 at its end.
        trials: For each length and depth.
        distractors: Other needles in each text.
        seed: Of texts, needles and places.
        batch_sequences: Texts run at a time.
        chunk_tokens: As in ``perplexity_by_position``.
        bf16: Multiply in bfloat16.

    Raises:
        UserError: A length is longer than the haystack or a depth outside 0 to 1.
    """
    if not all(0 <= depth <= 1 for depth in depths) or trials < 1:
        raise UserError("depths", list(depths), "numbers from 0 to 1, with at least one trial each")
    scores = []
    for tokens in lengths:
        for depth in depths:
            drawn = [
                needle_prompt(form, haystack, tokens, depth, distractors, _rng(seed, tokens, depth, trial))
                for trial in range(trials)
            ]
            found = 0
            for first in range(0, trials, batch_sequences):
                part = drawn[first : first + batch_sequences]
                texts = np.stack([np.concatenate([prompt, answer]) for prompt, answer in part])
                found += _count_found(model, texts, form.value_words, pattern, chunk_tokens, bf16)
            scores.append(NeedleScore(tokens, depth, found, trials))
    return scores


def wilson_interval(successes: int, trials: int, z: float = _Z_95) -> tuple[float, float]:
    """Bounds of a share (E. B. Wilson, 1927); they stay within 0 and 1 and are not of length 0 at the ends."""
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def attention_mask(
    pattern: AttentionPattern, start: int, end: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """What is added to the scores of queries [start, end) and keys [0, end): (1, 1, end - start, end).

    None for full attention: the model's own mask is that.
    """
    if pattern.window_tokens is None:
        return None
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(end, device=device)[None]
    seen = (keys <= queries) & ((keys > queries - pattern.window_tokens) | (keys < pattern.sink_tokens))
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


@torch.no_grad()
def _hidden_states(
    model: Any, tokens: torch.Tensor, pattern: AttentionPattern, chunk_tokens: int, bf16: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, hidden (B, C, H)) piece by piece over tokens (B, T)."""
    from transformers import DynamicCache

    length = tokens.shape[1]
    if pattern.window_tokens is not None and (pattern.window_tokens < 1 or pattern.sink_tokens < 0):
        raise UserError("window_tokens", pattern.window_tokens, "1 or more, with 0 sinks or more")
    dtype = torch.bfloat16 if bf16 else model.dtype
    decoder = model.get_decoder()
    cache = DynamicCache(config=model.config) if chunk_tokens < length else None
    for start in range(0, length, chunk_tokens):
        end = min(start + chunk_tokens, length)
        mask = attention_mask(pattern, start, end, dtype, tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            output = decoder(
                input_ids=tokens[:, start:end], attention_mask=mask, past_key_values=cache,
                position_ids=torch.arange(start, end, device=tokens.device)[None], use_cache=cache is not None,
            )  # fmt: skip
        yield start, output.last_hidden_state


@torch.no_grad()
def _logits(model: Any, hidden: torch.Tensor, bf16: bool) -> torch.Tensor:
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
        logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return logits.float()


def _losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor, bf16: bool) -> NDArray[np.float64]:
    """Nats of each target (P,) after hidden (C, H); the last position of a text has none."""
    losses = []
    for first in range(0, min(len(hidden), len(targets)), _HEAD_ROWS):
        wanted = targets[first : first + min(_HEAD_ROWS, len(hidden) - first)]
        logits = _logits(model, hidden[first : first + len(wanted)], bf16)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses).double().cpu().numpy() if losses else np.empty(0)


def _count_found(
    model: Any, texts: NDArray[np.int32], value_tokens: int, pattern: AttentionPattern, chunk_tokens: int, bf16: bool
) -> int:
    """Texts (B, T) whose last ``value_tokens`` are what the model would have written."""
    tokens = torch.from_numpy(texts.astype(np.int64)).to(model.device)
    first = tokens.shape[1] - value_tokens  # of the answer; predicted one position earlier
    right = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    for start, hidden in _hidden_states(model, tokens, pattern, chunk_tokens, bf16):
        low, high = max(first - 1, start), min(tokens.shape[1] - 1, start + hidden.shape[1])
        if low < high:
            likeliest = _logits(model, hidden[:, low - start : high - start], bf16).argmax(dim=-1)
            right &= (likeliest == tokens[:, low + 1 : high + 1]).all(dim=1)
    return int(right.sum())


def _rng(seed: int, tokens: int, depth: float, trial: int) -> np.random.Generator:
    return np.random.default_rng([seed, tokens, round(depth * 1_000), trial])
