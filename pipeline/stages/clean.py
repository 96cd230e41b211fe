"""clean: documents in, kept texts out, with every drop counted by reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TextIO

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import StageRun, write_json
from pipeline.data.cleaning import CleaningReport, Row, clean
from pipeline.data.sources import file_documents, python_documents
from pipeline.progress import progress

LICENCES = {"python_docs": "Python Software Foundation License Version 2", "local": "the user's own data"}


def run(run: StageRun) -> None:
    """Write train.jsonl and held_out.jsonl into the output.

    Raises:
        UserError: Either side of the split is empty.
    """
    data, output = run.config.data, run.output
    documents = python_documents() if data.path is None else file_documents(data.path)
    report = CleaningReport()
    with (
        (output / "train.jsonl").open("w", encoding="utf-8") as train,
        (output / "held_out.jsonl").open("w", encoding="utf-8") as held_out,
        progress("clean", None) as show,
    ):
        rows = clean(
            documents, report,
            min_chars=data.min_chars, max_chars=data.max_chars, held_out_modulus=data.held_out_modulus,
        )  # fmt: skip
        for number, row in enumerate(rows, 1):
            _write_row(held_out if row.held_out else train, row)
            show(number, "texts")
    if not report.held_out or report.held_out == report.kept:
        raise UserError(
            "data",
            f"{report.kept} documents kept, {report.held_out} of them held out",
            "some on both sides of the split",
            "add text, or lower data.held_out_modulus",
        )
    values = asdict(report) | {"licence": LICENCES[data.source]}
    values["train_documents"], values["held_out_documents"] = report.kept - report.held_out, report.held_out
    write_json(run.layout.metrics("clean"), values)


def _write_row(file: TextIO, row: Row) -> None:
    file.write(json.dumps({"document": row.document, "kind": row.kind, "text": row.text}, ensure_ascii=False) + "\n")
