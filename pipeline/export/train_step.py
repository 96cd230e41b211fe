"""The training step of a decoder: loss of next-token prediction and its gradients by the LoRA tensors.

Written once on a tape; ``train_step_onnx`` and ``train_step_tflite`` turn it into files. The base is frozen, so the
result is an ordinary inference graph: no training runtime, no state. Text is padded on the right, where causal
attention keeps padding out of every real position, and the loss mask keeps it out of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.formats.decoder import EMBEDDING, FINAL_NORM, HEAD, DecoderSpec, module_name
from pipeline.export.lora_slots import LoraSlots
from pipeline.export.train_step_tape import Shape, Size, Tape, Tensor, differentiate

TOKENS, LOSS_MASK, LOSS_SUM, TOKEN_COUNT = "tokens", "loss_mask", "loss_sum", "token_count"
GRADIENT_SUFFIX = ".gradient"
_HIDDEN = -1e9  # added to a score, leaves an exact zero after softmax


@dataclass(frozen=True, slots=True)
class TrainStep:
    """A tape with what it hands out, by name: the loss, the count and one gradient a LoRA tensor."""

    tape: Tape
    outputs: Mapping[str, Tensor]


def train_step(
    spec: DecoderSpec,
    shapes: Mapping[str, tuple[int, ...]],
    lora: LoraSlots,
    *,
    tokens: int,
    batch: Size,
    rank: Size | None = None,
    gradients: bool = True,
) -> TrainStep:
    """The step for sequences of one length.

    Args:
        spec: Sizes of the decoder.
        shapes: (N, K) of the stored weights, and the lengths of vectors, by checkpoint name.
        lora: Which projections are adapted.
        tokens: Sequence length T.
        batch: Sequences B, a number or a name.
        rank: Of the LoRA tensors; None leaves it to the runtime, one name a module.
        gradients: Without them, only the loss.
    """
    tape = Tape()
    ids, mask = tape.source(TOKENS, (batch, tokens), "int32"), tape.source(LOSS_MASK, (batch, tokens))
    step = _Step(tape, spec, shapes, lora, tokens, batch, rank, {}, *_tables(tape, spec, tokens))
    hidden = tape.reshape(tape.embed(ids, f"{EMBEDDING}.weight", spec.hidden_size), (step.rows, spec.hidden_size))
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        hidden = tape.add(hidden, _attention(step, layer, _norm(step, hidden, f"{prefix}.input_layernorm")))
        hidden = tape.add(hidden, _mlp(step, layer, _norm(step, hidden, f"{prefix}.post_attention_layernorm")))
    not_last = tape.constant("not_last", np.append(np.ones(tokens - 1, np.float32), np.float32(0)))
    counted = tape.multiply(mask, not_last)
    loss = _loss(step, _norm(step, hidden, FINAL_NORM), ids, tape.reshape(counted, (step.rows, 1)))
    outputs = {LOSS_SUM: loss, TOKEN_COUNT: tape.total(counted)}
    if gradients:
        found = differentiate(tape, loss, list(step.sources.values()))
        outputs |= {name + GRADIENT_SUFFIX: tensor for name, tensor in found.items()}
    return TrainStep(tape, outputs)


@dataclass(frozen=True, slots=True)
class _Step:
    """What every layer reads."""

    tape: Tape
    spec: DecoderSpec
    shapes: Mapping[str, tuple[int, ...]]
    lora: LoraSlots
    tokens: int
    batch: Size
    rank: Size | None
    sources: dict[str, Tensor]
    cos: Tensor
    sin: Tensor
    causal: Tensor

    @property
    def rows(self) -> Size:
        """Positions of all sequences, one below the other."""
        return self.batch * self.tokens if isinstance(self.batch, int) else "rows"


def _tables(tape: Tape, spec: DecoderSpec, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos (T, D), sin (T, D) with its first half negated (the graph only swaps halves), and the mask (T, T)."""
    angles = np.arange(tokens, dtype=np.float32)[:, None] * np.asarray(spec.inv_freq, np.float32)
    factor = np.float32(spec.rope_attention_factor)
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    return (
        tape.constant("cos", np.concatenate([cos, cos], axis=1)),
        tape.constant("sin", np.concatenate([-sin, sin], axis=1)),
        tape.causal(tokens, _HIDDEN),
    )


def _attention(step: _Step, layer: int, x: Tensor) -> Tensor:
    tape, spec, tokens, batch = step.tape, step.spec, step.tokens, step.batch
    heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    # Query heads that share a key lie one below the other: keys and values are never repeated.
    grouped: Shape = (batch, kv_heads, heads // kv_heads * tokens, head_dim)
    query = tape.reshape(_rotated(step, _heads(step, layer, "q", x, heads)), grouped)
    key = _rotated(step, _heads(step, layer, "k", x, kv_heads))
    value = _heads(step, layer, "v", x, kv_heads)
    scores = tape.matmul(tape.scale(query, 1 / math.sqrt(head_dim)), key, transpose_b=True)
    by_head = tape.reshape(scores, (batch, heads, tokens, tokens))
    shares = tape.softmax(tape.add(by_head, step.causal))
    attended = tape.matmul(tape.reshape(shares, (*grouped[:3], tokens)), value)
    merged = tape.transpose(tape.reshape(attended, (batch, heads, tokens, head_dim)), (0, 2, 1, 3))
    return _projection(step, layer, "o_proj", tape.reshape(merged, (step.rows, heads * head_dim)))


def _heads(step: _Step, layer: int, letter: str, x: Tensor, heads: int) -> Tensor:
    """(rows, H) -> (B, heads, T, D), normalised where the checkpoint has a norm."""
    projected = _projection(step, layer, f"{letter}_proj", x)
    split = step.tape.reshape(projected, (step.batch, step.tokens, heads, step.spec.head_dim))
    norm = f"model.layers.{layer}.self_attn.{letter}_norm"
    return step.tape.transpose(_norm(step, split, norm) if f"{norm}.weight" in step.shapes else split, (0, 2, 1, 3))


def _rotated(step: _Step, x: Tensor) -> Tensor:
    tape = step.tape
    return tape.add(tape.multiply(x, step.cos), tape.multiply(tape.swap_halves(x), step.sin))


def _mlp(step: _Step, layer: int, x: Tensor) -> Tensor:
    tape = step.tape
    gate = _projection(step, layer, "gate_proj", x)
    gated = tape.multiply(tape.multiply(gate, tape.sigmoid(gate)), _projection(step, layer, "up_proj", x))
    return _projection(step, layer, "down_proj", gated)


def _projection(step: _Step, layer: int, projection: str, x: Tensor) -> Tensor:
    """x (rows, K) through one projection, its bias and its adapter."""
    tape, module = step.tape, module_name(layer, projection)
    out_features = step.shapes[f"{module}.weight"][0]
    bias = f"{module}.bias" if f"{module}.bias" in step.shapes else None
    base = tape.linear(x, f"{module}.weight", out_features, bias)
    if projection not in step.lora.targets:
        return base
    rank = step.rank or f"{module}.rank"
    a = tape.source(f"{module}.lora_A.weight", (x.shape[1], rank))
    b = tape.source(f"{module}.lora_B.weight", (rank, out_features))
    step.sources[a.name], step.sources[b.name] = a, b
    return tape.add(base, tape.matmul(tape.matmul(x, a), b))


def _norm(step: _Step, x: Tensor, name: str) -> Tensor:
    tape = step.tape
    normed = tape.multiply(x, tape.inverse_rms(x, step.spec.rms_norm_eps))
    size = x.shape[-1]
    assert isinstance(size, int)
    return tape.multiply(normed, tape.parameter(f"{name}.weight", size))


def _loss(step: _Step, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Sum over masked positions of log sum exp(logits) - logit of the next token.

    That logit is the product with one row of the head: neither the loss nor its gradient needs a one-hot matrix of
    the size of the logits.
    """
    tape, spec = step.tape, step.spec
    head = f"{EMBEDDING if spec.tied_embeddings else HEAD}.weight"
    logits = tape.linear(x, head, spec.vocab_size)
    largest = tape.largest(logits)
    total = tape.total(tape.exp(tape.subtract(logits, largest)), (1,))
    target_rows = tape.embed(tape.next_tokens(ids), head, spec.hidden_size)
    target = tape.total(tape.multiply(x, tape.reshape(target_rows, (step.rows, spec.hidden_size))), (1,))
    token_losses = tape.subtract(tape.add(tape.log(total), largest), target)
    return tape.total(tape.multiply(token_losses, mask))
