"""The last phase of a student: its context stretched, a few steps on long sequences, and what it then recalls."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import StageRun
from pipeline.distillation.context import LongMixture, Yarn, extend_context, require_stretchable, train_long
from pipeline.distillation.from_config import train_plan, uses_bf16
from pipeline.distillation.needles import NeedleFormat, needle_format
from pipeline.distillation.student_text import StudentText
from pipeline.evaluation.long_context import AttentionPattern, needle_recall, perplexity_by_position
from pipeline.settings_training import ContextConfig

_TOKENS_A_NEEDLE = 32  # with its question about half of them: the other half is text
_DEPTHS, _TRIALS, _SINK_TOKENS = (0.0, 0.25, 0.5, 0.75, 1.0), 8, 4


def require_context(student: Any, text: StudentText, context: ContextConfig) -> None:
    """Refuse a context that the student cannot have, before it is trained.

    Raises:
        UserError: Sequences longer than the context, rotary embeddings that cannot be stretched, or a tokenizer
            without words.
    """
    if context.changes:
        _needle_format(text)
    own = student.config.max_position_embeddings
    if context.factor > 1:
        require_stretchable(student, Yarn(context.factor, own))
    if context.steps and context.sequence_tokens > round(context.factor * own):
        raise UserError(
            "distill.context.sequence_tokens", context.sequence_tokens,
            f"at most {round(context.factor * own)}, which is factor {context.factor:g} times the {own} it starts with",
            "raise distill.context.factor",
        )  # fmt: skip


def learn_long_context(run: StageRun, student: Any, text: StudentText, held_out: NDArray[np.int32]) -> dict[str, Any]:
    """Stretch and train a student in place.

    Args:
        run: Its settings are ``distill.context``.
        student: On the device that trains it.
        text: Its tokenizer and training text.
        held_out: (S, T) tokens that nobody was trained on.

    Returns:
        History, perplexity by position and recall by depth, with full attention and with a window and sinks.

    Raises:
        UserError: As ``train_long``.
    """
    context, own = run.config.distill.context, student.config.max_position_embeddings
    form = _needle_format(text)
    if context.factor > 1:
        extend_context(student, Yarn(context.factor, own))
    history = _train(run, student, text, form) if context.steps else []
    return {"history": history, **_measured(run, student, form, held_out.ravel(), own)}


def _needle_format(text: StudentText) -> NeedleFormat:
    return needle_format(Tokenizer.from_file(str(text.tokenizer / "tokenizer.json")))


def _train(run: StageRun, student: Any, text: StudentText, form: NeedleFormat) -> Any:
    config, distill, context = run.config, run.config.distill, run.config.distill.context
    needles = max(1, context.sequence_tokens // _TOKENS_A_NEEDLE)
    mixture = LongMixture(context.sequence_tokens, context.retrieval_ratio, needles, needles)
    plan = train_plan(config, context.steps, context.batch_sequences, context.learning_rate)
    # As many tokens a pass as on short sequences: memory was made for those.
    micro_sequences = max(1, distill.micro_sequences * distill.sequence_tokens // context.sequence_tokens)
    stream = text.sequences().tokens.reshape(-1)[: context.steps * context.batch_sequences * context.sequence_tokens]
    label = f"distill {run.submodel}, long context"
    return train_long(
        student, stream, form, mixture, replace(plan, micro_sequences=micro_sequences), run.checkpoint / "long", label,
        observe=run.watch(label),
    )  # fmt: skip


def _measured(
    run: StageRun, student: Any, form: NeedleFormat, held_out: NDArray[np.int32], own_tokens: int
) -> dict[str, Any]:
    """As far as the held-out text reaches; the window is the context that the student started with."""
    config = run.config
    tokens = min(config.distill.context.sequence_tokens, len(held_out))
    rows = held_out[: len(held_out) // tokens * tokens].reshape(-1, tokens)
    figures: dict[str, Any] = {"tokens": tokens, "perplexity": {}, "recall": {}}
    for pattern in (AttentionPattern(), AttentionPattern(max(1, own_tokens - _SINK_TOKENS), _SINK_TOKENS)):
        chunk = tokens if pattern.window_tokens is None else min(tokens, 2_048)
        losses = perplexity_by_position(student, rows, pattern, chunk_tokens=chunk, bf16=uses_bf16(config))
        scores = needle_recall(
            student, form, held_out, pattern, lengths=(tokens,), depths=_DEPTHS, trials=_TRIALS, seed=config.seed,
            chunk_tokens=chunk, bf16=uses_bf16(config),
        )  # fmt: skip
        figures["perplexity"][pattern.name] = [
            {"first": each.first, "end": each.end, "perplexity": round(each.perplexity, 4)} for each in losses
        ]
        figures["recall"][pattern.name] = [asdict(score) for score in scores]
    return figures
