"""register: the family's runs, packages and champions in MLflow; refused where the gate failed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.artifacts import PROJECT, StageRun, read_json, write_json


def run(run: StageRun) -> None:
    """Log what is not logged yet; register what passed its gate.

    Raises:
        GateError: A submodel failed its gate; the others are registered.
    """
    from pipeline.tracking import register_family

    family = read_json(run.layout.reports / "family.json")
    result = register_family(
        family,
        run.layout.root / "artifacts" / "packages",
        PROJECT / run.config.track.store,
        config_hash=family["pipeline_run"],
        histories={name: _history(run, name) for name in family["submodels"]},
        port=run.config.track.port,
    )
    write_json(run.output / "register.json", asdict(result))


def _history(run: StageRun, submodel: str) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = read_json(run.layout.metrics("distill", submodel))["history"]
    return history
