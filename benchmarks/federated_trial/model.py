"""A Llama of one million parameters over characters, with weights of their own for every row of a batch.

A row is one client of one run: its linears are the base plus its adapter, merged, so that a step of hundreds of
clients is a handful of batched products. Merging is for the simulator's speed and changes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model."""

    vocabulary: int = 96
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 448
    context: int = 128

    def linears(self) -> list[tuple[int, int, int]]:
        """(linears side by side, outputs of one, inputs) of every slot, in the order layer by layer, KINDS within."""
        per_layer = [
            (3, self.hidden, self.hidden),
            (1, self.hidden, self.hidden),
            (2, self.inner, self.hidden),
            (1, self.hidden, self.inner),
        ]
        return per_layer * self.layers


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model: embedding (V, D), norms (2 L + 1, D), and linears (n, out, in), a slot each."""

    embedding: Tensor
    norms: Tensor
    linears: list[Tensor]

    def parameters(self) -> list[Tensor]:
        return [self.embedding, self.norms, *self.linears]


Block = Callable[..., Tensor]


def initial_base(shape: Shape, generator: torch.Generator) -> Base:
    """A base before training, on the generator's device."""

    def normal(*sizes: int, deviation: float) -> Tensor:
        return torch.randn(*sizes, generator=generator) * deviation

    linears = [normal(*sizes, deviation=1 / math.sqrt(sizes[2])) for sizes in shape.linears()]
    for slot in range(len(linears)):
        if KINDS[slot % len(KINDS)] in ("o", "down"):  # what adds to the residual stream starts small
            linears[slot] /= math.sqrt(2 * shape.layers)
    embedding = normal(shape.vocabulary, shape.hidden, deviation=1 / math.sqrt(shape.hidden))
    return Base(embedding, torch.ones(2 * shape.layers + 1, shape.hidden), linears)


def window_losses(
    weights: Sequence[Tensor], base: Base, shape: Shape, tokens: Tensor, block: Block, head: Block
) -> Tensor:
    """Mean cross-entropy of every row's windows.

    Args:
        weights: For every slot the merged linears (N, n out, in), in the type to compute in.
        base: Embedding and norms, shared by all rows.
        shape: The model's sizes.
        tokens: Windows (N, B, T + 1).
        block: ``decoder_block``, or what it compiles to.
        head: ``head_losses``, likewise.

    Returns:
        (N,) in nats a token.
    """
    rows, length = tokens.shape[0], tokens.shape[2]
    dtype = weights[0].dtype
    inputs, labels = tokens[..., :-1].reshape(rows, -1), tokens[..., 1:].reshape(rows, -1)
    embedding, norms = base.embedding.to(dtype), base.norms.to(dtype)
    hidden = F.embedding(inputs, embedding) * math.sqrt(shape.hidden)
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()  # one compiled variant of the block for all layers
    cosine, sine = _rotations(shape, length - 1, tokens.device, dtype)
    for layer in range(shape.layers):
        slots = weights[len(KINDS) * layer : len(KINDS) * (layer + 1)]
        pair = norms[2 * layer], norms[2 * layer + 1]
        hidden = block(hidden, *slots, *pair, cosine, sine, shape.heads)
    return head(hidden, norms[-1], embedding, labels)


def decoder_block(
    hidden: Tensor,
    qkv: Tensor,
    o: Tensor,
    gate_up: Tensor,
    down: Tensor,
    attention_norm: Tensor,
    inner_norm: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
) -> Tensor:
    """One pre-norm layer over ``hidden`` (N, B T, D), every row with its own linears."""
    rows, positions, width = hidden.shape
    context = cosine.shape[0]
    mixed = torch.bmm(_normed(hidden, attention_norm), qkv.transpose(1, 2))
    mixed = mixed.view(rows * positions // context, context, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key = _rotated(mixed[0], cosine, sine), _rotated(mixed[1], cosine, sine)
    attended = F.scaled_dot_product_attention(query, key, mixed[2], is_causal=True)
    attended = attended.transpose(1, 2).reshape(rows, positions, width)
    hidden = hidden + torch.bmm(attended, o.transpose(1, 2))
    gate, up = torch.bmm(_normed(hidden, inner_norm), gate_up.transpose(1, 2)).chunk(2, dim=-1)
    return hidden + torch.bmm(F.silu(gate) * up, down.transpose(1, 2))


def head_losses(hidden: Tensor, norm: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy (N,) of labels (N, B T) under the tied head."""
    logits = (_normed(hidden, norm) @ embedding.T).float()
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - picked).mean(-1)


def _normed(hidden: Tensor, gain: Tensor) -> Tensor:
    wide = hidden.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype) * gain


def _rotations(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = shape.hidden // shape.heads // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos().repeat(1, 2).to(dtype), angles.sin().repeat(1, 2).to(dtype)


def _rotated(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat((-second, first), dim=-1) * sine
