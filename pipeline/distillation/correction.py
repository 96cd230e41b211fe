"""Teacher correction: a short fine-tuning of the teacher on the text that its students will see.

Whole or through an adapter. Students of a corrected teacher end better than those of the raw one
(Minitron, arXiv 2408.11796). Trained on cross entropy in the one loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.formats.errors import UserError
from pipeline.distillation.batches import Sequences
from pipeline.distillation.checkpoints import History
from pipeline.distillation.head_losses import DEFAULT_CHUNK_TOKENS
from pipeline.distillation.objectives import text_objective
from pipeline.distillation.trainer import Observer, TrainPlan, train

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """An adapter's size.

    Attributes:
        rank: 1 to 256.
        alpha: Its output is multiplied by alpha / rank; 1 or more.
        targets: Names of projections, such as ``q_proj``; not the head.
        dropout: Of the adapter's input, in [0, 1).
        seed: Of its start values.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    dropout: float = 0.0
    seed: int = 0


def correct_teacher(
    teacher: Any, sequences: Sequences, plan: TrainPlan, checkpoint: Path, *, lora: LoraSettings | None = None,
    label: str = "teacher correction", identity: str = "", observe: Observer | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Any, History]:  # fmt: skip
    """Fine-tune a teacher on text.

    Args:
        teacher: A causal transformers model on its device.
        sequences: The text; with ``counts``, only answers are learned.
        plan: A rate around a tenth of the teacher's own, a few hundred steps.
        checkpoint: A folder of this run alone.
        lora: Train an adapter and merge it in the end; None: all weights.
        label: For people.
        identity: See ``train``.
        observe: See ``train``.
        chunk_tokens: Positions whose logits exist at a time.

    Returns:
        The corrected teacher, an ordinary model again, and the history.

    Raises:
        UserError: As ``train``; or the adapter does not fit.
    """
    model = teacher if lora is None else add_lora(teacher, lora)
    if lora is None:
        model.requires_grad_(True)
    history = train(
        model, text_objective(chunk_tokens), sequences, plan, checkpoint, label, identity=f"{identity} {lora}",
        observe=observe,
    )  # fmt: skip
    return (model if lora is None else model.merge_and_unload()), history


def add_lora(model: Any, lora: LoraSettings) -> Any:
    """``model`` frozen, with a trainable PEFT adapter that changes nothing yet.

    Raises:
        UserError: PEFT refuses the settings, for example unknown targets.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            message = " ".join(str(error).split())[:200]
            raise UserError("lora", ", ".join(lora.targets), f"what PEFT takes ({message})") from error
