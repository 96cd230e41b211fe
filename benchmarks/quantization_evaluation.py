"""How far quantized weights take a model from itself: one function for every method and peer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.int4 import QuantizedTensor, dequantize

_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Figures:
    """On held-out text; standard errors are over sequences.

    Attributes:
        kl: Mean KL(fp || quantized), nats a position.
        top1: Share of positions with the same most likely token.
        perplexity: Of the quantized model.
        perplexity_fp: Of the model as it is.
        bits_a_weight: Stored bits over all parameters, fp16 where a weight is not quantized.
    """

    kl: float
    kl_error: float
    top1: float
    perplexity: float
    perplexity_error: float
    perplexity_fp: float
    bits_a_weight: float


def evaluate_weights(
    model_dir: Path,
    weights: Mapping[str, Any],
    tokens: NDArray[np.int32],
    *,
    device: str = "cpu",
    stored_bits: float | None = None,
) -> Figures:
    """Compare a checkpoint with itself under other weights.

    Args:
        model_dir: The fp checkpoint.
        weights: By parameter name: ``QuantizedTensor``, or a dequantized array or tensor; the others stay as they are.
        tokens: (S, T) held-out text in the model's ids, see ``held_out_tokens``.
        device: Computes, in float32.
        stored_bits: What a peer stores for everything; None counts ``QuantizedTensor`` as they are, and fp16.
    """
    model, quantized = (_load(model_dir, device) for _ in range(2))
    stored = _put(quantized, weights)
    span = max(1, _BATCH_TOKENS // tokens.shape[1])
    columns = [
        _compare(model, quantized, torch.from_numpy(tokens[start : start + span].astype(np.int64)).to(device))
        for start in range(0, len(tokens), span)
    ]
    kl, same, loss, loss_fp = torch.cat(columns).double().cpu().numpy().T
    perplexity = math.exp(loss.mean())
    total = sum(parameter.numel() for parameter in model.parameters())
    return Figures(
        float(kl.mean()), _error(kl), float(same.mean()),
        perplexity, perplexity * _error(loss), math.exp(loss_fp.mean()),
        (stored if stored_bits is None else stored_bits) / total,
    )  # fmt: skip


def held_out_tokens(tokenizer_dir: Path, corpus: Path, sequences: int, sequence_tokens: int = 256) -> NDArray[np.int32]:
    """Packed held-out documents of a corpus folder (held_out.jsonl), in a checkpoint's ids."""
    return _packed(tokenizer_dir, corpus / "held_out.jsonl", sequences, sequence_tokens)


def training_tokens(tokenizer_dir: Path, corpus: Path, sequences: int, sequence_tokens: int = 256) -> NDArray[np.int32]:
    """The same of its training documents (train.jsonl): what calibration may see."""
    return _packed(tokenizer_dir, corpus / "train.jsonl", sequences, sequence_tokens)


def _packed(tokenizer_dir: Path, documents: Path, sequences: int, sequence_tokens: int) -> NDArray[np.int32]:
    import json

    from tokenizers import Tokenizer

    from pipeline.data.packing import pack_rows, shuffled_rows

    ids = json.loads((tokenizer_dir / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return pack_rows(
        Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")), shuffled_rows(documents, 0), template=None,
        eos_id=ids if isinstance(ids, int) else ids[0], sequence_tokens=sequence_tokens, max_sequences=sequences,
    ).tokens  # fmt: skip


def _load(model_dir: Path, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval().to(device)


@torch.no_grad()
def _put(model: Any, weights: Mapping[str, Any]) -> float:
    """Replace weights; returns the bits that are stored then."""
    named = dict(model.named_parameters(remove_duplicate=False))
    bits = {id(parameter): 16.0 * parameter.numel() for parameter in named.values()}
    for name, value in weights.items():
        parameter = named[name]
        if isinstance(value, QuantizedTensor):
            bits[id(parameter)] = 8.0 * value.weight_bytes
            value = dequantize(value)
        found = torch.as_tensor(np.array(value) if not isinstance(value, torch.Tensor) else value)
        parameter.copy_(found[tuple(slice(size) for size in parameter.shape)])  # padding of the FFN is cut off
    return sum(bits.values())


@torch.no_grad()
def _compare(model: Any, quantized: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(B, 4): KL, same first choice, loss and loss of fp, the means of each sequence."""
    log_p, log_q = (torch.log_softmax(each(tokens, use_cache=False).logits, dim=-1) for each in (model, quantized))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean(dim=1)
    same = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).float().mean(dim=1)
    losses = [-log[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).mean(dim=1) for log in (log_q, log_p)]
    return torch.stack([kl, same, *losses], dim=1)


def _error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
