"""How much of a model's accuracy another one keeps, with an interval that a release can be gated on.

Recovery is the share of what the reference knows beyond chance: (accuracy - chance) / (reference's - chance). Both
answer the same items, and items of one document depend on each other, so whole documents are resampled, pairs kept
together (percentile bootstrap; B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993). Equal accuracies
may hide changed answers: lost and gained items are counted apart (A. Dutta et al., arXiv 2407.09141).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 2_000_000  # random numbers at a time


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a task counts, and how its interval is made.

    Attributes:
        items_min: Fewer paired items decide nothing.
        above_chance_min: Nor does a task of which the reference knows less than that (0..1).
        confidence: Of the two-sided interval.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    items_min: int
    above_chance_min: float
    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class Recovery:
    """A model against its reference in one task.

    Attributes:
        accuracy: Share (0..1) of items that the model has right.
        accuracy_reference: The reference's.
        recovery: See above; None when the reference knows no more than chance.
        low: Lower end of its interval, or None.
        high: Upper end.
        lost: Items that only the reference has right.
        gained: Items that only the model has right.
        mcnemar_p: Two-sided exact probability of such a difference between lost and gained if both were as likely.
        decidable: Whether the task counts.
    """

    accuracy: float
    accuracy_reference: float
    recovery: float | None
    low: float | None
    high: float | None
    lost: int
    gained: int
    mcnemar_p: float
    decidable: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def compare(
    reference: NDArray[np.bool_], found: NDArray[np.bool_], clusters: NDArray[np.int64], chance: float, bounds: Bounds
) -> Recovery:
    """Compare paired answers (N,); ``clusters`` (N,) numbers the document of each.

    Raises:
        ValueError: There are no items.
    """
    if not len(reference):
        raise ValueError("no items to compare")
    known, kept = float(reference.mean()) - chance, float(found.mean()) - chance
    low = high = None
    if known > 0:
        low, high = _interval(reference, found, clusters, chance, bounds)
    lost, gained = int((reference & ~found).sum()), int((found & ~reference).sum())
    return Recovery(
        kept + chance, known + chance, kept / known if known > 0 else None, low, high, lost, gained,
        mcnemar_p(lost, gained),
        decidable=len(reference) >= bounds.items_min and known >= bounds.above_chance_min and low is not None,
    )  # fmt: skip


def mcnemar_p(lost: int, gained: int) -> float:
    """McNemar's exact test: how likely a fair coin parts ``lost + gained`` items so unevenly, either way."""
    flips, tail, term = lost + gained, 0, 1
    for number in range(min(lost, gained) + 1):
        tail, term = tail + term, term * (flips - number) // (number + 1)
    return min(1.0, float(2 * tail / 2**flips))


def _interval(
    reference: NDArray[np.bool_], found: NDArray[np.bool_], clusters: NDArray[np.int64], chance: float, bounds: Bounds
) -> tuple[float | None, float | None]:
    count = int(clusters.max()) + 1
    sums = np.stack([np.bincount(clusters, each, count) for each in (np.ones(len(found)), reference, found)])
    rng = np.random.default_rng(bounds.seed)
    ratios: list[NDArray[np.float64]] = []
    for start in range(0, bounds.resamples, rows := max(1, _BLOCK // count)):
        drawn = rng.integers(0, count, (min(rows, bounds.resamples - start), count))
        items, known, kept = sums[:, drawn].sum(axis=2)
        # Where the reference knows nothing, nothing can have been kept: the worst that can be said.
        beyond = known - chance * items
        ratios.append(np.where(beyond > 0, (kept - chance * items) / np.where(beyond > 0, beyond, 1), -np.inf))
    tail = (1 - bounds.confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail], method="nearest").tolist()
    return (low if math.isfinite(low) else None), (high if math.isfinite(high) else None)
