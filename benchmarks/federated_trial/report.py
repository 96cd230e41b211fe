"""From records to tables: loss at equal rounds, and bytes until the loss of tuned FedIT is reached."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from benchmarks.federated_trial.rounds import Record

REFERENCE = "FedIT fp32"
EQUAL_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Curve:
    """The seeds' mean of one method at one learning rate.

    Attributes:
        method: Its row.
        learning_rate: Of the clients.
        seeds: How many.
        losses: Mean held-out loss after every round, the first before any.
        final_losses: Of every seed after ``EQUAL_ROUNDS`` rounds, or the last if there were fewer.
        total_bytes: Mean bytes up and down until the end of every round.
        dispersions: Mean dispersion of the updates, by round.
    """

    method: str
    learning_rate: float
    seeds: int
    losses: list[float]
    final_losses: list[float]
    total_bytes: list[float]
    dispersions: list[float]

    @property
    def final_loss(self) -> float:
        return _mean(self.final_losses)

    def rounds_to(self, target: float) -> int | None:
        """The first round after which the mean loss is at most ``target``."""
        return next((i for i, loss in enumerate(self.losses) if loss <= target), None)

    def bytes_to(self, target: float) -> float:
        rounds = self.rounds_to(target)
        return self.total_bytes[rounds - 1] if rounds else math.inf


def write_records(records: Sequence[Record], path: Path) -> None:
    """All records as JSON."""
    path.write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")


def tables(records: Sequence[Record]) -> str:
    """One Markdown table for every federation and number of local steps."""
    found: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        found[record.run.federation, record.run.local_steps].append(record)
    return "\n".join(
        f"#### {federation}, {steps} local steps\n\n{_table(curves(part))}"
        for (federation, steps), part in found.items()
    )


def curves(records: Sequence[Record]) -> list[Curve]:
    """One curve for every method and learning rate."""
    found: dict[tuple[str, float], list[Record]] = defaultdict(list)
    for record in records:
        found[record.run.method.name, record.run.learning_rate].append(record)
    made = [_curve(name, rate, alike, [r.losses for r in alike]) for (name, rate), alike in found.items()]
    for (name, rate), alike in found.items():
        for decay in alike[0].averaged:
            made.append(_curve(f"{name}, mean {decay}", rate, alike, [r.averaged[decay] for r in alike]))
    return made


def bar(found: Sequence[Curve]) -> float:
    """The final loss of FedIT in fp32 at its best learning rate; NaN when it was not run."""
    return min((c.final_loss for c in found if c.method == REFERENCE), default=math.nan)


def chosen(found: Sequence[Curve], target: float) -> list[Curve]:
    """Of every method the learning rate with the fewest bytes to the target, or else the lowest final loss."""
    best: dict[str, Curve] = {}
    for curve in found:
        kept = best.get(curve.method)
        if kept is None or _rank(curve, target) < _rank(kept, target):
            best[curve.method] = curve
    return list(best.values())


def _curve(name: str, rate: float, records: list[Record], losses: list[list[float]]) -> Curve:
    totals = [list(accumulate(up + down for up, down in zip(r.up_bytes, r.down_bytes, strict=True))) for r in records]
    return Curve(
        method=name,
        learning_rate=rate,
        seeds=len(records),
        losses=_means(losses),
        final_losses=[row[min(EQUAL_ROUNDS, len(row) - 1)] for row in losses],
        total_bytes=_means(totals),
        dispersions=_means([r.dispersions for r in records]),
    )


def _table(found: list[Curve]) -> str:
    target = bar(found)
    reference = min((c.bytes_to(target) for c in found if c.method == REFERENCE), default=math.nan)
    lines = [
        f"Bar: {target:.4f}, start: {found[0].losses[0]:.4f}. MB: both ways, whole cohort, until the mean is there.\n",
        "| method | lr | seeds | loss at 60 | +- | rounds to bar | MB to bar | fewer bytes | KB/client/round "
        "| dispersion 5, 30, 60 | other lrs: loss (rounds to bar) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in sorted(chosen(found, target), key=lambda c: _rank(c, target)):
        others = " ".join(
            f"{c.learning_rate:g}:{c.final_loss:.4f}({c.rounds_to(target) or '-'})"
            for c in found
            if c.method == curve.method and c is not curve
        )
        lines.append(_row(curve, target, reference) + f" {others} |")
    return "\n".join(lines) + "\n"


def _row(curve: Curve, target: float, reference: float) -> str:
    needed, spent = curve.rounds_to(target), curve.bytes_to(target)
    per_client = curve.total_bytes[-1] / len(curve.total_bytes) / 10 / 1e3
    spread = " ".join(f"{curve.dispersions[min(i, len(curve.dispersions)) - 1]:.2f}" for i in (5, 30, 60))
    reached = f"{needed} | {spent / 1e6:.1f} | {reference / spent:.2f}x" if needed else "- | - | -"
    return (
        f"| {curve.method} | {curve.learning_rate:g} | {curve.seeds} | {curve.final_loss:.4f} | "
        f"{_deviation(curve.final_losses):.4f} | {reached} | {per_client:.1f} | {spread} |"
    )


def _rank(curve: Curve, target: float) -> tuple[float, float]:
    return curve.bytes_to(target), curve.final_loss if math.isfinite(curve.final_loss) else math.inf


def _means(rows: list[list[float]] | list[list[int]]) -> list[float]:
    return [_mean(list(column)) for column in zip(*rows, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
