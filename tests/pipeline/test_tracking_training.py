"""Training in MLflow while it goes on, asked through MLflow's own client from beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking import TRAINING_EXPERIMENT, open_client
from pipeline.tracking_training import training_runs

FIGURES = {"loss": 2.5, "tokens_per_s": 1000.0, "left_s": 12.0}


def test_a_training_is_seen_before_it_ends(store: Path) -> None:
    with training_runs(store, "abc") as watch:
        observe = watch("distill small")
        for step in (10, 20):
            observe(step, FIGURES | {"loss": 3.0 - step / 10})
        (run,) = found(store)
        assert (run.info.run_name, run.info.status) == ("distill small, live", "RUNNING")
        assert run.data.metrics == FIGURES | {"loss": 1.0}
        assert [(each.step, each.value) for each in history(store, run)] == [(10, 2.0), (20, 1.0)]
    assert [run.info.status for run in found(store)] == ["FINISHED"]


def test_one_that_was_ended_goes_on_in_its_run_and_others_have_their_own(store: Path) -> None:
    with pytest.raises(KeyboardInterrupt), training_runs(store, "abc") as watch:
        watch("distill small")(1, FIGURES)
        raise KeyboardInterrupt
    (before,) = found(store)
    assert before.info.status == "FAILED"
    with training_runs(store, "abc") as watch:
        watch("distill small")(2, FIGURES)
        watch("distill small, from scratch")(1, FIGURES)
    with training_runs(store, "other settings") as watch:
        watch("distill small")(1, FIGURES)
    runs = {run.info.run_id: run for run in found(store)}
    assert len(runs) == 3 and {run.info.status for run in runs.values()} == {"FINISHED"}
    assert [each.step for each in history(store, runs[before.info.run_id])] == [1, 2]


def test_a_store_that_takes_nothing_more_ends_no_training(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise MlflowException("database is locked")

    with training_runs(store, "abc") as watch:
        observe = watch("distill small")
        with open_client(store) as client, monkeypatch.context() as patch:
            patch.setattr(type(client), "log_batch", refuse)
            observe(1, FIGURES)
        observe(2, FIGURES)
    assert capsys.readouterr().err.count("no longer shown in MLflow") == 1
    assert found(store)[0].data.metrics == {}


def found(store: Path) -> list[Any]:
    with open_client(store) as client:
        experiment = client.get_experiment_by_name(TRAINING_EXPERIMENT)
        return list(client.search_runs([experiment.experiment_id]))


def history(store: Path, run: Any) -> list[Any]:
    with open_client(store) as client:
        return sorted(client.get_metric_history(run.info.run_id, "loss"), key=lambda each: int(each.step))
