"""A file's predictions against the student's before 4 bits and against the teacher's, position by position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.distillation.scoring import HeldOut, draw_divergences, log_softmax

FloatArray = NDArray[np.float32]
_CHUNK_POSITIONS = 128  # whose probabilities exist in double precision at a time


def perplexity_alone(held_out: HeldOut, logits: Iterable[FloatArray]) -> dict[str, float]:
    """``perplexity`` and ``bits_per_byte`` of (T, V) logits a sequence, one sequence held at a time."""
    losses = []
    for tokens, row in zip(held_out.tokens, logits, strict=True):
        for start in range(0, len(tokens) - 1, _CHUNK_POSITIONS):
            following = tokens[start + 1 : start + 1 + _CHUNK_POSITIONS]
            log_q = log_softmax(row[start : start + len(following)])
            losses.append(-log_q[np.arange(len(following)), following])
    perplexity = float(np.exp(np.concatenate(losses).mean()))
    return {"perplexity": round(perplexity, 4), "bits_per_byte": round(held_out.bits_per_byte(perplexity), 4)}


def quality(held_out: HeldOut, reference: Iterable[FloatArray], found: Iterable[FloatArray]) -> dict[str, float | None]:
    """Figures of (T, V) logits a sequence, one sequence of both held at a time.

    Returns:
        ``kl_to_fp``, its 99th percentile ``kl_to_fp_p99`` and ``top1_to_fp`` over all positions; ``perplexity`` with
        the standard error of its mean over sequences (delta method), ``bits_per_byte``; ``kl_to_teacher`` and
        ``top1_to_teacher``, None where ids mean something else to the teacher.
    """
    divergences, matches, losses, most_likely, to_teacher = [], [], [], [], []
    for number, (expected, logits) in enumerate(zip(reference, found, strict=True)):
        tokens = held_out.tokens[number]
        for start in range(0, len(tokens), _CHUNK_POSITIONS):
            part = slice(start, start + _CHUNK_POSITIONS)
            log_p, log_q = log_softmax(expected[part]), log_softmax(logits[part])
            divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
            matches.append(expected[part].argmax(axis=1) == logits[part].argmax(axis=1))
            most_likely.append(logits[part].argmax(axis=1))
            following = tokens[start + 1 : start + 1 + _CHUNK_POSITIONS]
            losses.append(-log_q[np.arange(len(following)), following])
            if held_out.draws is not None and held_out.log_p is not None:
                said = held_out.draws[number, part], held_out.log_p[number, part]
                to_teacher.append(draw_divergences(log_q, *said))
    shape = held_out.tokens.shape
    by_sequence = np.concatenate(losses).reshape(shape[0], shape[1] - 1).mean(axis=1)
    perplexity = float(np.exp(by_sequence.mean()))
    spread = float(by_sequence.std(ddof=1)) / shape[0] ** 0.5 if shape[0] > 1 else None
    kl, top1 = np.concatenate(divergences), held_out.top1_share(np.concatenate(most_likely).reshape(shape))
    return {
        "kl_to_fp": round(float(kl.mean()), 6),
        "kl_to_fp_p99": round(float(np.quantile(kl, 0.99)), 6),
        "top1_to_fp": round(float(np.concatenate(matches).mean()), 6),
        "perplexity": round(perplexity, 4),
        "perplexity_se": None if spread is None else round(perplexity * spread, 4),
        "bits_per_byte": round(held_out.bits_per_byte(perplexity), 4),
        "kl_to_teacher": round(float(np.concatenate(to_teacher).mean()), 6) if to_teacher else None,
        "top1_to_teacher": None if top1 is None else round(top1, 6),
    }
