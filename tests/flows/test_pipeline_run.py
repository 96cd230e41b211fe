"""A whole run of ``experiment=ci``: from CPython's documentation to signed packages that generate text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.artifacts import Layout, tree_digest
from pipeline.config import load_configs
from pipeline.flow import STAGES, planned
from pipeline.needs import estimate
from pipeline.plan import require_chain
from pipeline.settings import Config
from tests.flows.conftest import LEGACY_PYTHON, OVERRIDES, run_edge, run_pipeline

pytestmark = [pytest.mark.flow, pytest.mark.xdist_group("run")]
CONTAINERS = ("onnx", "tflite", "tflite_legacy")
FILES = ("gguf", "safetensors", "safetensors_linear")  # for other runtimes: packaged and compared, not measured


def test_run_prints_where_it_writes_the_table_the_texts_and_the_next_command(finished):
    layout, done = finished.layout, finished.printed
    assert f"output: runs/{layout.root.name}" in done.stderr
    for word in ("ci_small", "ci_tiny", *CONTAINERS, "python -m edge_runtime generate", "compareRunsMode=CHART"):
        assert word in done.stdout


def test_family_report_has_the_keys_that_others_rely_on(finished):
    layout = finished.layout
    family = json.loads((layout.reports / "family.json").read_text())
    assert list(family["submodels"]) == ["ci_small", "ci_tiny"]
    for submodel in family["submodels"].values():
        assert {"params", "fp16_weight_bytes", "kl_to_teacher", "packages"} <= set(submodel)
        assert submodel["fp16_weight_bytes"] == 2 * submodel["params"]
        for container in CONTAINERS:
            figures = submodel["packages"][container]
            assert {"file_bytes", "weight_bytes", "kl_to_fp", "top1_to_fp", "perplexity", "tokens_per_s", "load_s",
                    "peak_rss_bytes"} <= set(figures)  # fmt: skip
            assert figures["file_bytes"] >= figures["weight_bytes"] > submodel["params"] // 2
        for container in FILES:
            figures = submodel["packages"][container]
            assert set(figures) == set(submodel["packages"]["tflite"]) | {"exact_max_abs"}
            assert figures["file_bytes"] >= figures["weight_bytes"] > submodel["params"] // 2
            assert figures["perplexity"] is None and figures["tokens_per_s"] is None
        assert submodel["packages"]["gguf"]["weight_bytes"] == submodel["packages"]["onnx"]["weight_bytes"]


def test_packages_open_and_hold_every_container(finished):
    layout = finished.layout
    for name in ("ci_small", "ci_tiny"):
        package = open_package(layout.package(name), load_trust())
        assert set(package.available) == {*CONTAINERS, *FILES, "tflite_train", "torch"}
        assert not any(name.startswith(FILES) for name in package.manifest.metrics)
        assert package.manifest.files["torch/weights.safetensors"].sha256 == package.manifest.base_digest
        assert {"onnx/train_32.onnx", "onnx/loss_32.onnx", "tflite_train/train.tflite"} <= set(package.manifest.files)
        assert package.manifest.name == name


def test_files_agree_with_the_dequantized_model(finished):
    layout = finished.layout
    for name in ("ci_small", "ci_tiny"):
        parity = json.loads(layout.metrics("export", name).read_text())
        assert parity["onnx"]["exact_max_abs"] <= 1e-4
        for container in CONTAINERS:
            assert parity[container]["positions"] == 64
            assert parity[container]["rms_ratio"] <= 0.03
            assert parity[container]["top1"] >= 0.98
        for container in ("safetensors", "safetensors_linear"):
            assert parity[container]["max_abs"] == 0  # transformers' own load of the folder


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_runtime_generates_the_same_greedy_text(finished, container):
    layout = finished.layout
    family = json.loads((layout.reports / "family.json").read_text())
    python = LEGACY_PYTHON if container == "tflite_legacy" else Path(sys.executable)
    done = run_edge(
        python, "generate", "--package", str(layout.package("ci_small")), "--container", container,
        "--prompt", family["prompt"], "--max-tokens", "12", "--temperature", "0", "--threads", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == family["submodels"]["ci_small"]["samples"][container].rstrip("\n")


def test_second_run_skips_everything(project, finished):
    layout = finished.layout
    before = tree_digest(layout.root / "artifacts")
    done = run_pipeline(project, *OVERRIDES)
    assert done.returncode == 0, done.stderr[-2000:]
    executions = list(planned(configs()))
    assert done.stderr.count("current, skipped") == len(executions)
    assert tree_digest(layout.root / "artifacts") == before


def test_dry_run_after_a_change_names_what_runs_again(project, finished):
    done = run_pipeline(project, *OVERRIDES, "dry_run=true")
    assert done.returncode == 0 and "current" in done.stdout and "yes" not in done.stdout
    changed = run_pipeline(project, *OVERRIDES, "quantize.rounding=rtn", "dry_run=true")
    assert changed.returncode == 0 and "no finished output" in changed.stdout  # other overrides, another folder


def test_the_plan_said_how_large_everything_would_be(finished):
    """Within 15 %; targets within 25 %, as the number of distinct draws is the teacher's to decide."""
    chosen = configs()
    family = require_chain(chosen)
    for stage, config in planned(chosen):
        if stage.name in ("evaluate", "report", "register"):  # a few figures, and a copy in MLflow's store
            continue
        output = stage.output(finished.layout, config.submodel.name)
        real = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        tolerance = 0.25 if stage.name == "targets" else 0.15
        planned_bytes = estimate(stage, config, family, bf16=True).disk_bytes
        assert planned_bytes == pytest.approx(real, rel=tolerance), f"{stage.name} {config.submodel.name}"


@pytest.mark.parametrize("name", [name for name in STAGES if name != "register"])
def test_killed_in_any_stage_a_run_resumes_to_the_same_bytes(project, finished, name):
    """kill -9 while the stage works; the same command then ends with what the undisturbed run made."""
    layout = finished.layout
    stage = STAGES[name]
    outputs = {stage.output(layout, config.submodel.name) for config in configs().values()}
    undisturbed = {output: contents(output) for output in outputs}
    for output in outputs:
        shutil.rmtree(output)
    kill_in(project, stage, layout)
    done = run_pipeline(project, *OVERRIDES, f"stage={name}")
    assert done.returncode == 0, done.stderr[-3000:]
    for output in outputs:
        assert contents(output) == undisturbed[output], f"{output.name} differs after kill -9 in {name}"
    assert not list((layout.root / ".cache" / "checkpoints").glob(f"{name}-*")), "a finished stage keeps no checkpoint"


def configs() -> dict[str, Config]:
    return load_configs(list(OVERRIDES))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a stage's output, measured times and digests of them left out."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "report.json"):
        raw = path.read_bytes()
        if path.name == "evaluation.json":
            evaluation = json.loads(raw)
            for figures in evaluation["packages"].values():
                for measured in ("tokens_per_s", "prefill_tokens_per_s", "load_s", "peak_rss_bytes"):
                    del figures[measured]
            raw = json.dumps(evaluation).encode()
        files[path.relative_to(folder).as_posix()] = raw
    assert files or folder.name == "report"
    return files


def kill_in(project: Path, stage, layout: Layout) -> None:
    """Start the stage and kill it -9 once it has begun to write (and, where it keeps checkpoints, has one)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *OVERRIDES, f"stage={stage.name}"], cwd=project, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(project)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    output = stage.output(layout, "ci_small")
    partial = output.with_name(output.name + ".partial")
    checkpoints = layout.root / ".cache" / "checkpoints"
    keeps_checkpoints = stage.name in ("teacher", "distill", "targets")
    try:
        while process.poll() is None:
            if partial.exists() and (not keeps_checkpoints or any(checkpoints.glob(f"{stage.name}-*/**/*.*"))):
                break
            os.sched_yield()
        assert process.poll() is None, f"{stage.name} ended before it could be killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not output.exists()


def test_held_out_documents_train_nothing(finished):
    layout = finished.layout
    texts = {side: read_rows(layout.corpus / f"{side}.jsonl") for side in ("train", "held_out")}
    assert not {row["document"] for row in texts["train"]} & {row["document"] for row in texts["held_out"]}
    train, held_out = (np.load(layout.targets / f"{side}.npy") for side in ("train", "held_out"))
    assert not {row.tobytes() for row in train} & {row.tobytes() for row in held_out}


def test_own_checkpoint_and_own_text_make_a_family(project, finished, tmp_path):
    """The command that the README gives a user: teacher=local, data=local."""
    text = tmp_path / "notes.jsonl"
    rows = read_rows(finished.layout.corpus / "train.jsonl")[:400]
    text.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows), encoding="utf-8")
    done = run_pipeline(
        project, *OVERRIDES, "teacher=local", f"teacher.path={finished.layout.teacher}", "data=local",
        f"data.path={text}", "submodel=ci_tiny", "export.containers=[onnx]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    root = project / done.stderr.split("output: ")[1].split()[0]
    family = json.loads((root / "reports" / "family.json").read_text())
    assert family["dataset"]["documents"] == 400 and family["dataset"]["source"] == "local"
    assert family["teacher"]["params"] == json.loads(finished.layout.metrics("targets").read_text())["params"]
    assert set(family["submodels"]["ci_tiny"]["packages"]) == {"onnx"}


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
