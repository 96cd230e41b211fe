"""The plan of a run: every stage with its reason, and needs that follow the sizes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.formats.errors import UserError
from pipeline import artifacts, plan
from pipeline.artifacts import Layout, write_record
from pipeline.config import load_configs
from pipeline.flow import SHIP, STAGES, planned, stage_fingerprint
from pipeline.plan import estimate, print_plan, require_resources
from pipeline.settings import Config
from tests.pipeline.test_artifacts import Usage


@pytest.fixture(scope="module")
def demo() -> dict[str, Config]:
    return load_configs(["teacher=from_scratch"])


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_on_an_empty_layout_everything_runs(
    ci_configs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = list(planned(ci_configs))
    print_plan(chosen, Layout(tmp_path), with_dvc=False)
    rows = _rows(capsys.readouterr().out)
    labels = ["clean", "teacher", "targets", *(f"distill {name}" for name in ci_configs)]
    labels += [f"{stage} {name}" for name in ci_configs for stage in SHIP] + ["report", "register"]
    assert [row[0] for row in rows] == labels and len(labels) == 15
    assert all(row[1:3] == ["yes", "no finished output"] and all(row[3:]) for row in rows)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_what_is_current_is_said_to_be(
    ci_configs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, config = Layout(tmp_path), ci_configs["ci_small"]
    layout.corpus.mkdir(parents=True)
    layout.metrics("clean").parent.mkdir(parents=True)
    layout.metrics("clean").write_text("{}")
    write_record(layout, layout.corpus, stage_fingerprint(STAGES["clean"], config, layout), 1.0)
    layout.teacher.mkdir()
    layout.metrics("teacher").write_text("{}")
    write_record(layout, layout.teacher, "an earlier fingerprint", 1.0)
    print_plan([(STAGES[name], config) for name in ("clean", "teacher", "targets")], layout, with_dvc=False)
    assert [row[:3] for row in _rows(capsys.readouterr().out)] == [
        ["clean", "no", "current"],
        ["teacher", "yes", "settings, code or inputs changed"],
        ["targets", "yes", "no finished output"],
    ]


def test_dvc_is_asked_when_dvc_runs_it(
    demo: dict[str, Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "teacher": [{"changed deps": {"pipeline/data": "modified"}}],
        "ship@tiny": [{"changed outs": {"artifacts/weights/tiny": "deleted"}}],
        "clean": ["changed command"],
    }
    _answer(monkeypatch, stdout=json.dumps(changes))
    print_plan(list(planned(demo)), Layout(artifacts.PROJECT), with_dvc=True)
    rows = {row[0]: row[1:3] for row in _rows(capsys.readouterr().out)}
    assert rows["clean"] == ["yes", "changed command"] and rows["teacher"] == ["yes", "changed deps: pipeline/data"]
    assert rows["package tiny"] == ["yes", "changed outs: artifacts/weights/tiny"]
    assert rows["package base"] == rows["distill tiny"] == rows["report"] == ["no", "current"]


def test_dvc_that_does_not_answer_is_not_taken_for_no_change(
    demo: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(monkeypatch, returncode=255, stderr="ERROR: first\nERROR: unable to read: 'dvc.yaml'\n")
    with pytest.raises(UserError, match=r"^dvc status: got .*unable to read: 'dvc\.yaml'"):
        print_plan(list(planned(demo)), Layout(artifacts.PROJECT), with_dvc=True)


def test_needs_are_positive_and_what_a_machine_can_have(demo: dict[str, Config]) -> None:
    for stage, config in planned(demo):
        needs = estimate(stage, config)
        assert 0 < needs.disk_bytes < 5e9 and 0 < needs.memory_bytes < 4e9 and needs.fixed_s > 0 and needs.flops >= 0
    assert sum(estimate(stage, config).disk_bytes for stage, config in planned(demo)) < 5e9


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("teacher.num_layers=12", ["teacher", "targets", "distill", "export"]),
        ("teacher.hidden_size=512", ["teacher", "targets", "distill", "export"]),
        ("teacher.steps=9000", ["teacher"]),
        ("distill.target_tokens=4096000", ["targets"]),
        ("distill.draws=64", ["targets"]),
        ("distill.steps=4000", ["distill"]),
        ("submodel.width=0.75", ["distill", "export"]),
        ("runtime.evaluation_sequences=480", ["evaluate"]),
    ],
)
def test_needs_grow_with_the_sizes(demo: dict[str, Config], override: str, stages: list[str]) -> None:
    larger = load_configs(["submodel=small", "teacher=from_scratch", override])["small"]
    for stage in STAGES.values():
        before, after = (estimate(stage, config) for config in (demo["small"], larger))
        pairs = [(getattr(before, name), getattr(after, name)) for name in ("disk_bytes", "memory_bytes", "flops")]
        assert all(small <= large for small, large in pairs), stage.name
        if stage.name in stages:
            assert any(small < large for small, large in pairs), stage.name


@pytest.mark.parametrize(
    ("section", "key", "name"),
    [("teacher", "steps", "teacher"), ("distill", "target_tokens", "targets"), ("distill", "steps", "distill")],
)
def test_twice_the_tokens_are_twice_the_arithmetic(demo: dict[str, Config], section: str, key: str, name: str) -> None:
    config = demo["small"]
    values = getattr(config, section)
    doubled = config.model_copy(update={section: values.model_copy(update={key: 2 * getattr(values, key)})})
    before, after = (estimate(STAGES[name], each).flops for each in (config, doubled))
    assert before > 1e9 and after == pytest.approx(2 * before)


def test_the_teachers_size_is_counted_from_its_configuration(demo: dict[str, Config]) -> None:
    from pipeline.distillation.teachers import build_teacher

    teacher: Any = demo["base"].teacher
    real = sum(parameter.numel() for parameter in build_teacher(teacher, 0).parameters())
    assert abs(plan._teacher_params(demo["base"]) / real - 1) < 0.01


def test_a_checkpoint_on_disk_is_counted_by_its_files(checkpoint: Path) -> None:
    stored = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    config = load_configs(["submodel=tiny", "teacher=local", f"teacher.path={checkpoint}"])["tiny"]
    assert plan._teacher_params(config) == stored / 2
    hub = load_configs(["submodel=tiny", "teacher=hub", "teacher.name=a/b"])["tiny"]
    fp32, int4 = (estimate(STAGES["targets"], hub.model_copy(update={"teacher": hub.teacher.model_copy(
        update={"load": load})})).memory_bytes for load in ("fp32", "int4"))  # fmt: skip
    assert fp32 > 7e9 * 4 and int4 < 7e9


def test_a_correction_is_counted_by_its_tokens_and_what_learns() -> None:
    hub = load_configs(["submodel=tiny", "teacher=hub", "teacher.name=a/b", "teacher.correction_rank=8"])["tiny"]
    stage = STAGES["teacher"]

    def needs(**changes: Any) -> plan.Needs:
        return estimate(stage, hub.model_copy(update={"teacher": hub.teacher.model_copy(update=changes)}))

    none, some, twice = (needs(correction_steps=steps) for steps in (0, 100, 200))
    assert none.flops == 0 and none.disk_bytes < 1e8 and twice.flops == 2 * some.flops
    assert some.flops == 4 * 7.6e9 * 100 * 4 * hub.distill.sequence_tokens
    whole = needs(correction_steps=100, correction_rank=None)
    assert whole.flops == 1.5 * some.flops, "a frozen weight has no gradient of its own"
    assert some.disk_bytes < 7.6e9 * 2.5 < 7.6e9 * 38 == whole.disk_bytes, "bf16, and three states of 12 bytes a weight"
    assert some.memory_bytes < 7.6e9 * 4 < whole.memory_bytes


def test_a_teacher_beside_the_student_computes_too(demo: dict[str, Config]) -> None:
    config = demo["small"]
    online = config.model_copy(update={"distill": config.distill.model_copy(update={"signal": "online"})})
    stored, beside = (estimate(STAGES["distill"], each).flops for each in (config, online))
    trained = config.distill.steps * config.distill.batch_sequences * config.distill.sequence_tokens
    assert beside - stored == pytest.approx(2 * plan._teacher_params(config) * trained)


def test_a_run_that_the_disk_cannot_hold_is_refused(
    demo: dict[str, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = list(planned(demo))
    needed = int(sum(estimate(stage, config).disk_bytes for stage, config in chosen))
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _path: Usage(needed * 2, needed, needed))
    require_resources(chosen, Layout(tmp_path))
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _path: Usage(needed * 2, needed, needed - 1))
    with pytest.raises(UserError, match=r"^free disk: got "):
        require_resources(chosen, Layout(tmp_path))


def _rows(output: str) -> list[list[str]]:
    """Cells of the table's body."""
    return [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in output.splitlines() if line.startswith("│")
    ]


def _answer(monkeypatch: pytest.MonkeyPatch, *, stdout: str = "", returncode: int = 0, stderr: str = "") -> None:
    def run(command: Any, **_options: Any) -> Any:
        assert [Path(command[0]).name, *command[1:]] == ["dvc", "status", "--json"]
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    monkeypatch.setattr(plan.subprocess, "run", run)
