"""Training an adapter of a submodel, in the one training loop: on text, or to win back what 4 bits cost.

A recovery adapter sits on the dequantized codes and minimises the KL to the fp student they were made from; no label
is needed, any text of the domain will do. It ships beside the codes, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.decoder import DecoderSpec
from edge_runtime.formats.errors import UserError
from edge_runtime.formats.lora import Adapter
from pipeline.distillation.batches import Sequences
from pipeline.distillation.checkpoints import History
from pipeline.distillation.correction import LoraSettings, add_lora
from pipeline.distillation.trainer import Observer, TrainPlan, train

Goal = Literal["text", "recovery"]


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """An adapter and how its training went.

    Attributes:
        figures: ``<what>_before`` and ``<what>_after`` on held-out sequences, in nats a token: ``kl`` to the fp
            student for a recovery, else ``loss``.
    """

    adapter: Adapter
    figures: dict[str, float]
    history: History


def train_recovery(
    quantized: Any, student: Any, lora: LoraSettings, train_on: Sequences, held_out: NDArray[np.int32],
    plan: TrainPlan, checkpoint: Path, *, base_digest: str, observe: Observer | None = None,
) -> TrainedAdapter:  # fmt: skip
    """Train an adapter of the dequantized codes towards the fp student.

    Args:
        quantized: From ``load_dequantized``; it is left as it was.
        student: The fp student.
        lora: The adapter's size.
        train_on: Sequences (S, T); positions that do not count are not learned.
        held_out: (S, T) for the figures.
        plan: A rate around 1e-3, a few hundred steps.
        checkpoint: A folder of this run alone.
        base_digest: Of the package's base.
        observe: See ``train``.

    Raises:
        UserError: As ``train``, or PEFT refuses the settings.
    """
    from pipeline.distillation.divergences import LossKind
    from pipeline.distillation.objectives import LossSettings, signal_objective
    from pipeline.distillation.recording import model_logits
    from pipeline.distillation.scoring import agreement
    from pipeline.distillation.signals import OnlineSource

    def kl(model: Any) -> float:
        return agreement(model_logits(student, held_out), model_logits(model, held_out)).kl

    source = OnlineSource.open(student.requires_grad_(False), plan.bf16)
    objective = signal_objective(source, LossSettings(LossKind.FORWARD_KL))
    return _train(
        quantized, objective, lora, train_on, plan, checkpoint, base_digest, observe, kl, "kl", f"recovery {lora}"
    )


def train_on_text(
    model: Any, lora: LoraSettings, train_on: Sequences, held_out: NDArray[np.int32], plan: TrainPlan,
    checkpoint: Path, *, base_digest: str, observe: Observer | None = None,
) -> TrainedAdapter:  # fmt: skip
    """Train an adapter on text, or on the answers of conversations, by cross entropy; arguments as above."""
    from pipeline.distillation.objectives import text_objective
    from pipeline.distillation.recording import model_logits
    from pipeline.distillation.scoring import perplexity

    def loss(model: Any) -> float:
        return float(np.log(perplexity(model_logits(model, held_out), held_out)))

    return _train(
        model, text_objective(), lora, train_on, plan, checkpoint, base_digest, observe, loss, "loss", f"text {lora}"
    )


def fit_adapter(adapter: Adapter, spec: DecoderSpec) -> Adapter:
    """The adapter with zeros where the package pads the intermediate size beyond the checkpoint's."""
    shapes = {module: spec.projection_shape(projection) for module, projection in spec.module_names()}
    pairs = {}
    for module, (lora_a, lora_b) in adapter.pairs.items():
        rows, columns = shapes[module]
        if lora_a.shape[1] > columns or lora_b.shape[0] > rows:
            raise UserError("adapter", f"{module}: {lora_b.shape[0]}, {lora_a.shape[1]}", f"at most {rows}, {columns}")
        pairs[module] = (
            np.pad(lora_a, ((0, 0), (0, columns - lora_a.shape[1]))),
            np.pad(lora_b, ((0, rows - lora_b.shape[0]), (0, 0))),
        )
    return Adapter(adapter.rank, adapter.scale, pairs, adapter.base_digest)


def _train(
    model: Any, objective: Any, lora: LoraSettings, train_on: Sequences, plan: TrainPlan, checkpoint: Path,
    base_digest: str, observe: Observer | None, measure: Callable[[Any], float], what: str, identity: str,
) -> TrainedAdapter:  # fmt: skip
    before = measure(model)
    wrapped = add_lora(model, lora)
    try:
        history = train(
            wrapped, objective, train_on, plan, checkpoint, f"adapter, {identity.split()[0]}",
            identity=f"{identity} {base_digest}", observe=observe,
        )  # fmt: skip
        adapter = _read_peft(wrapped, lora, base_digest)
        after = measure(wrapped)
    finally:
        wrapped.unload()
    return TrainedAdapter(adapter, {f"{what}_before": before, f"{what}_after": after}, history)


def _read_peft(wrapped: Any, lora: LoraSettings, base_digest: str) -> Adapter:
    pairs = {}
    for name, module in wrapped.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            factors = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            lora_a, lora_b = (factor.detach().float().cpu().numpy().copy() for factor in factors)
            pairs[name.removeprefix("base_model.model.")] = (lora_a, lora_b)
    return Adapter(lora.rank, lora.alpha / lora.rank, pairs, base_digest)
