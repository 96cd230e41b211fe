"""Which weights get eight bits where not all can: those that win back most divergence a byte.

Divergences of single weights nearly add up (to second order they are quadratic in errors that are independent), and
eight bits leave about a three-hundredth of what four cost. So the divergence of each weight alone ranks them all; what
a choice is worth is then measured as a whole, on text that did not rank it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.formats.errors import ExportError, UserError
from edge_runtime.formats.int4 import QuantizedTensor
from pipeline.artifacts import StageRun
from pipeline.progress import progress
from pipeline.quantization.grid import Grid, stored_bytes
from pipeline.quantization.rounding import quantize_tensor
from pipeline.quantization.source import Checkpoint

CURVE_SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # of the bytes between four bits and eight
_FINE_BITS = 8
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Unit = tuple[str, ...]  # weights whose bits change together


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model's weights as containers hold them.

    Attributes:
        least: Codes and scales of all matrices in 4 bits, and float32 vectors.
        extra: What 8 bits add, by matrix.
        fp16: Two bytes a parameter.
    """

    least: int
    extra: Mapping[str, int]
    fp16: int

    def ratio(self, refined: Iterable[str]) -> float:
        """Bytes over those of fp16 with some matrices in 8 bits."""
        return (self.least + sum(self.extra[name] for name in refined)) / self.fp16


def grids_of(run: StageRun, source: Checkpoint) -> tuple[dict[str, Grid], dict[str, Any]]:
    """A grid for every matrix of a submodel, and ``{"sensitivity": figures}`` where the settings have it measured.

    Raises:
        UserError: Not even 4 bits everywhere keep ``quantize.weight_ratio_max``.
        ExportError: A weight cannot be quantized.
    """
    settings, containers = run.config.quantize, set(run.config.export.containers)
    grids = source.grids(Grid(settings.bits, settings.group, positive_scales="tflite" in containers))
    if not settings.sensitivity_tokens:
        return grids, {}
    import torch

    from pipeline.export.checkpoint import load_student

    sequences = np.load(run.layout.sequences(run.submodel) / "train.npy", mmap_mode="r")
    model = load_student(run.layout.student(run.submodel)).to("cuda" if torch.cuda.is_available() else "cpu")
    if source.spec.tied_embeddings:  # by equal copies, perhaps: what is stored once is measured as one
        model.lm_head.weight = model.model.embed_tokens.weight
    chosen, figures = choose_grids(
        model,
        sizes_of(source, grids),
        spread(sequences, settings.sensitivity_tokens),
        grids,
        rounding="rtn" if settings.rounding == "rtn" else "mse",
        weight_ratio_max=settings.weight_ratio_max,
        together="safetensors_linear" in containers,
        label=f"sensitivity {run.submodel}",
    )
    return chosen, {"sensitivity": figures}


def choose_grids(
    model: Any,
    sizes: Sizes,
    text: NDArray[np.int32],
    grids: Mapping[str, Grid],
    *,
    rounding: str,
    weight_ratio_max: float | None,
    together: bool,
    label: str | None = None,
) -> tuple[dict[str, Grid], dict[str, Any]]:
    """A grid for each matrix, and what was measured to choose them.

    Args:
        model: Float weights in fp32, on any device.
        sizes: Its bytes in ``grids`` and in 8 bits.
        text: (S, T) ids of training text, never held-out, S >= 2: every other sequence ranks, the others measure.
        grids: Of all matrices, in 4 bits.
        rounding: How 4-bit codes are chosen while measuring: ``rtn`` or ``mse``.
        weight_ratio_max: Bytes of all weights over those of fp16; None leaves every matrix in its grid.
        together: Projections that read the same states get the same bits, as engines that fuse them demand.
        label: Names the progress; None shows none.

    Returns:
        Grids by name, and figures for a metrics file: ``by_weight``, the KL in nats a position of the model with that
        weight alone in 4 bits; ``curve``, from all weights in 4 bits to all in 8; with a ratio ``chosen``, its point
        and the weights in 8 bits.

    Raises:
        UserError: Not even 4 bits everywhere keep the ratio.
        ExportError: A weight cannot be quantized.
    """
    from pipeline.quantization.sensitivity import divergences

    fine = _fine(grids)
    budget_bytes = _budget_bytes(sizes, weight_ratio_max)
    coarse = {name: _quantize(model, name, grids[name], rounding) for name in sizes.extra}
    refined = {name: _quantize(model, name, fine[name], "rtn") for name in sizes.extra}  # at 8 bits no search gains
    ranking, measuring = text[0::2], text[1::2]
    with progress(label, len(ranking) * len(coarse)) as report:
        alone = divergences(model, ranking, [{name: tensor} for name, tensor in coarse.items()], report)
    costs = dict(zip(coarse, alone, strict=True))
    order = upgrade_order(costs, sizes.extra, together=together)
    points = curve_points(order, sizes.extra)
    chosen = [] if budget_bytes is None else fill(order, sizes.extra, budget_bytes)
    mixtures = [coarse | {name: refined[name] for name in point} for point in (*points, chosen)]
    *curve, choice = (
        _figures(point, kl, sizes, costs)
        for point, kl in zip((*points, chosen), divergences(model, measuring, mixtures), strict=True)
    )
    figures = {
        "tokens": int(text.size),
        "by_weight": {name: float(f"{kl:.4g}") for name, kl in costs.items()},
        "curve": curve,
    }
    if budget_bytes is not None:
        figures["chosen"] = choice | {"weights": sorted(chosen)}
    return {name: (fine if name in chosen else grids)[name] for name in grids}, figures


def spread(sequences: NDArray[np.int32], tokens: int) -> NDArray[np.int32]:
    """At least so many tokens, and two sequences, evenly from all (S, T); all where there are fewer.

    Raises:
        UserError: There is one sequence only.
    """
    if len(sequences) < 2:
        raise UserError(
            "quantize.sensitivity_tokens", tokens, "0 with a single training sequence",
            "choose 0, or a larger distill.target_tokens",
        )  # fmt: skip
    count = min(len(sequences), max(2, -(-tokens // sequences.shape[1])))
    return np.ascontiguousarray(sequences[np.linspace(0, len(sequences) - 1, count).astype(np.int64)])


def sizes_of(source: Checkpoint, grids: Mapping[str, Grid]) -> Sizes:
    """Bytes of a checkpoint in ``grids``, its FFN padded to whole groups, and what 8 bits would add."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    coarse, fine = (
        {name: stored_bytes(shape, each[name]) for name, shape in shapes.items() if name in each}
        for each in (grids, _fine(grids))
    )
    vectors = sum(prod(shape) for shape in shapes.values() if len(shape) < 2)
    return Sizes(
        least=sum(coarse.values()) + 4 * vectors,
        extra={name: fine[name] - coarse[name] for name in coarse},
        fp16=2 * source.params,
    )


def upgrade_order(costs: Mapping[str, float], extra: Mapping[str, int], *, together: bool) -> list[Unit]:
    """Units by what they cost in 4 bits over the bytes that 8 bits add, the dearest first.

    Any first part of it wins back more than every other choice of as few bytes.
    """
    return sorted(
        _units(costs, together),
        key=lambda unit: (-sum(costs[name] for name in unit) / sum(extra[name] for name in unit), unit),
    )


def fill(order: Sequence[Unit], extra: Mapping[str, int], budget_bytes: int) -> list[str]:
    """Go through the units once and take each that still fits."""
    chosen: list[str] = []
    for unit in order:
        unit_bytes = sum(extra[name] for name in unit)
        if unit_bytes <= budget_bytes:
            budget_bytes -= unit_bytes
            chosen += unit
    return chosen


def curve_points(order: Sequence[Unit], extra: Mapping[str, int]) -> list[list[str]]:
    """First parts of the order, the longest within each of CURVE_SHARES of all bytes; each once."""
    taken = list(accumulate(sum(extra[name] for name in unit) for unit in order))
    counts = sorted({bisect_right(taken, share * taken[-1]) for share in CURVE_SHARES})
    return [[name for unit in order[:count] for name in unit] for count in counts]


def _fine(grids: Mapping[str, Grid]) -> dict[str, Grid]:
    return {name: replace(grid, bits=_FINE_BITS) for name, grid in grids.items()}


def _budget_bytes(sizes: Sizes, weight_ratio_max: float | None) -> int | None:
    if weight_ratio_max is None:
        return None
    budget_bytes = int(weight_ratio_max * sizes.fp16) - sizes.least
    if budget_bytes < 0:
        raise UserError(
            "quantize.weight_ratio_max", weight_ratio_max, f"at least {sizes.ratio(()):.4f}, what 4 bits take here",
            "raise it, or choose null",
        )  # fmt: skip
    return budget_bytes


def _quantize(model: Any, name: str, grid: Grid, rounding: str) -> QuantizedTensor:
    weight = model.get_parameter(name).detach().float().cpu().numpy()
    try:
        return quantize_tensor(
            weight, bits=grid.bits, group=grid.group, rounding=rounding, positive_scales=grid.positive_scales
        )
    except ValueError as error:
        raise ExportError(f"{name}: {error}; the student cannot be quantized, distil it again") from error


def _units(names: Iterable[str], together: bool) -> list[Unit]:
    """Every name alone, or those that read the same states together."""
    found: dict[str, list[str]] = {}
    for name in names:
        module, _, projection = name.removesuffix(".weight").rpartition(".")
        shared = [projections for projections in _SHARED_INPUTS if together and projection in projections]
        found.setdefault(f"{module}.{shared[0] if shared else projection}", []).append(name)
    return [tuple(unit) for unit in found.values()]


def _figures(refined: Collection[str], kl: float, sizes: Sizes, costs: Mapping[str, float]) -> dict[str, float]:
    """A point of the curve; ``expected_kl`` is the sum over the weights that stay in 4 bits."""
    return {
        "int8": len(refined),
        "weight_ratio": round(sizes.ratio(refined), 5),
        "kl": float(f"{kl:.4g}"),
        "expected_kl": float(f"{sum(cost for name, cost in costs.items() if name not in refined):.4g}"),
    }
