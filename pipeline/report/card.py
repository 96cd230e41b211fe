"""Model cards: markdown inside the package, covered by its signature.

A signed file must come out the same from the same inputs, so a card holds no time of day and no
timing: speed, load time and memory are in the report, beside the machine they belong to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.table import (
    ABSENT,
    Family,
    PackageRow,
    RecoveryRow,
    format_count,
    format_divergence,
    format_megabytes,
    format_percent,
    format_significant,
    package_rows,
    recovery_rows,
)


def write_card(submodel_name: str, family: Family, manifest_fields: Mapping[str, Any], path: Path) -> None:
    """Write the model card of one submodel.

    Args:
        submodel_name: A key of ``family["submodels"]``.
        family: The content of ``reports/family.json``; its timings are left out.
        manifest_fields: What the package's manifest says of the whole package (name, version, base
            digest, ...). Not the files: the card is one of them.
        path: Where to write.

    Raises:
        KeyError: No such submodel in the family.
    """
    submodel = family["submodels"][submodel_name]
    rows = [row for row in package_rows(family) if row.submodel == submodel_name]
    sections = (
        _front_matter(),
        [f"# {_plain(str(manifest_fields.get('name', submodel_name)))}", "", _summary(submodel_name, submodel)],
        _identity(manifest_fields),
        _quality(submodel, rows),
        _recovery(submodel, [row for row in recovery_rows(family) if row.submodel == submodel_name]),
        _training(family),
        _samples(family.get("prompt"), submodel.get("samples") or {}),
        _use(),
        _limits(),
    )
    text = "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    os.replace(unfinished, path)


def _front_matter() -> list[str]:
    tags = "tags: [distillation, int4, edge]"
    return ["---", "library_name: sevenfold", "pipeline_tag: text-generation", tags, "---"]


def _summary(name: str, submodel: Mapping[str, Any]) -> str:
    origin = "its teacher itself" if submodel.get("whole") else "distilled from a larger teacher"
    return (
        f"Submodel `{name}`: {format_count(submodel['params'])} parameters, {origin}, "
        "quantized after training and exported for ONNX Runtime and TFLite."
    )


def _identity(fields: Mapping[str, Any]) -> list[str]:
    return ["## Package", "", *_table(("field", "value"), ((key, _value(value)) for key, value in fields.items()))]


def _quality(submodel: Mapping[str, Any], rows: Sequence[PackageRow]) -> list[str]:
    gate = submodel.get("gate")
    lines = ["## Quality on held-out text", ""]
    lines += _table(
        ("before 4 bits", "value"),
        (
            ("perplexity", format_significant(submodel.get("perplexity_fp"))),
            ("bits a byte of the text", format_significant(submodel.get("bits_per_byte_fp"))),
            ("KL to the teacher, nats a token", format_divergence(submodel.get("kl_to_teacher"))),
            ("the same size trained from scratch", format_divergence(submodel.get("kl_to_teacher_from_scratch"))),
            ("of the teacher's draws counted, %", format_percent(submodel.get("kept_share"))),
            ("fp16 weights, MB", format_megabytes(submodel["fp16_weight_bytes"])),
        ),
    )
    lines += ["", "The files as they ship, against the same student before 4 bits:", ""]
    header = ("container", "file MB", "weights MB", "% of fp16", "perplexity", "KL", "top-1 %")
    lines += _table(header, (_figures(row) for row in rows))
    if gate is not None:
        reasons = "; ".join(_plain(reason) for reason in gate["reasons"])
        lines += ["", f"Gate: {'passed' if gate['passed'] else 'failed'}{f' ({reasons})' if reasons else ''}."]
    return lines


def _recovery(submodel: Mapping[str, Any], rows: Sequence[RecoveryRow]) -> list[str]:
    if not rows:
        return []
    recovery = submodel["recovery"]
    header = ("task", "container", "items", "chance %", "fp %", "4 bits %", "kept %", "interval", "verdict")
    interval = [f"{format_percent(row.low)} to {format_percent(row.high)}" for row in rows]
    lines = _table(
        header,
        (
            (row.task, row.container, str(row.items), format_percent(row.chance), format_percent(row.accuracy_fp),
             format_percent(row.accuracy), format_percent(row.recovery), within, row.verdict)
            for row, within in zip(rows, interval, strict=True)
        ),
    )  # fmt: skip
    confidence, needed = (format_percent(recovery[key]) for key in ("confidence", "needed"))
    note = (
        f"Kept is the accuracy beyond chance, against fp on the same items, with its {confidence} % interval over"
        f" documents. A task that counts passes when the interval begins at {needed} % or above."
    )
    return ["## What 4 bits keep", "", *lines, "", note]


def _figures(row: PackageRow) -> tuple[str, ...]:
    return (
        row.container,
        format_megabytes(row.file_bytes),
        format_megabytes(row.weight_bytes),
        format_percent(row.weight_ratio),
        format_significant(row.perplexity),
        format_divergence(row.kl_to_fp),
        format_percent(row.top1_to_fp),
    )


def _training(family: Family) -> list[str]:
    teacher = family.get("teacher") or {}
    facts = [
        ("teacher parameters", format_count(teacher.get("params"))),
        ("teacher perplexity", format_significant(teacher.get("perplexity"))),
        ("teacher bits a byte", format_significant(teacher.get("bits_per_byte"))),
        *((key.replace("_", " "), _value(value)) for key, value in (family.get("dataset") or {}).items()),
    ]
    note = "Held-out documents are chosen by a hash; nothing that was trained or calibrated in this run has seen them."
    return ["## Teacher and text", "", *_table(("fact", "value"), facts), "", note]


def _samples(prompt: str | None, samples: Mapping[str, str]) -> list[str]:
    if not samples:
        return []
    lines = ["## Samples"]
    for name, text in ([("prompt", prompt)] if prompt else []) + list(samples.items()):
        # A fence longer than any run of backticks inside cannot be closed by the text.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        lines += ["", f"{_plain(name)}:", "", f"{fence}text", text, fence]
    return lines


def _use() -> list[str]:
    return [
        "## Use",
        "",
        "This directory is the package; it is opened only if its signature is trusted. In a clone of Sevenfold:",
        "",
        "```sh",
        "pip install '.[edge]'",
        'python -m edge_runtime generate --package DIR --prompt "..." --max-tokens 64',
        "```",
    ]


def _limits() -> list[str]:
    return [
        "## Limits",
        "",
        "Perplexity and divergence are figures about the text above. Usefulness, truth and safety were not measured,",
        "nor other languages or domains. The model repeats errors and biases of its teacher and its text, and their",
        "terms of use apply to it. `tflite_legacy` holds 8-bit weights for the old TFLite runtime.",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return lines + [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows]


def _value(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) or ABSENT
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value) or ABSENT
    return str(value)


def _plain(text: str) -> str:
    """One line of markdown that shows ``text`` as it is, in a table cell too."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))
