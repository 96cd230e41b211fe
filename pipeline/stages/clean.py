"""clean: documents in, kept texts out, with every drop counted by reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain

from edge_runtime.formats.errors import UserError
from pipeline.artifacts import StageRun, located, write_atomic, write_json
from pipeline.data.cleaning import CleaningReport, CleaningSettings, clean_corpus
from pipeline.data.cleaning_journal import full_disk_refused
from pipeline.data.cleaning_report import render_page
from pipeline.data.package_docs import package_documents, package_licence
from pipeline.data.sources import Document, file_documents, python_documents
from pipeline.progress import progress
from pipeline.settings_training import DataConfig, PairsConfig

_PYTHON = "Python Software Foundation License Version 2"
LICENCES = {
    "python_docs": _PYTHON,
    "python_packages": f"{_PYTHON}, and that of each package",
    "local": "the user's own data",
}


def run(run: StageRun) -> None:
    """Write train.jsonl, held_out.jsonl and cleaning.md into the output.

    Raises:
        UserError: Either side of the split is empty, a file cannot be read, or the disk is full.
    """
    data = run.config.data
    if isinstance(data, PairsConfig):
        _clean_pairs(run, data)
        return
    with progress("clean", None) as show, full_disk_refused(run.output):
        report = clean_corpus(_documents(data), run.output, cleaning_settings(data), run.checkpoint, show)
        _require_both_sides(report)
        write_atomic(run.output / "cleaning.md", render_page(report))
        values = asdict(report) | {"licence": LICENCES[data.source]}
        if data.packages:
            values["licences"] = {name: package_licence(name) for name in data.packages}
        values["train_documents"], values["held_out_documents"] = report.kept - report.held_out, report.held_out
        write_json(run.layout.metrics("clean"), values)
    shutil.rmtree(run.checkpoint)


def cleaning_settings(data: DataConfig) -> CleaningSettings:
    """The settings of the cleaning library from those of the data group."""
    return CleaningSettings(
        min_chars=data.min_chars,
        max_chars=data.max_chars,
        held_out_modulus=data.held_out_modulus,
        rules=data.rules,
        languages=tuple(data.languages),
        pii=data.pii,
        near_duplicates=data.near_duplicates,
        decontaminate=tuple(data.decontaminate),
        workers=data.workers,
        engine=data.engine,
    )


def _clean_pairs(run: StageRun, data: PairsConfig) -> None:
    from pipeline.data.multimodal.cleaning import PairSettings, clean_pairs
    from pipeline.data.multimodal.preparing import CaptionSettings

    settings = PairSettings(
        processor=None if data.processor is None else located(data.processor),
        held_out_modulus=data.held_out_modulus,
        near_duplicate_bits=data.near_duplicate_bits,
        shard_bytes=data.shard_bytes,
        workers=data.workers,
        caption=CaptionSettings(data.min_chars, data.max_chars, data.rules, data.pii),
    )
    with progress("clean", None) as show:
        report = clean_pairs(located(data.path), run.output, settings, run.checkpoint, show)
    write_json(run.layout.metrics("clean"), asdict(report))
    shutil.rmtree(run.checkpoint)


def _documents(data: DataConfig) -> Iterator[Document]:
    if data.path is not None:
        return file_documents(data.path)
    return chain(python_documents(), package_documents(data.packages))


def _require_both_sides(report: CleaningReport) -> None:
    if not report.held_out or report.held_out == report.kept:
        raise UserError(
            "data",
            f"{report.kept} documents kept, {report.held_out} of them held out",
            "some on both sides of the split",
            "add text, or lower data.held_out_modulus",
        )
