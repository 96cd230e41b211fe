"""How much each part of a model matters, from one pass over text without gradients.

Scores follow Minitron (arXiv 2407.14679): a magnitude a position, averaged over each sequence, then over sequences by
their L2 norm (``aggregation="l2"``, the pair that Minitron found best) or by their mean (``"mean"``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from edge_runtime.formats.errors import UserError
from pipeline.distillation.checkpoint_files import require_supported

Aggregation = Literal["l2", "mean"]


@dataclass(frozen=True, slots=True)
class Importance:
    """Scores, higher is more important: hidden (H,), ffn (L, F), groups (L, G), layers (L,).

    ``energy`` (2 L + 1, H) holds the mean square of the residual stream where each norm reads it (before attention and
    before the FFN of each layer, and at the end); without it norms are cut without correction.
    """

    hidden: torch.Tensor
    ffn: torch.Tensor
    groups: torch.Tensor
    layers: torch.Tensor
    energy: torch.Tensor | None = None

    def require_fit(self, config: Any) -> None:
        """Refuse scores of another model.

        Raises:
            UserError: A shape differs from what ``config`` asks for.
        """
        layers, hidden = config.num_hidden_layers, config.hidden_size
        expected = {
            "hidden": (hidden,),
            "ffn": (layers, config.intermediate_size),
            "groups": (layers, config.num_key_value_heads),
            "layers": (layers,),
            "energy": (2 * layers + 1, hidden),
        }
        for name, shape in expected.items():
            scores = getattr(self, name)
            if scores is not None and tuple(scores.shape) != shape:
                raise UserError(f"importance.{name}", tuple(scores.shape), f"{shape}", "measure it on this model")

    def norm_scales(self, hidden: torch.Tensor, eps: float) -> list[float]:
        """Factors of the norms' weights (2 L + 1) that make up for the mean over fewer dimensions.

        A norm divides by the root mean square over the dimensions it sees. The factor is that root over the kept
        dimensions by the one over all, both from the mean energies.
        """
        if self.energy is None:
            return [1.0] * (2 * len(self.layers) + 1)
        if len(hidden) == self.energy.shape[1]:
            return [1.0] * len(self.energy)
        kept, whole = self.energy[:, hidden].mean(dim=1), self.energy.mean(dim=1)
        scales: list[float] = ((kept + eps) / (whole + eps)).sqrt().tolist()
        return scales


@torch.no_grad()
def measure_importance(model: Any, batches: Iterable[torch.Tensor], aggregation: Aggregation = "l2") -> Importance:
    """Run a model over batches (B, T) of token ids and collect the scores, in float64 where the activations are.

    Works on any device and for weights of 8 and 4 bits: only activations are read. How the sequences are split into
    batches makes no difference beyond rounding. The output head is not run.

    Args:
        model: A Llama, Mistral, Qwen2 or Qwen3 causal language model.
        batches: Token ids; some hundred sequences rank parts reliably (Minitron takes 1,024).
        aggregation: Over sequences, see above; ``layers`` and ``energy`` are means in either case.

    Raises:
        UserError: Another architecture, no sequences, or activations that are not finite.
    """
    require_supported(type(model).__name__)
    totals: dict[tuple[str, int], torch.Tensor] = {}
    handles = _watch(model, totals, aggregation)
    sequences = 0
    try:
        for tokens in batches:
            model.model(input_ids=tokens.to(model.device), use_cache=False)
            sequences += len(tokens)
    finally:
        for handle in handles:
            handle.remove()
    if not sequences:
        raise UserError("importance_sequences", 0, "at least one sequence")
    return _collect(totals, sequences, len(model.model.layers), aggregation)


def head_size(config: Any) -> int:
    """Dimensions of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _watch(model: Any, totals: dict[tuple[str, int], torch.Tensor], aggregation: Aggregation) -> list[Any]:
    """Hooks that add to ``totals``; scores of a sequence are means over its positions."""
    groups = model.config.num_key_value_heads
    power = 2 if aggregation == "l2" else 1

    def add(key: str, index: int, value: torch.Tensor) -> None:
        held = totals.get((key, index))
        totals[key, index] = value if held is None else held + value

    def score(key: str, index: int, magnitudes: Iterable[torch.Tensor]) -> None:
        add(key, index, torch.stack([rows.mean(dim=0) for rows in magnitudes]).pow(power).sum(dim=0))

    def on_down(index: int, inputs: torch.Tensor) -> None:
        score("ffn", index, (row.abs().double() for row in inputs))

    def on_output(index: int, inputs: torch.Tensor) -> None:
        score("groups", index, (row.double().unflatten(-1, (groups, -1)).norm(dim=-1) for row in inputs))

    def on_norm(index: int, entering: torch.Tensor, output: torch.Tensor) -> None:
        add("energy", index, torch.stack([row.double().square().mean(dim=0) for row in entering]).sum(dim=0))
        if index < 2 * len(layers):
            score("hidden", index, (row.abs().double() for row in output))

    def on_layer(index: int, entering: torch.Tensor, output: Any) -> None:
        leaving = output[0] if isinstance(output, tuple) else output
        cosine = torch.nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1)
        add("layers", index, (1 - cosine).mean(dim=1).sum())

    layers, handles = model.model.layers, []
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for index, norm in enumerate([*norms, model.model.norm]):
        handles.append(norm.register_forward_hook(lambda _m, a, out, i=index: on_norm(i, a[0], out)))
    for index, layer in enumerate(layers):
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _m, a, i=index: on_down(i, a[0])))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, i=index: on_output(i, a[0])))
        handles.append(layer.register_forward_hook(lambda _m, a, out, i=index: on_layer(i, a[0], out)))
    return handles


def _collect(
    totals: dict[tuple[str, int], torch.Tensor], sequences: int, layers: int, aggregation: Aggregation
) -> Importance:
    def stack(key: str, count: int) -> torch.Tensor:
        values = torch.stack([totals[key, index].cpu() for index in range(count)]) / sequences
        if not bool(torch.isfinite(values).all()):
            index = int((~torch.isfinite(values.reshape(count, -1)).all(dim=1)).nonzero()[0])
            raise UserError("importance", f"{key} {index} is not finite", "finite activations", "look at its weights")
        return values

    def finish(values: torch.Tensor) -> torch.Tensor:
        return values.sqrt() if aggregation == "l2" else values

    return Importance(
        hidden=finish(stack("hidden", 2 * layers)).sum(dim=0),
        ffn=finish(stack("ffn", layers)),
        groups=finish(stack("groups", layers)),
        layers=stack("layers", layers),
        energy=stack("energy", 2 * layers + 1),
    )
