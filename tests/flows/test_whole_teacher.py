"""A teacher taken whole: its checkpoint, of which nothing is cut, in every container, gated and signed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_runtime.formats.package import open_package
from edge_runtime.formats.signing import load_trust
from pipeline.artifacts import Layout, StageRun, read_json, tree_digest
from pipeline.config import load_configs
from pipeline.distillation import teachers
from pipeline.export import checkpoint
from pipeline.flow import SHIP, STAGES, execute
from pipeline.settings import Config
from pipeline.stages import evaluate, report
from tests.flows.conftest import FinishedRun
from tests.flows.stages_here import in_this_process, layout_beside

pytestmark = [pytest.mark.flow, pytest.mark.xdist_group("run")]


@dataclass(frozen=True, slots=True)
class Whole:
    """A run whose only submodel is its teacher."""

    layout: Layout
    config: Config
    before: str


@pytest.fixture(scope="module")
def whole(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Beside the corpus and the teacher of the finished run; whoever loads a whole model fails."""
    layout = layout_beside(finished, tmp_path_factory.mktemp("whole") / "run")
    overrides = ["submodel=whole", "distill.signal=none", "quantize.qad_steps=0", "quantize.qad_scale_steps=0"]
    overrides += ["quantize.sensitivity_tokens=0", "quantize.rounding=mse", "export.train_buckets=[]"]
    overrides += ["gate.beats_from_scratch=true"]
    config = load_configs(["experiment=ci", *overrides])["whole"]
    before = tree_digest(layout.teacher)

    def refuse(*_: object) -> None:
        raise AssertionError("a whole model was loaded")

    with in_this_process(), pytest.MonkeyPatch.context() as patch:
        for owner, name in ((teachers, "load_checkpoint"), (checkpoint, "load_student"), (evaluate, "load_student")):
            patch.setattr(owner, name, refuse)
        for stage in ("targets", "distill", *SHIP):
            execute(STAGES[stage], config, layout)
        output = layout.root / "artifacts" / "report"
        output.mkdir()
        report.run(StageRun(config, layout, output, layout.root / "a-b"))
        yield Whole(layout, config, before)


def test_the_checkpoint_is_the_teachers_and_takes_no_disk(whole: Whole) -> None:
    student, teacher = whole.layout.student("whole"), whole.layout.teacher
    assert {path.name for path in student.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert (student / "model.safetensors").samefile(teacher / "model.safetensors")
    assert tree_digest(teacher) == whole.before


def test_targets_hold_text_alone(whole: Whole, finished: FinishedRun) -> None:
    names = {path.name for path in whole.layout.targets.iterdir()}
    assert names == {"train.npy", "train_counts.npy", "held_out.npy", "held_out_counts.npy", "held_out_bytes.npy"}
    for name in ("train.npy", "held_out.npy", "held_out_bytes.npy"):
        assert (whole.layout.targets / name).read_bytes() == (finished.layout.targets / name).read_bytes()


def test_every_container_is_signed_and_the_gate_has_judged(whole: Whole) -> None:
    package = open_package(whole.layout.package("whole"), load_trust())
    assert {*whole.config.export.containers} <= set(package.manifest.containers)
    found = read_json(whole.layout.evaluation("whole") / "evaluation.json")
    assert found["gate"] == {"passed": True, "reasons": []} and found["whole"]
    assert "its teacher itself" in (whole.layout.package("whole") / "README.md").read_text()


def test_figures_against_the_teacher_are_those_against_itself(whole: Whole, finished: FinishedRun) -> None:
    found = read_json(whole.layout.evaluation("whole") / "evaluation.json")
    measured = read_json(finished.layout.metrics("targets"))
    assert found["perplexity_fp"] == pytest.approx(measured["perplexity"], rel=1e-4)
    assert found["bits_per_byte_fp"] == pytest.approx(measured["bits_per_byte"], rel=1e-3)
    assert found["params"] == measured["params"] == read_json(whole.layout.metrics("targets"))["params"]
    assert found["kl_to_teacher"] == 0 and found["kl_to_teacher_from_scratch"] is None
    for container in ("onnx", "tflite", "tflite_legacy"):
        figures = found["packages"][container]
        assert 0 < figures["kl_to_teacher"] == figures["kl_to_fp"] and figures["top1_to_teacher"] > 0.5
    for task in found["recovery"]["tasks"].values():
        assert task["accuracy_teacher"] == task["accuracy_fp"]


def test_the_report_knows_the_teacher(whole: Whole) -> None:
    family = json.loads((whole.layout.reports / "family.json").read_text())
    own = family["submodels"]["whole"]
    assert family["teacher"]["perplexity"] == own["perplexity_fp"] and family["teacher"]["params"] == own["params"]
    assert "whole" in (whole.layout.reports / "index.html").read_text()


def test_codes_are_those_of_the_teachers_weights(whole: Whole) -> None:
    parity = read_json(whole.layout.metrics("export", "whole"))
    assert all(parity[name]["rms_ratio"] < 0.03 for name in ("onnx", "tflite", "tflite_legacy", "safetensors"))
    assert parity["onnx"]["exact_max_abs"] < 1e-3
    assert not (Path(whole.layout.root) / ".cache" / "answers").exists()
