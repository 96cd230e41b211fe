"""report: the family in one file, as a page, and the cards beside it."""

from __future__ import annotations

import shutil

from edge_runtime.formats.package import MODEL_CARD_FILE
from pipeline.artifacts import StageRun, file_digest, read_json, write_json
from pipeline.report.page import write_page
from pipeline.stages.package import family_facts


def run(run: StageRun) -> None:
    """Write family.json, index.html and cards/."""
    names = run.config.family
    family = {
        "submodels": {name: read_json(run.layout.evaluation(name) / "evaluation.json") for name in names},
        **family_facts(run),
        "pipeline_run": run.checkpoint.name.rpartition("-")[2],
    }
    reports = run.layout.reports
    write_json(reports / "family.json", family)
    write_page(family, reports / "index.html")
    (reports / "cards").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy2(run.layout.package(name) / MODEL_CARD_FILE, reports / "cards" / f"{name}.md")
    # What register depends on: DVC does not follow files that git keeps.
    write_json(run.output / "report.json", {"family": file_digest(reports / "family.json")})
