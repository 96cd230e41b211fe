"""What MLflow holds after a family was registered, asked through MLflow's own client."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_runtime.formats.errors import GateError, PackageError
from pipeline import tracking, tracking_ui

ROOT = Path(__file__).resolve().parents[2]
Register = Callable[..., tracking.RegisterResult]


@pytest.fixture
def packages_dir(tmp_path: Path) -> Path:
    for name in ("large", "small"):
        folder = tmp_path / "packages" / name / "onnx"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(name.encode() * 100)
        (folder.parent / "manifest.json").write_text(f'{{"name": "{name}"}}')
    return tmp_path / "packages"


@pytest.fixture
def register(packages_dir: Path, store: Path) -> Register:
    def call(family: dict[str, Any], config_hash: str = "c0ffee", **options: Any) -> tracking.RegisterResult:
        return tracking.register_family(family, packages_dir, store, config_hash=config_hash, **options)

    return call


@pytest.fixture
def family() -> dict[str, Any]:
    package = {
        "file_bytes": 2_500_000,
        "weight_bytes": 2_000_000,
        "kl_to_fp": 0.01,
        "top1_to_fp": 0.97,
        "perplexity": 21.5,
        "tokens_per_s": 640.0,
        "load_s": 0.2,
        "peak_rss_bytes": 90_000_000,
    }
    submodel = {
        "params": 3_600_000,
        "fp16_weight_bytes": 7_200_000,
        "kl_to_teacher": 0.5,
        "gate": {"passed": True, "reasons": []},
        "packages": {name: dict(package) for name in ("onnx", "tflite", "tflite_legacy")},
    }
    return {
        "submodels": {"large": copy.deepcopy(submodel), "small": copy.deepcopy(submodel)},
        "teacher": {"params": 61_000_000, "perplexity": 11.8},
        "dataset": {"documents": 5321},
        "pipeline_run": "run-1",
    }


def test_every_package_is_a_flat_run_with_the_figures_of_the_family(
    family: dict[str, Any], register: Register, client: Any
) -> None:
    family["submodels"]["small"]["packages"]["onnx"]["perplexity"] = 33.25
    family["submodels"]["small"]["packages"]["gguf"] = {"file_bytes": 9, "perplexity": None}  # not run: no run
    result = register(family)
    runs = {run.info.run_name: run for run in client.search_runs([result.experiment_id])}
    assert set(runs) == {f"{name} {c}" for name in ("large", "small") for c in ("onnx", "tflite", "tflite_legacy")}
    assert result.new_runs == 6
    run = runs["small onnx"]
    assert run.info.status == "FINISHED" and "mlflow.parentRunId" not in run.data.tags
    assert run.data.metrics == {
        "size_mb": 2.5,
        "perplexity": 33.25,
        "tokens_per_s": 640.0,
        "kl_to_fp": 0.01,
        "kl_to_teacher": 0.5,
        "top1_to_fp": 0.97,
        "system/load_s": 0.2,
        "system/peak_rss_mb": 90.0,
    }
    expected = {"pipeline_run": "run-1", "submodel": "small", "container": "onnx", "quant": "int4", "gate": "passed"}
    assert expected.items() <= run.data.tags.items()
    assert runs["small tflite_legacy"].data.tags["quant"] == "int8"
    assert run.data.params["weight_bytes"] == "2000000"
    assert run.inputs.dataset_inputs[0].dataset.profile == '{"documents": 5321}'
    assert run.outputs.model_outputs[0].model_id == runs["small tflite"].outputs.model_outputs[0].model_id


def test_registering_twice_changes_nothing(family: dict[str, Any], register: Register, client: Any) -> None:
    histories = {"small": [{"step": 1, "loss": 3.0}]}
    first, before = register(family, histories=histories), contents(client)
    second = register(family, histories=histories)
    assert (first.new_runs, second.new_runs) == (6, 0)
    assert second.versions == first.versions == {"large": 1, "small": 1}
    assert contents(client) == before


def test_other_bytes_under_the_same_configuration_are_a_new_version(
    family: dict[str, Any], register: Register, packages_dir: Path
) -> None:
    register(family)
    (packages_dir / "small" / "onnx" / "model.onnx").write_bytes(b"other")
    result = register(family)
    assert (result.new_runs, result.versions) == (3, {"large": 1, "small": 2})


def test_champion_downloads_as_the_package_that_was_registered(
    family: dict[str, Any], register: Register, client: Any, packages_dir: Path, tmp_path: Path
) -> None:
    register(family)
    version = client.get_model_version_by_alias("sevenfold-small", "champion")
    stored = Path(client.get_model_version_download_uri("sevenfold-small", version.version).removeprefix("file://"))
    original = packages_dir / "small"
    files = {p.relative_to(original): p.read_bytes() for p in original.rglob("*") if p.is_file()}
    assert files == {p.relative_to(stored): p.read_bytes() for p in stored.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("kl_to_teacher", "teacher_perplexity", "kept_share", "champion"),
    [(0.4, 11.8, 1.0, 2), (0.5, 11.8, 1.0, 1), (0.6, 11.8, 1.0, 1), (0.1, 9.9, 1.0, 1), (0.1, 11.8, 0.9, 1),
     (None, 11.8, 1.0, 1)],
    ids=["nearer takes the title", "equal does not", "farther does not", "another teacher is not compared",
         "nor are other draws", "nor is one without a divergence"],
)  # fmt: skip
def test_champion_moves_only_to_a_nearer_student_of_the_same_teacher(
    family: dict[str, Any],
    register: Register,
    client: Any,
    kl_to_teacher: float | None,
    teacher_perplexity: float,
    kept_share: float,
    champion: int,
) -> None:
    family["submodels"]["small"]["kept_share"] = 1.0
    assert register(family).champions == ("large", "small")
    family["submodels"]["small"] |= {"kl_to_teacher": kl_to_teacher, "kept_share": kept_share}
    family["teacher"]["perplexity"] = teacher_perplexity
    result = register(family, config_hash="other")
    model = client.get_registered_model("sevenfold-small")
    aliases = {alias: int(version) for alias, version in model.aliases.items()}
    assert aliases == {"champion": champion, "challenger": 2}
    assert ("small" in result.champions) == (champion == 2)


def test_a_failed_gate_registers_the_others_and_refuses_this_one(
    family: dict[str, Any], register: Register, client: Any
) -> None:
    family["submodels"]["large"]["gate"] = {"passed": False, "reasons": ["KL 0.99 is above 0.9"]}
    with pytest.raises(GateError, match=r"large: KL 0\.99 is above 0\.9"):
        register(family)
    assert [model.name for model in client.search_registered_models()] == ["sevenfold-small"]
    experiment = client.get_experiment_by_name("sevenfold").experiment_id
    assert {model.name for model in client.search_logged_models([experiment])} == {"small"}
    gates = {run.info.run_name: run.data.tags["gate"] for run in client.search_runs([experiment])}
    assert gates["large onnx"] == "failed" and gates["small onnx"] == "passed"


def test_a_missing_package_is_refused_before_anything_is_logged(
    family: dict[str, Any], register: Register, client: Any, packages_dir: Path
) -> None:
    shutil.rmtree(packages_dir / "small")
    with pytest.raises(PackageError, match=r"no package in .*small"):
        register(family)
    assert client.get_experiment_by_name("sevenfold") is None


def test_a_registration_that_was_killed_is_completed(
    family: dict[str, Any], register: Register, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("_log_dataset", "_ensure_version"):
        with monkeypatch.context() as patch:
            patch.setattr(tracking, step, killed)
            with pytest.raises(KeyboardInterrupt):
                register(family)
    result = register(family)
    runs = client.search_runs([result.experiment_id])
    assert sorted(run.info.run_name for run in runs if run.info.run_name.startswith("large")) == [
        *("large onnx", "large tflite", "large tflite_legacy"),
    ]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(client.search_logged_models([result.experiment_id])) == 2
    assert result.versions == {"large": 1, "small": 1}


def test_training_curves_live_in_an_experiment_of_their_own(
    family: dict[str, Any], register: Register, client: Any
) -> None:
    history = [{"step": step, "loss": 3.0 - step / 1000, "kl": 0.5} for step in range(0, 1500, 2)]
    result = register(family, histories={"small": history, "large": []})
    experiment = client.get_experiment_by_name("sevenfold-training")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "small" and experiment.experiment_id != result.experiment_id
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(p.step, p.value) for p in points] == [(row["step"], row["loss"]) for row in history]


def test_nothing_leaks_into_the_process_or_the_working_directory(
    family: dict[str, Any], register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    register(family)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_chart_link_opens_the_charts() -> None:
    assert tracking.chart_url("7", 5001) == "http://127.0.0.1:5001/#/experiments/7/runs?compareRunsMode=CHART"


def test_page_answers_with_the_family_and_ends_with_all_its_processes(
    family: dict[str, Any], register: Register, store: Path
) -> None:
    result, port = register(family), free_port()
    command = [sys.executable, "-m", "pipeline.tracking_ui", "--store", str(store), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as page:
        assert page.stdout is not None
        link = next(line for line in page.stdout if "compareRunsMode" in line)
        servers = psutil.Process(page.pid).children(recursive=True)
        try:
            assert tracking.chart_url(result.experiment_id, port) in link
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
                assert b"<html" in response.read().lower()
            page.send_signal(signal.SIGTERM)
            assert page.wait(30) == 0
            assert len(servers) >= 2
            assert not psutil.wait_procs(servers, timeout=10)[1]
        finally:
            for process in (page, *servers):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def test_page_of_an_empty_store_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tracking_ui.main(["--store", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "make demo" in error and error.count("\n") == 1


def test_page_on_a_taken_port_names_the_next(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert tracking_ui.main(["--store", str(store), "--port", str(port)]) == 2
    assert f"make ui PORT={port + 1}" in capsys.readouterr().err


def contents(client: Any) -> dict[str, Any]:
    """Everything that a registration can add to a store."""
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    versions = client.search_model_versions()
    return {
        "runs": sorted((run.info.run_id, str(run.data)) for run in client.search_runs(ids)),
        "models": sorted(model.model_id for model in client.search_logged_models(ids)),
        "versions": sorted((v.name, v.version, str(v.aliases), str(v.tags)) for v in versions),
    }


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
