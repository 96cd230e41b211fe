"""From records to tables: loss at equal rounds, and bytes until the loss of tuned FedIT is reached."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from benchmarks.federated_trial.methods import COHORT, Method, Run
from benchmarks.federated_trial.rounds import Record

REFERENCE = "FedIT fp32"
EQUAL_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Curve:
    """One method at one learning rate: a row of values a seed.

    Attributes:
        method: Its row.
        learning_rate: Of the clients.
        seeds: Which.
        losses: Held-out loss after every round, the first before any (S, rounds + 1).
        total_bytes: Bytes up and down until the end of every round (S, rounds).
        dispersions: Mean dispersion of the updates, by round.
    """

    method: str
    learning_rate: float
    seeds: list[int]
    losses: list[list[float]]
    total_bytes: list[list[int]]
    dispersions: list[float]

    @property
    def final_losses(self) -> list[float]:
        """Of every seed after ``EQUAL_ROUNDS`` rounds, or the last if there were fewer."""
        return [row[min(EQUAL_ROUNDS, len(row) - 1)] for row in self.losses]

    @property
    def final_loss(self) -> float:
        return _mean(self.final_losses)

    def rounds_to(self, target: float) -> int | None:
        """The first round after which the seeds' mean loss is at most ``target``."""
        return _first_at_most(_means(self.losses), target)

    def bytes_to(self, target: float) -> float:
        rounds = self.rounds_to(target)
        return _means(self.total_bytes)[rounds - 1] if rounds else math.inf


def write_records(records: Sequence[Record], path: Path) -> None:
    """All records as JSON."""
    path.write_text(json.dumps([asdict(record) for record in records]), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """Records of an earlier stage, which ``write_records`` wrote."""
    found = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        method = Method(**entry["run"].pop("method"))
        averaged = {int(decay): losses for decay, losses in entry.pop("averaged").items()}
        found.append(Record(Run(method=method, **entry.pop("run")), averaged=averaged, **entry))
    return found


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


def bars(found: Sequence[Curve]) -> dict[int, float]:
    """For every seed the final loss of FedIT in fp32 at the learning rate that is best over the most seeds."""
    tuned = [curve for curve in found if curve.method == REFERENCE]
    if not tuned:
        return {}
    most = max(len(curve.seeds) for curve in tuned)
    best = min((c for c in tuned if len(c.seeds) == most), key=lambda c: c.final_loss)
    return dict(zip(best.seeds, best.final_losses, strict=True))


def target_of(curve: Curve, bar: dict[int, float]) -> float:
    """What a curve has to reach: the mean of its own seeds' bars."""
    return _mean([bar.get(seed, math.nan) for seed in curve.seeds])


def chosen(found: Sequence[Curve], bar: dict[int, float]) -> list[Curve]:
    """Of every method the learning rate with the fewest bytes to the target, or else the lowest final loss.

    Rates that were run on fewer seeds than another only show that the grid's edge is no better.
    """
    best: dict[str, Curve] = {}
    for curve in found:
        kept = best.get(curve.method)
        if kept is None or _order(curve, bar) < _order(kept, bar):
            best[curve.method] = curve
    return list(best.values())


def _curve(name: str, rate: float, records: list[Record], losses: list[list[float]]) -> Curve:
    totals = [list(accumulate(up + down for up, down in zip(r.up_bytes, r.down_bytes, strict=True))) for r in records]
    seeds = [record.run.seed for record in records]
    return Curve(name, rate, seeds, losses, totals, _means([r.dispersions for r in records]))


def _table(found: list[Curve]) -> str:
    bar = bars(found)
    heading = ", ".join(f"seed {seed}: {loss:.4f}" for seed, loss in bar.items())
    lines = [
        f"Bar ({heading}), start {found[0].losses[0][0]:.4f}. MB: both ways, whole cohort, until the seeds' mean is "
        "there.\n",
        "| method | lr | seeds | loss at 60 | +- | minus bar | rounds to bar (each seed) | MB to bar | fewer bytes "
        "| KB/client/round | dispersion 5, 30, 60 | other lrs: loss minus bar (rounds to bar) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    picked = chosen(found, bar)
    reference = next((curve for curve in picked if curve.method == REFERENCE), None)
    for curve in sorted(picked, key=lambda c: _order(c, bar)[1:]):
        others = " ".join(
            f"{c.learning_rate:g}:{c.final_loss - target_of(c, bar):+.4f}({c.rounds_to(target_of(c, bar)) or '-'})"
            for c in found
            if c.method == curve.method and c is not curve
        )
        lines.append(_row(curve, bar, reference) + f" {others} |")
    return "\n".join(lines) + "\n"


def _row(curve: Curve, bar: dict[int, float], reference: Curve | None) -> str:
    target = target_of(curve, bar)
    needed, spent = curve.rounds_to(target), curve.bytes_to(target)
    per_client = _means(curve.total_bytes)[-1] / len(curve.dispersions) / COHORT / 1e3
    spread = " ".join(f"{curve.dispersions[min(i, len(curve.dispersions)) - 1]:.2f}" for i in (5, 30, 60))
    reached = "- | - | -"
    if needed and reference:
        each = [_first_at_most(row, bar[seed]) for seed, row in zip(curve.seeds, curve.losses, strict=True)]
        listed = " ".join(str(rounds or "-") for rounds in each)
        paid = reference.bytes_to(target_of(reference, bar))
        reached = f"{needed} ({listed}) | {spent / 1e6:.1f} | {paid / spent:.2f}x"
    return (
        f"| {curve.method} | {curve.learning_rate:g} | {len(curve.seeds)} | {curve.final_loss:.4f} | "
        f"{_deviation(curve.final_losses):.4f} | {curve.final_loss - target:+.4f} | {reached} | {per_client:.1f} | "
        f"{spread} |"
    )


def _order(curve: Curve, bar: dict[int, float]) -> tuple[int, float, float]:
    target = target_of(curve, bar)
    gap = curve.final_loss - target
    return -len(curve.seeds), curve.bytes_to(target), gap if math.isfinite(gap) else math.inf


def _first_at_most(losses: Sequence[float], target: float) -> int | None:
    return next((i for i, loss in enumerate(losses) if loss <= target), None)


def _means(rows: list[list[float]] | list[list[int]]) -> list[float]:
    return [_mean(list(column)) for column in zip(*rows, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
