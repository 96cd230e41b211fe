"""A small real problem with an accuracy: 1,797 handwritten digits (scikit-learn's copy of UCI's, part of its wheel).

The frozen base is a network that was trained on upright digits. The federation's adapter teaches it digits that lie on
their side, which it mostly gets wrong. A device sees an image as a text of 64 grey levels and the digit as the token
behind them, so that data, trainer and resident of a real device are used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.layout import AdapterLayout, Factors, Module

PIXELS, DIGITS, LEVELS = 64, 10, 17
TOKENS = PIXELS + 1
TARGET = "q_proj"
MODULES = tuple(f"model.layers.{layer}.self_attn.{TARGET}" for layer in range(2))
SPEC = DecoderSpec(
    vocab_size=LEVELS + DIGITS, hidden_size=PIXELS, intermediate_size=PIXELS, num_layers=2, num_heads=4, num_kv_heads=4,
    head_dim=16, context_tokens=128, rms_norm_eps=1e-6, inv_freq=tuple(0.1**i for i in range(8)), tied_embeddings=True,
)  # fmt: skip
TEST_IMAGES = 597
Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
Base = dict[str, Floats]


def load_images(seed: int) -> tuple[Tokens, Tokens]:
    """Upright images as rows of 65 tokens, shuffled: (to train on, to test on)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = np.concatenate([digits.data, digits.target[:, None] + LEVELS], axis=1).astype(np.int32)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    return rows[TEST_IMAGES:], rows[:TEST_IMAGES]


def turn(rows: Tokens) -> Tokens:
    """The same images lying on their left side."""
    turned = np.rot90(rows[:, :PIXELS].reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, PIXELS)
    return np.concatenate([turned, rows[:, PIXELS:]], axis=1)


def deal(rows: Tokens, clients: int, seed: int, concentration: float = 1.0) -> list[Tokens]:
    """Rows for each client: an equal number, of digits in its own proportions (Dirichlet, Hsu et al. 2019)."""
    rng, labels = np.random.default_rng(seed), rows[:, PIXELS] - LEVELS
    left = [list(rng.permutation(np.flatnonzero(labels == digit))) for digit in range(DIGITS)]
    shares = rng.dirichlet(np.full(DIGITS, concentration), clients)
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for _ in range(len(rows) // clients):
        for mine, share in zip(dealt, shares, strict=True):
            wanted = np.asarray([share[digit] + 1e-9 if left[digit] else 0.0 for digit in range(DIGITS)])
            mine.append(left[int(rng.choice(DIGITS, p=wanted / wanted.sum()))].pop())
    return [rows[mine] for mine in dealt]


def write_text(rows: Tokens, path: Path) -> None:
    """Images as a device's local text: a letter a grey level, then the digit; one line an image."""
    lines = ("".join(chr(97 + token) for token in row) for row in rows)
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="ascii")


def read_letters(text: str) -> list[int]:
    """The tokens of a text that ``write_text`` wrote."""
    return [ord(letter) - 97 for letter in text]


def train_base(rows: Tokens, seed: int, steps: int = 1500) -> Base:
    """A network of two hidden layers that reads upright digits; plain Adam."""
    rng = np.random.default_rng(seed)
    shapes = {"0": (PIXELS, PIXELS), "1": (PIXELS, PIXELS), "head": (DIGITS, PIXELS)}
    base = {
        name: (rng.standard_normal(shape) * np.sqrt(2 / PIXELS)).astype(np.float32) for name, shape in shapes.items()
    }
    first, second = ({name: np.zeros_like(value) for name, value in base.items()} for _ in range(2))
    for step in range(1, steps + 1):
        _, gradients, _ = _backward(base, rows[rng.integers(0, len(rows), 64)])
        for name, gradient in gradients.items():
            first[name] += 0.1 * (gradient / 64 - first[name])
            second[name] += 0.001 * (np.square(gradient / 64) - second[name])
            moved = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
            base[name] = (base[name] - np.float32(2e-3) * moved).astype(np.float32)
    return base


class DigitsTrainer:
    """The seam of ``edge_runtime.federated.trainer`` over such a base; only the token behind the pixels counts."""

    name = "digits"
    buckets = (TOKENS,)
    batch_sequences = 1024
    targets = (TARGET,)
    max_rank = None

    def __init__(self, base: Base) -> None:
        self.base = base

    def loss_and_gradients(
        self,
        tokens: Tokens,
        loss_mask: Floats,
        factors: Mapping[str, Floats],
        scale: float,
        *,
        wanted: Collection[str] | None = None,
    ) -> tuple[float, int, dict[str, Floats]]:
        loss, gradients, _ = _backward(_adapted(self.base, factors, scale), tokens)
        found: dict[str, Floats] = {}
        for layer, module in enumerate(MODULES):
            lora_a, lora_b = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
            found[f"{module}.lora_A"] = np.float32(scale) * (lora_b.T @ gradients[str(layer)])
            found[f"{module}.lora_B"] = np.float32(scale) * (gradients[str(layer)] @ lora_a.T)
        return loss, len(tokens), {name: found[name] for name in (found if wanted is None else wanted)}

    def loss(self, tokens: Tokens, loss_mask: Floats, factors: Mapping[str, Floats], scale: float) -> tuple[float, int]:
        return _backward(_adapted(self.base, factors, scale), tokens)[0], len(tokens)

    def accuracy(self, rows: Tokens, factors: Mapping[str, Floats], scale: float) -> float:
        """Share of the rows whose digit is the likeliest."""
        logits = _backward(_adapted(self.base, factors, scale), rows)[2]
        return float((logits.argmax(axis=1) == rows[:, PIXELS] - LEVELS).mean())

    def close(self) -> None:
        """Nothing is held."""


def digits_layout(base_digest: str, ranks: tuple[int, ...], alpha: float) -> AdapterLayout:
    """As ``server.federation.read_layout`` makes it for this base."""
    return AdapterLayout(base_digest, tuple(Module(name, PIXELS, PIXELS) for name in MODULES), ranks, alpha)


def _adapted(base: Base, factors: Factors | Mapping[str, Floats], scale: float) -> Base:
    adapted = dict(base)
    for layer, module in enumerate(MODULES):
        if f"{module}.lora_A" in factors:
            product = factors[f"{module}.lora_B"] @ factors[f"{module}.lora_A"]
            adapted[str(layer)] = base[str(layer)] + np.float32(scale) * product
    return adapted


def _backward(weights: Base, rows: Tokens) -> tuple[float, Base, Floats]:
    """(summed cross-entropy in nats, its gradients by weight, logits (B, 10))."""
    pixels, labels = (rows[:, :PIXELS] / np.float32(8) - 1).astype(np.float32), rows[:, PIXELS] - LEVELS
    one = np.maximum(pixels @ weights["0"].T, 0)
    two = np.maximum(one @ weights["1"].T, 0)
    logits = two @ weights["head"].T
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    picked = (np.arange(len(rows)), labels)
    loss = float((log_sum[:, 0] - shifted[picked]).sum())
    error = np.exp(shifted - log_sum)
    error[picked] -= 1
    back_two = (error @ weights["head"]) * (two > 0)
    back_one = (back_two @ weights["1"]) * (one > 0)
    return loss, {"head": error.T @ two, "1": back_two.T @ one, "0": back_one.T @ pixels}, logits
