"""A quantization that was broken on purpose: its files are what their codes say, and the gate still refuses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.formats.errors import GateError
from edge_runtime.formats.int4 import QuantizedTensor, load_weights, save_weights
from pipeline.artifacts import Layout, StageRun
from pipeline.config import load_configs
from pipeline.settings import Config
from pipeline.stages import evaluate, export, package, register, report
from tests.flows.conftest import OVERRIDES
from tests.flows.stages_here import in_this_process

pytestmark = [pytest.mark.flow, pytest.mark.xdist_group("run")]
NAME = "ci_small"


@pytest.fixture(scope="module")
def config() -> Config:
    return load_configs([*OVERRIDES, f"submodel={NAME}", "export.containers=[onnx]", "export.train_buckets=[]"])[NAME]


def shuffle_scales(weights: Path) -> None:
    """The scales of one matrix's groups change places: every code stays what it was."""
    spec, tensors = load_weights(weights)
    held = dict(tensors.items())
    name = next(name for name in sorted(held) if name.endswith("layers.0.mlp.down_proj.weight"))
    old = held[name]
    assert isinstance(old, QuantizedTensor)
    scales = np.random.default_rng(0).permutation(old.scales.ravel()).reshape(old.scales.shape)
    held[name] = QuantizedTensor(old.packed, scales * np.float16(4), old.bits, old.columns)
    save_weights(weights, spec, held)


def test_a_broken_quantization_is_refused_and_is_not_registered(finished, config: Config, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "broken")
    shutil.copytree(finished.layout.root, layout.root, ignore=shutil.ignore_patterns(".cache", "checkpoints"))
    shuffle_scales(layout.weights(NAME) / "weights.safetensors")
    before = json.loads((finished.layout.evaluation(NAME) / "evaluation.json").read_text())
    assert before["gate"]["passed"]
    config = config.model_copy(update={"track": config.track.model_copy(update={"store": tmp_path / "store"})})
    config = config.model_copy(update={"family": [NAME]})
    with in_this_process():
        for stage, output in (
            (export, layout.exports(NAME)), (evaluate, layout.evaluation(NAME)), (package, layout.package(NAME)),
            (report, layout.root / "artifacts" / "report"),
        ):  # fmt: skip
            shutil.rmtree(output)
            output.mkdir()
            stage.run(StageRun(config, layout, output, tmp_path / "checkpoints" / "broken"))
        after = json.loads((layout.evaluation(NAME) / "evaluation.json").read_text())
        assert not after["gate"]["passed"]
        assert any(" keeps " in reason and reason.startswith("onnx: ") for reason in after["gate"]["reasons"])
        output = layout.root / "artifacts" / "register"
        with pytest.raises(GateError, match=NAME):
            register.run(StageRun(config, layout, output, tmp_path / "checkpoints" / "register"))
    parity = json.loads(layout.metrics("export", NAME).read_text())["onnx"]
    assert parity["rms_ratio"] <= 0.03, "the file itself is what its codes say"
    assert "failed" in (layout.reports / "index.html").read_text()


def test_the_report_shows_what_was_kept_and_answers_that_changed(finished) -> None:
    family = json.loads((finished.layout.reports / "family.json").read_text())
    page = (finished.layout.reports / "index.html").read_text()
    assert "What 4 bits keep" in page and "Answers that changed" in page
    for name, submodel in family["submodels"].items():
        tasks = submodel["recovery"]["tasks"]
        assert {"exact_match", "multiple_choice", "pairing"} <= set(tasks)
        for task in tasks.values():
            assert set(task["containers"]) == {"onnx", "tflite"} and task["accuracy_teacher"] is not None
        decided = [entry for task in tasks.values() for entry in task["containers"].values()]
        assert any(entry["verdict"] == "passed" for entry in decided)
        card = (finished.layout.package(name) / "README.md").read_text()
        assert "## What 4 bits keep" in card and "| pairing | onnx |" in card.replace("\\_", "_")


def test_a_users_tasks_are_asked_of_the_exported_file_too(finished, config: Config, tmp_path: Path) -> None:
    """Choices, words and worked answers of a file; with an answer of 5 tokens nothing is worked out, by anyone."""
    rows = [
        json.dumps({"prompt": "Question: What is", "choices": [" str", "\n\n\n"], "answer": n % 2, "document": n // 2})
        for n in range(12)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    worked = {"prompt": "One and one are", "answer": "2", "pattern": "([0-9]+)"}
    (tmp_path / "sums.jsonl").write_text(json.dumps(worked) + "\n")
    layout = Layout(tmp_path / "run")
    shutil.copytree(finished.layout.root, layout.root, ignore=shutil.ignore_patterns(".cache"))
    files = [tmp_path / "mine.jsonl", tmp_path / "sums.jsonl"]
    runtime = config.runtime.model_copy(update={"tasks": ["pairing"], "task_files": files, "answer_tokens": 5})
    config = config.model_copy(update={"runtime": runtime})
    output = tmp_path / "out"
    output.mkdir()
    with in_this_process():
        evaluate.run(StageRun(config, layout, output, tmp_path / "checkpoints"))
    tasks = json.loads((output / "evaluation.json").read_text())["recovery"]["tasks"]
    assert set(tasks) == {"pairing", "mine", "sums"} and tasks["mine"]["items"] == 12
    assert tasks["mine"]["documents"] == 6 and tasks["mine"]["accuracy_fp"] == 0.5
    assert tasks["mine"]["containers"]["onnx"]["verdict"] == "not decidable", "twelve items decide nothing"
    assert tasks["sums"]["containers"]["onnx"]["accuracy"] in (0.0, 1.0)
