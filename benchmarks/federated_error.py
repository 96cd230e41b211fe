"""Error of the aggregated update against the true weighted mean of the devices' products, by drift and rank mix.

All devices start from one adapter and move the factors that they train by noise of ``drift`` times the factors' own
size. Ranks nest, as in a federation of phones and a mini-PC. Nothing is trained here: this is the arithmetic of
averaging alone. Errors are relative to the true change of the product in the round.

The truth of ours and of FedIT is the mean of the products B_i A_i of each rank partition over the devices that hold
it. Zero padding, SVD truncation and stacking count every device at every rank with one weight, and are held against
that mean, which is what they aim at; what it does to the ranks that few devices hold is the second table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.machine import heading
from edge_runtime.formats.codec import Codec, decode, encode
from edge_runtime.formats.layout import AdapterLayout, Module, Phase
from server.aggregation import Accumulator, refactor_for_core, stack

FEATURES, CLIENTS, SEEDS = 256, 10, 5
DRIFTS = (0.1, 0.3, 1.0)
MODULE = "m"
RANKS = {"all 8": (8,), "4 8 32": (4, 8, 32)}


@dataclass(frozen=True, slots=True)
class Case:
    """One draw: the start, and each device's rank and weight."""

    layout: AdapterLayout
    start: dict[str, np.ndarray]
    ranks: list[int]
    weights: list[int]
    drift: float
    generator: np.random.Generator


def main() -> int:
    """Print the table of errors and the table of energy by rank."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(
        heading(f"relative error of the aggregated update; {FEATURES} x {FEATURES}, {CLIENTS} devices, {SEEDS} seeds")
    )
    columns = [(mix, drift) for mix in RANKS for drift in DRIFTS]
    print("| method | " + " | ".join(f"ranks {mix}, drift {drift:g}" for mix, drift in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, method in METHODS.items():
        cells = [np.mean([method(_draw(mix, drift, seed)) for seed in range(SEEDS)]) for mix, drift in columns]
        print(f"| {name} | " + " | ".join(_shown(cell) for cell in cells) + " |")
    print("\nnorm of the mean change of lora_B in a rank partition, relative to that over its own devices; drift 1\n")
    print("| method | " + " | ".join(f"ranks {low}-{high}" for low, high in pairwise((0, *RANKS["4 8 32"]))) + " |")
    print("|---|---|---|---|")
    for name, padded in (("ours, lora_B round", False), ("zero padding, lora_B round", True)):
        kept = np.mean([_kept(_draw("4 8 32", 1.0, seed), padded) for seed in range(SEEDS)], axis=0)
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in kept) + " |")
    return 0


def _draw(mix: str, drift: float, seed: int) -> Case:
    generator = np.random.default_rng([seed, len(mix), int(drift * 100)])
    ends = RANKS[mix]
    layout = AdapterLayout("0" * 64, (Module(MODULE, FEATURES, FEATURES),), ends, float(ends[-1]))
    ranks = [ends[-1]] + [int(generator.choice(ends)) for _ in range(CLIENTS - 1)]
    weights = np.maximum(generator.dirichlet(np.full(CLIENTS, 0.5)) * 1000, 1).astype(int).tolist()
    shapes = {f"{MODULE}.lora_A": (ends[-1], FEATURES), f"{MODULE}.lora_B": (FEATURES, ends[-1])}
    start = {name: (generator.normal(size=s) / np.sqrt(FEATURES)).astype(np.float32) for name, s in shapes.items()}
    return Case(layout, start, ranks, weights, drift, generator)


def _moved(case: Case, phase: Phase, codec: Codec = Codec.FP32) -> list[np.ndarray]:
    """Each device's delta as the server decodes it; what its products are made of."""
    deltas = []
    for rank in case.ranks:
        start = case.layout.flatten(case.start, phase.groups, rank)
        size = case.drift * float(np.sqrt(np.mean(start.astype(np.float64) ** 2)))
        delta = case.generator.normal(scale=size, size=start.size).astype(np.float32)
        sizes = case.layout.segment_sizes(phase.groups, rank)
        deltas.append(decode(encode(delta, sizes, codec), sizes, codec))
    return deltas


def _devices(case: Case, phase: Phase, deltas: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each device's factors in float64, at its rank."""
    own = []
    for rank, delta in zip(case.ranks, deltas, strict=True):
        factors = {name: value.astype(np.float64) for name, value in case.layout.prefix(case.start, rank).items()}
        for name, change in case.layout.unflatten(delta, phase.groups, rank).items():
            factors[name] = factors[name] + change
        own.append(factors)
    return own


def _partition(factors: dict[str, np.ndarray], low: int, high: int) -> np.ndarray:
    lora_a, lora_b, core = (factors.get(f"{MODULE}.{name}") for name in ("lora_A", "lora_B", "core"))
    if core is None:
        return lora_b[:, low:high] @ lora_a[low:high]
    border = np.zeros_like(core[:high, :high])
    border[:] = core[:high, :high]
    border[:low, :low] = 0
    return lora_b[:, :high] @ border @ lora_a[:high]


def _true(case: Case, own: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The weighted mean of the products of each rank partition, over the devices that hold it."""
    means = []
    for low, high in pairwise((0, *case.layout.ranks)):
        there = [(one, w) for one, rank, w in zip(own, case.ranks, case.weights, strict=True) if rank >= high]
        products = [_partition(one, low, high) for one, _ in there]
        means.append(np.average(products, axis=0, weights=[weight for _, weight in there]))
    return means


def _error(got: np.ndarray, true: np.ndarray, start: np.ndarray) -> float:
    """Of the change of the product since the start of the round."""
    return float(np.linalg.norm(got - true) / np.linalg.norm(true - start))


def _start_product(case: Case) -> np.ndarray:
    factors = {name: value.astype(np.float64) for name, value in case.start.items()}
    return _partition(factors, 0, case.layout.max_rank)


def _ours(phase: Phase, codec: Codec = Codec.FP32) -> Callable[[Case], float]:
    """The server's own accumulators; ``both`` is FedIT. What the codec drops counts as error only of the codec rows."""

    def method(case: Case) -> float:
        if phase is Phase.CORE:
            case.start.update(refactor_for_core(case.start))
        exact = _moved(case, phase)
        sizes = [case.layout.segment_sizes(phase.groups, rank) for rank in case.ranks]
        accumulator = Accumulator(case.layout, phase.groups)
        for delta, size, rank, weight in zip(exact, sizes, case.ranks, case.weights, strict=True):
            accumulator.fold(decode(encode(delta, size, codec), size, codec), rank, weight)
        mean = accumulator.mean().vector
        factors = {name: value.astype(np.float64) for name, value in case.start.items()}
        places = case.layout.unflatten(np.arange(mean.size, dtype=np.float32), phase.groups, case.layout.max_rank)
        for name, where in places.items():
            factors[name] = factors[name] + mean[where.astype(int)]
        got = _partition(factors, 0, case.layout.max_rank)
        return _error(got, sum(_true(case, _devices(case, phase, exact))), _start_product(case))

    return method


def _zero_padding(case: Case) -> float:
    """HetLoRA's simplest form: both factors, small ranks padded with zeros."""
    own = _devices(case, Phase.BOTH, _moved(case, Phase.BOTH))
    rank = case.layout.max_rank
    lora_a = [np.pad(one[f"{MODULE}.lora_A"], ((0, rank - len(one[f"{MODULE}.lora_A"])), (0, 0))) for one in own]
    lora_b = [np.pad(one[f"{MODULE}.lora_B"], ((0, 0), (0, rank - one[f"{MODULE}.lora_B"].shape[1]))) for one in own]
    got = np.average(lora_b, axis=0, weights=case.weights) @ np.average(lora_a, axis=0, weights=case.weights)
    return _error(got, *_true_of_all(case, own))


def _truncation(case: Case) -> float:
    """FlexLoRA: the mean product, cut to r_max by SVD."""
    true, start = _true_of_all(case, _devices(case, Phase.BOTH, _moved(case, Phase.BOTH)))
    left, values, right = np.linalg.svd(true)
    rank = case.layout.max_rank
    return _error((left[:, :rank] * values[:rank]) @ right[:rank], true, start)


def _stacking(case: Case) -> float:
    """FLoRA: exact at the sum of the ranks, which must then be merged into the base; float32, as it is sent."""
    own = _devices(case, Phase.BOTH, _moved(case, Phase.BOTH))
    pairs = [(one[f"{MODULE}.lora_A"].astype(np.float32), one[f"{MODULE}.lora_B"].astype(np.float32)) for one in own]
    lora_a, lora_b = stack(pairs, case.weights)
    return _error(lora_b.astype(np.float64) @ lora_a, *_true_of_all(case, own))


def _true_of_all(case: Case, own: Sequence[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(mean of the devices' whole products, the same before they trained)."""
    before = [_partition(case.layout.prefix(case.start, rank), 0, rank).astype(np.float64) for rank in case.ranks]
    after = [_partition(one, 0, rank) for one, rank in zip(own, case.ranks, strict=True)]
    means = [np.average(products, axis=0, weights=case.weights) for products in (after, before)]
    return means[0], means[1]


def _kept(case: Case, padded: bool) -> list[float]:
    """Norm of the mean change of lora_B in each rank partition, relative to that over the devices that hold it."""
    deltas = _moved(case, Phase.B)
    zeros = [np.pad(delta, (0, case.layout.size(("b",), case.layout.max_rank) - delta.size)) for delta in deltas]
    accumulator = Accumulator(case.layout, ("b",))
    for delta, zero_padded, rank, weight in zip(deltas, zeros, case.ranks, case.weights, strict=True):
        accumulator.fold(zero_padded if padded else delta, case.layout.max_rank if padded else rank, weight)
    got, kept, start = accumulator.mean().vector, [], 0
    for index, size in enumerate(case.layout.segment_sizes(("b",), case.layout.max_rank)):
        there = [place for place, rank in enumerate(case.ranks) if rank >= case.layout.ranks[index]]
        parts = [deltas[place][start : start + size].astype(np.float64) for place in there]
        true = np.average(parts, axis=0, weights=[case.weights[place] for place in there])
        kept.append(float(np.linalg.norm(got[start : start + size]) / np.linalg.norm(true)))
        start += size
    return kept


METHODS: dict[str, Callable[[Case], float]] = {
    "ours, lora_A round": _ours(Phase.A),
    "ours, lora_B round": _ours(Phase.B),
    "ours, core round": _ours(Phase.CORE),
    "ours, lora_B round, int8": _ours(Phase.B, Codec.INT8),
    "ours, lora_B round, int4": _ours(Phase.B, Codec.INT4),
    "FedIT (both factors)": _ours(Phase.BOTH),
    "zero padding (both factors)": _zero_padding,
    "SVD truncation to r_max": _truncation,
    "stacking (rank grows, merged into the base)": _stacking,
}


def _shown(error: float) -> str:
    return f"{100 * error:.1f} %" if error > 5e-4 else f"{error:.0e}"


if __name__ == "__main__":
    sys.exit(main())
