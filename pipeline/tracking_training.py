"""Training in MLflow while it goes on: a run for each, in the experiment that later holds its history.

What is seen there is for people: nothing that a result depends on, and a store that cannot be written ends no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.progress import CONSOLE
from pipeline.tracking import TRAINING_EXPERIMENT, ensure_experiment, log_figures, open_client

Observer = Callable[[int, Mapping[str, float]], None]


@contextmanager
def training_runs(store: Path, key: str) -> Iterator[Callable[[str], Observer]]:
    """Yield what opens a run for a training and gives its observer; at the end of the block all runs are ended.

    Args:
        store: Directory of ``mlflow.db`` and ``mlruns/``.
        key: Of everything the trainings depend on: one that was killed and goes on stays in its run.
    """
    runs: dict[str, str] = {}
    with open_client(store) as client:
        experiment_id = ensure_experiment(client, TRAINING_EXPERIMENT, store)

        def watch(label: str) -> Observer:
            runs[label] = _open_run(client, experiment_id, label, f"{key} {label}")
            return _observer(client, runs[label], label)

        status = "FAILED"
        try:
            yield watch
            status = "FINISHED"
        finally:
            for run_id in runs.values():
                client.set_terminated(run_id, status)


def _open_run(client: Any, experiment_id: str, label: str, key: str) -> str:
    for run in client.search_runs([experiment_id], filter_string=f"tags.key = '{key}'"):
        client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)
    return str(client.create_run(experiment_id, run_name=f"{label}, live", tags={"key": key}).info.run_id)


def _observer(client: Any, run_id: str, label: str) -> Observer:
    faults: list[str] = []

    def observe(step: int, figures: Mapping[str, float]) -> None:
        if not faults and (fault := log_figures(client, run_id, figures, step)) is not None:
            faults.append(fault)
            CONSOLE.print(f"{label}: no longer shown in MLflow ({fault})")

    return observe
