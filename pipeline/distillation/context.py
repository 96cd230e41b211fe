"""Longer contexts: YaRN as configuration, and a short phase of training on long sequences.

A student is trained on short sequences, its rotary frequencies are then stretched, and a few steps on
sequences of the full length, half of them with something to find, teach it to use them.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Sequences
from pipeline.distillation.checkpoints import History
from pipeline.distillation.needles import NeedleFormat, add_retrieval
from pipeline.distillation.objectives import Objective, text_objective
from pipeline.distillation.trainer import Observer, TrainPlan, train

_MAX_FACTOR = 64.0


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary frequencies stretched by parts (B. Peng et al., YaRN, 2023, arXiv 2309.00071).

    Attributes:
        factor: How many times longer the context becomes, above 1 and at most 64.
        original_tokens: Context that the model was trained for.
        attention_factor: What cosines and sines are multiplied by; None: 0.1 ln(factor) + 1.
        beta_fast: Frequencies with more turns than this in the original context stay as they are.
        beta_slow: Those with fewer turns are divided by the factor; between the two it is mixed.
    """

    factor: float
    original_tokens: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def context_tokens(self) -> int:
        """Context afterwards."""
        return round(self.factor * self.original_tokens)

    def parameters(self, rope_theta: float) -> dict[str, float | int | str]:
        """``rope_parameters`` of a transformers configuration."""
        values: dict[str, float | int | str] = {
            "rope_type": "yarn", "rope_theta": rope_theta, "factor": self.factor,
            "original_max_position_embeddings": self.original_tokens,
            "beta_fast": self.beta_fast, "beta_slow": self.beta_slow,
        }  # fmt: skip
        return values if self.attention_factor is None else {**values, "attention_factor": self.attention_factor}


@dataclass(frozen=True, slots=True)
class LongMixture:
    """What the long phase learns from.

    Attributes:
        sequence_tokens: Length of its sequences, 4,096 to 32,768 in practice.
        retrieval_ratio: Share of the sequences that hold needles, 0 to 1.
        needles: Of such a sequence, 1 or more.
        questions: Of such a sequence, 0 to ``needles``.
        text_counts: Whether the text around needles is learned too.
    """

    sequence_tokens: int
    retrieval_ratio: float = 0.5
    needles: int = 128
    questions: int = 128
    text_counts: bool = True


def require_stretchable(model: Any, yarn: Yarn) -> None:
    """Refuse what ``extend_context`` would.

    Raises:
        UserError: The numbers are out of range, or the model has no plain rotary embedding to stretch.
    """
    _check(model.config, yarn)
    parameters = getattr(model.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if getattr(model.get_decoder(), "rotary_emb", None) is None or "rope_theta" not in parameters or kind != "default":
        raise UserError(
            "context", f"{type(model).__name__} with rope_type {kind}", "a model with plain rotary embeddings",
            "start from the checkpoint that was trained on short sequences",
        )  # fmt: skip


def extend_context(model: Any, yarn: Yarn) -> None:
    """Stretch a model's context in place: its configuration, which is saved with it, and its rotary embedding.

    Raises:
        UserError: As ``require_stretchable``.
    """
    require_stretchable(model, yarn)
    config, decoder = model.config, model.get_decoder()
    rotary, stretched = decoder.rotary_emb, copy.deepcopy(config)
    stretched.rope_parameters = yarn.parameters(config.rope_parameters["rope_theta"])
    stretched.max_position_embeddings = yarn.context_tokens
    fresh = type(rotary)(config=stretched).to(rotary.inv_freq.device)  # float32: bfloat16 loses far positions
    config.rope_parameters, config.max_position_embeddings = stretched.rope_parameters, yarn.context_tokens
    decoder.rotary_emb = fresh


def mix_long(text: NDArray[np.int32], form: NeedleFormat, mixture: LongMixture, seed: int) -> Sequences:
    """Long sequences from a stream of tokens (N,): text, and text with needles, in a random order.

    Raises:
        UserError: The stream does not fill one sequence, or the needles do not fit.
    """
    length = mixture.sequence_tokens
    count = len(text) // length
    if not count:
        raise UserError("text", f"{len(text)} tokens", f"at least one sequence of {length}", "add text")
    if not 0 <= mixture.retrieval_ratio <= 1:
        raise UserError("retrieval_ratio", mixture.retrieval_ratio, "0 to 1")
    rows = text[: count * length].reshape(count, length)
    chosen = np.random.default_rng(seed).permutation(count)[: round(count * mixture.retrieval_ratio)]
    tokens, counts = rows.astype(np.int32), np.ones(rows.shape, np.bool_)
    if len(chosen):
        retrieval = add_retrieval(
            form, tokens[chosen],
            needles=mixture.needles, questions=mixture.questions, text_counts=mixture.text_counts, seed=seed,
        )  # fmt: skip
        tokens[chosen], counts[chosen] = retrieval.tokens, retrieval.counts
    return Sequences(tokens, counts)


def train_long(
    model: Any,
    text: NDArray[np.int32],
    form: NeedleFormat,
    mixture: LongMixture,
    plan: TrainPlan,
    checkpoint: Path,
    label: str,
    objective: Objective | None = None,
    observe: Observer | None = None,
) -> History:
    """The long phase: the one training loop over ``mix_long``.

    Args:
        model: Its context holds the sequences (``extend_context``).
        text: Stream of tokens (N,), documents end to end.
        form: How needles are written.
        mixture: Lengths and shares.
        plan: Steps, rate and memory (``micro_sequences=1`` and ``recompute`` for 32K).
        checkpoint: A folder of this run alone.
        label: For people.
        objective: None: the text itself; or a teacher's signal, which the teacher gives for the same sequences.
        observe: See ``train``.

    Raises:
        UserError: The sequences are longer than the model's context, or as ``mix_long`` and ``train``.
    """
    longest = model.config.max_position_embeddings
    if mixture.sequence_tokens > longest:
        raise UserError(
            "sequence_tokens", mixture.sequence_tokens, f"1 to {longest}, this model's context", "extend it first"
        )
    sequences = mix_long(text, form, mixture, plan.seed)
    identity = f"long context {sorted(asdict(mixture).items())}"
    return train(
        model, objective or text_objective(), sequences, plan, checkpoint, label, identity=identity, observe=observe
    )


def rotary_tables(model: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (tokens, D) as the model multiplies with them."""
    rotary = model.get_decoder().rotary_emb
    positions = torch.arange(tokens, device=rotary.inv_freq.device)[None]
    cosines, sines = rotary(torch.zeros(1, device=positions.device), positions)
    return cosines[0], sines[0]


def _check(config: Any, yarn: Yarn) -> None:
    if not 1 < yarn.factor <= _MAX_FACTOR:
        raise UserError("context.factor", yarn.factor, f"above 1, at most {_MAX_FACTOR:.0f}")
    if not 1 <= yarn.original_tokens <= config.max_position_embeddings:
        raise UserError(
            "context.original_tokens", yarn.original_tokens, f"1 to {config.max_position_embeddings}, the model's own"
        )
    if abs(yarn.factor * yarn.original_tokens - yarn.context_tokens) > 1e-6:
        raise UserError("context.factor", yarn.factor, "one that gives a whole number of tokens")
    if yarn.attention_factor is not None and not 0 < yarn.attention_factor <= 10:
        raise UserError("context.attention_factor", yarn.attention_factor, "above 0, at most 10, or none")
    if not 0 < yarn.beta_slow < yarn.beta_fast:
        raise UserError("context.beta_fast", yarn.beta_fast, f"more than beta_slow, {yarn.beta_slow}, which is above 0")
