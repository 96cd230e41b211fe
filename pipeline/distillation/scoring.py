"""How far one model's predictions are from another's, over held-out sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a submodel's quality is measured on, in its own ids.

    A trimmed vocabulary lacks tokens that the teacher drew. They do not count, so that its divergence is that of the
    teacher's p given a kept token; nor do positions inside a token that fell to pieces, of which the teacher said
    nothing. ``kept_share`` says what is left.

    Attributes:
        tokens: (S, T) int32.
        text_bytes: (S, T) int32: bytes of text that each token stands for.
        draws: (S, T, D), the teacher's, -1 for those that do not count; None where ids mean something else to it.
        log_p: (S, T, D) float32, their log-probabilities.
        top1: (S, T), the teacher's most likely token, or -1.
    """

    tokens: NDArray[np.int32]
    text_bytes: NDArray[np.int32]
    draws: NDArray[np.integer] | None
    log_p: FloatArray | None
    top1: NDArray[np.int32] | None

    @classmethod
    def open(cls, folder: Path, length: int | None = None) -> HeldOut:
        """Read the arrays of ``Layout.sequences``, each sequence cut to ``length`` tokens.

        Raises:
            UserError: They are not there, or an earlier version wrote them.
        """
        try:
            tokens, text_bytes = (np.load(folder / f"held_out{name}.npy")[:, :length] for name in ("", "_bytes"))
        except FileNotFoundError as error:
            raise UserError(
                "held-out text", str(error.filename), "a file that stage=targets writes", "run python -m pipeline"
            ) from None
        if not (folder / "held_out_draws.npy").is_file():
            return cls(tokens, text_bytes, None, None, None)
        said = (np.load(folder / f"held_out_{name}.npy")[:, :length] for name in ("draws", "log_p", "top1"))
        return cls(tokens, text_bytes, *said)

    def save(self, folder: Path) -> None:
        """Write what ``open`` reads."""
        named = {"": self.tokens, "_bytes": self.text_bytes, "_draws": self.draws, "_log_p": self.log_p,
                 "_top1": self.top1}  # fmt: skip
        for name, array in named.items():
            if array is not None:
                np.save(folder / f"held_out{name}.npy", array)

    @property
    def kept_share(self) -> float | None:
        """Share (0..1) of the teacher's draws that count; None without any."""
        return None if self.draws is None else float((self.draws.astype(np.int64) >= 0).mean())

    def bits_per_byte(self, perplexity: float) -> float:
        """What a byte of this text costs to predict: comparable between vocabularies, as perplexity is not."""
        predicted = self.tokens[:, 1:].size
        return predicted * math.log2(perplexity) / max(1, int(self.text_bytes[:, 1:].sum()))

    def kl(self, logits: Iterable[FloatArray]) -> float | None:
        """KL to the teacher from its draws, of (T, V) logits a sequence; None without draws."""
        return None if self.draws is None or self.log_p is None else kl_from_draws(logits, self.draws, self.log_p)

    def top1_share(self, most_likely: NDArray[np.integer]) -> float | None:
        """Share of positions (S, T) at which the teacher's most likely token is the same, of those where it is kept."""
        if self.top1 is None:
            return None
        return float((most_likely == self.top1)[self.top1 >= 0].mean())


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean KL in nats a position, and the share of positions with the same most likely token."""

    kl: float
    top1: float


def perplexity(logits: Iterable[FloatArray], sequences: NDArray[np.int32]) -> float:
    """exp of the mean loss of each token but a sequence's first; ``logits`` gives (T, V) a sequence."""
    losses = [
        -np.take_along_axis(log_softmax(row[:-1]), tokens[1:, None].astype(np.int64), axis=1)
        for row, tokens in zip(logits, sequences, strict=True)
    ]
    return float(np.exp(np.mean(np.concatenate(losses))))


def agreement(reference: Iterable[FloatArray], logits: Iterable[FloatArray]) -> Agreement:
    """KL(reference || logits) and top-1 agreement, (T, V) a sequence from both."""
    divergences, matches = [], []
    for expected, found in zip(reference, logits, strict=True):
        log_p, log_q = log_softmax(expected), log_softmax(found)
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        matches.append(expected.argmax(axis=1) == found.argmax(axis=1))
    return Agreement(float(np.mean(np.concatenate(divergences))), float(np.mean(np.concatenate(matches))))


def kl_from_draws(logits: Iterable[FloatArray], draws: NDArray[np.integer], log_p: FloatArray) -> float:
    """KL(teacher || model) estimated without the teacher: the mean of ``log p - log q`` over its draws.

    Unbiased for any number of draws, as long as all of them count. Args: (T, V) logits a sequence; draws (S, T, D),
    -1 where one does not count, and the teacher's log-probabilities of them. A position's mean is over the draws
    that count; positions without any are left out.
    """
    means = [draw_divergences(log_softmax(row), *said) for row, *said in zip(logits, draws, log_p, strict=True)]
    return float(np.mean(np.concatenate(means)))


def draw_divergences(log_q: NDArray[np.float64], draws: NDArray[np.integer], log_p: FloatArray) -> NDArray[np.float64]:
    """The mean of ``log p - log q`` over the draws (T, D) of each position that has any that count."""
    signed = draws.astype(np.int64)
    counted = signed >= 0
    ratios = log_p - np.take_along_axis(log_q, np.maximum(signed, 0), axis=1)
    number = counted.sum(axis=1)
    means: NDArray[np.float64] = (ratios * counted).sum(axis=1)[number > 0] / number[number > 0]
    return means


def log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Log-probabilities (T, V) in double precision."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
