"""``reports/index.html``: one self-contained page, no script, no address outside itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import pareto, sensitivity
from pipeline.report.table import (
    Family,
    PackageRow,
    format_count,
    format_divergence,
    format_megabytes,
    format_percent,
    format_significant,
    package_rows,
    recovery_rows,
)


def write_page(family: Family, path: Path) -> None:
    """Write the page; an older one is replaced in one step.

    Args:
        family: The content of ``reports/family.json``.
        path: Where to write.
    """
    rows = package_rows(family)
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "count": format_count,
        "divergence": format_divergence,
        "megabytes": format_megabytes,
        "percent": format_percent,
        "significant": format_significant,
    }
    html = environment.get_template("page.html.j2").render(
        containers=_containers(rows),
        dataset=family.get("dataset") or {},
        picture=_picture(family, rows),
        pipeline_run=family.get("pipeline_run", ""),
        prompt=family.get("prompt"),
        recovery=recovery_rows(family),
        rows=rows,
        sensitivity=_sensitivity(family),
        submodels=[_submodel(name, submodel) for name, submodel in family["submodels"].items()],
        summary=_summary(family, rows),
        teacher=family.get("teacher") or {},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(html, encoding="utf-8")
    os.replace(unfinished, path)


def _picture(family: Family, rows: list[PackageRow]) -> Markup | None:
    points = [
        pareto.Point(f"{row.submodel} {row.container}", row.container, row.file_bytes, row.perplexity, row.tokens_per_s)
        for row in rows
        if row.file_bytes is not None and row.perplexity is not None
    ]
    if not points:
        return None
    students = [
        pareto.Point(f"{name} fp16", "fp16", submodel["fp16_weight_bytes"], submodel["perplexity_fp"], None)
        for name, submodel in family["submodels"].items()
        if submodel.get("perplexity_fp") is not None
    ]
    teacher = (family.get("teacher") or {}).get("perplexity")
    # Safe: pareto escapes every text it draws.
    return Markup(pareto.draw([*points, *students], teacher))


def _sensitivity(family: Family) -> list[tuple[str, Markup]]:
    """The picture of each submodel whose weights were measured one by one."""
    measured = ((name, submodel.get("sensitivity")) for name, submodel in family["submodels"].items())
    return [(name, Markup(sensitivity.draw(figures))) for name, figures in measured if figures]


def _containers(rows: list[PackageRow]) -> list[tuple[str, Markup]]:
    """Each container once, with its shape for the legend."""
    return [
        (name, Markup(pareto.marker(name)))
        for name in dict.fromkeys(row.container for row in rows if row.perplexity is not None)
    ]


def _submodel(name: str, submodel: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("kl_to_teacher", "kl_to_teacher_from_scratch", "perplexity_fp")
    gate = submodel.get("gate") or {"passed": None, "reasons": []}
    return {
        "name": name,
        "params": submodel["params"],
        "fp16_weight_bytes": submodel["fp16_weight_bytes"],
        **{key: submodel.get(key) for key in keys},
        "gate": gate,
        "samples": _samples(submodel.get("samples") or {}),
        "recovery": submodel.get("recovery"),
        "flips": _flips(submodel.get("recovery") or {}),
    }


def _flips(recovery: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(containers, changed answer), with containers that changed the same one together."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for container, examples in (recovery.get("flips") or {}).items():
        for example in examples:
            found.setdefault(repr(sorted(example.items())), ([], example))[0].append(container)
    return [(", ".join(containers), example) for containers, example in found.values()]


def _samples(samples: Mapping[str, str]) -> list[tuple[str, str]]:
    """(containers, text), with containers that wrote the same text together."""
    texts = dict.fromkeys(samples.values())
    return [(", ".join(name for name, other in samples.items() if other == text), text) for text in texts]


def _summary(family: Family, rows: list[PackageRow]) -> list[tuple[str, str]]:
    """The figures that a reader takes away: (figure, what it says)."""
    rows = [row for row in rows if row.perplexity is not None]
    tiles = [(str(len(family["submodels"])), "submodels"), (str(len(rows)), "packages measured")]
    sized = [row for row in rows if row.file_bytes is not None]
    if sized:
        row = min(sized, key=lambda row: row.file_bytes or 0)
        tiles.append((f"{format_megabytes(row.file_bytes)} MB", f"smallest: {row.submodel} {row.container}"))
    timed = [row for row in rows if row.tokens_per_s is not None]
    if timed:
        row = max(timed, key=lambda row: row.tokens_per_s or 0)
        tiles.append((f"{format_significant(row.tokens_per_s)}/s", f"fastest: {row.submodel} {row.container}"))
    four_bit = [row.weight_ratio for row in rows if row.weight_ratio is not None and row.container != "tflite_legacy"]
    if four_bit:
        tiles.append((f"{format_percent(max(four_bit))} %", "of fp16, at most, for 4-bit weights"))
    return tiles
