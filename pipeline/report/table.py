"""The family as rows: one package a row, for the terminal, the page and the cards.

``family`` is the dictionary of ``reports/family.json``. A figure that was not measured is None
there, or absent, and stays visible as a dash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

Family = Mapping[str, Any]
ABSENT = "–"


@dataclass(frozen=True, slots=True)
class PackageRow:
    """What was measured of one submodel in one container."""

    submodel: str
    container: str
    fp16_weight_bytes: int
    file_bytes: int | None
    weight_bytes: int | None
    perplexity: float | None
    kl_to_fp: float | None
    top1_to_fp: float | None
    tokens_per_s: float | None
    load_s: float | None
    peak_rss_bytes: int | None

    @property
    def weight_ratio(self) -> float | None:
        """Weight bytes over the bytes of the same weights in fp16."""
        return None if self.weight_bytes is None else self.weight_bytes / self.fp16_weight_bytes


def package_rows(family: Family) -> list[PackageRow]:
    """Return one row a (submodel, container), in the family's order."""
    return list(_rows(family))


def family_table(family: Family) -> Table:
    """Return the table that ends a run: submodels in sections, one line a container.

    It needs 92 columns; a narrower terminal folds its cells and loses nothing.
    """
    table = Table(title="The family, measured on held-out text", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    left = ("submodel", "gate", "container")
    headers = ("submodel", "params", "KL to\nteacher", "from\nscratch", "gate", "container")
    measured = ("file\nMB", "% of\nfp16", "per-\nplexity", "KL\nto fp", "top-1\n%", "tokens\n/s")
    for header in (*headers, *measured):
        table.add_column(header, justify="left" if header in left else "right", overflow="fold")
    for name, submodel in family["submodels"].items():
        rows = [row for row in _rows(family) if row.submodel == name]
        for index, row in enumerate(rows):
            head = _submodel_cells(name, submodel) if index == 0 else [""] * 5
            table.add_row(*head, *_package_cells(row), end_section=index == len(rows) - 1)
    return table


@dataclass(frozen=True, slots=True)
class RecoveryRow:
    """What one container kept of one submodel's answers in one task; shares are 0..1.

    Attributes:
        accuracy_fp: Of the student before 4 bits.
        accuracy_teacher: None where it was not asked.
        recovery: Of the accuracy beyond chance, with its interval; None where fp knows no more than chance.
        to_teacher: The same against the teacher, without the interval.
        lost: Items that only fp has right.
        gained: Items that only the container has right.
        verdict: passed, failed or not decidable.
    """

    submodel: str
    task: str
    container: str
    items: int
    documents: int
    chance: float
    accuracy_teacher: float | None
    accuracy_fp: float
    accuracy: float
    recovery: float | None
    low: float | None
    high: float | None
    to_teacher: float | None
    lost: int
    gained: int
    mcnemar_p: float
    verdict: str


def recovery_rows(family: Family) -> list[RecoveryRow]:
    """Return one row a (submodel, task, container), in the family's order; none where nothing was asked."""
    shared = ("items", "documents", "chance", "accuracy_fp", "accuracy_teacher")
    own = ("accuracy", "recovery", "low", "high", "lost", "gained", "mcnemar_p", "verdict")
    return [
        RecoveryRow(
            submodel=name, task=task, container=container, **{key: asked[key] for key in shared},
            **{key: found[key] for key in own}, to_teacher=(found.get("to_teacher") or {}).get("recovery"),
        )
        for name, submodel in family["submodels"].items()
        for task, asked in ((submodel.get("recovery") or {}).get("tasks") or {}).items()
        for container, found in asked["containers"].items()
    ]  # fmt: skip


def format_count(value: float | None) -> str:
    """1234567 becomes ``1.23 M``."""
    if value is None:
        return ABSENT
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def format_megabytes(value_bytes: float | None) -> str:
    """Bytes as a number of MB (10^6), three digits."""
    return ABSENT if value_bytes is None else format_significant(value_bytes / 1e6)


def format_percent(ratio: float | None) -> str:
    """0.2814 becomes ``28.1``."""
    return ABSENT if ratio is None else f"{100 * ratio:.1f}"


def format_significant(value: float | None) -> str:
    """Three significant digits, never in exponent form below a million."""
    if value is None:
        return ABSENT
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def format_divergence(value_nats: float | None) -> str:
    """A KL divergence in nats: four decimals, small ones matter."""
    return ABSENT if value_nats is None else f"{value_nats:.4f}"


def _rows(family: Family) -> Iterator[PackageRow]:
    measured = ("file_bytes", "weight_bytes", "perplexity", "kl_to_fp", "top1_to_fp", "tokens_per_s", "load_s")
    for name, submodel in family["submodels"].items():
        for container, package in submodel["packages"].items():
            figures = {key: package.get(key) for key in (*measured, "peak_rss_bytes")}
            yield PackageRow(name, container, submodel["fp16_weight_bytes"], **figures)


def _submodel_cells(name: str, submodel: Mapping[str, Any]) -> list[str]:
    gate = submodel.get("gate")
    verdict = ABSENT if gate is None else "ok" if gate["passed"] else "[red]FAIL[/red]"
    return [
        escape(name),
        format_count(submodel["params"]),
        format_divergence(submodel.get("kl_to_teacher")),
        format_divergence(submodel.get("kl_to_teacher_from_scratch")),
        verdict,
    ]


def _package_cells(row: PackageRow) -> list[str]:
    return [
        escape(row.container),
        format_megabytes(row.file_bytes),
        format_percent(row.weight_ratio),
        format_significant(row.perplexity),
        format_divergence(row.kl_to_fp),
        format_percent(row.top1_to_fp),
        format_significant(row.tokens_per_s),
    ]
