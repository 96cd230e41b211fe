"""The plan of a run: every stage with its reason, and needs that follow the sizes."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.formats.errors import UserError
from pipeline import artifacts, plan
from pipeline.artifacts import Layout, write_record
from pipeline.config import load_configs
from pipeline.devices import MEASURED_STUDENT, Machine, look_at_machine, seconds
from pipeline.flow import SHIP, STAGES, planned, stage_fingerprint
from pipeline.needs import estimate
from pipeline.plan import print_plan, require_chain, require_resources
from pipeline.settings import Config
from tests.pipeline.test_artifacts import Usage

LAPTOP = Machine("a laptop", 200e9, True, 16e9)
STATION = Machine("a station", 400e9, True, 64e9, "NVIDIA H100 80GB HBM3", 80e9, 989e12)


@pytest.fixture(scope="module")
def demo() -> dict[str, Config]:
    return load_configs(["teacher=from_scratch"])


def test_on_an_empty_layout_everything_runs(
    ci_configs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = list(planned(ci_configs))
    print_plan(chosen, ci_configs, Layout(tmp_path), with_dvc=False, machine=LAPTOP)
    rows = _rows(capsys.readouterr().out)
    labels = ["clean", "teacher", "targets", *(f"distill {name}" for name in ci_configs)]
    labels += [f"{stage} {name}" for name in ci_configs for stage in SHIP] + ["report", "register"]
    assert [row[0] for row in rows] == labels and len(labels) == 15
    assert all(row[1:3] == ["yes", "no finished output"] and row[3] and row[5] and row[6] for row in rows)
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
    chosen = [(STAGES[name], config) for name in ("clean", "teacher", "targets")]
    print_plan(chosen, ci_configs, layout, with_dvc=False, machine=LAPTOP)
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
    print_plan(list(planned(demo)), demo, Layout(artifacts.PROJECT), with_dvc=True, machine=LAPTOP)
    rows = {row[0]: row[1:3] for row in _rows(capsys.readouterr().out)}
    assert rows["clean"] == ["yes", "changed command"] and rows["teacher"] == ["yes", "changed deps: pipeline/data"]
    assert rows["package tiny"] == ["yes", "changed outs: artifacts/weights/tiny"]
    assert rows["package base"] == rows["distill tiny"] == rows["report"] == ["no", "current"]


def test_dvc_that_does_not_answer_is_not_taken_for_no_change(
    demo: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(monkeypatch, returncode=255, stderr="ERROR: first\nERROR: unable to read: 'dvc.yaml'\n")
    with pytest.raises(UserError, match=r"^dvc status: got .*unable to read: 'dvc\.yaml'"):
        print_plan(list(planned(demo)), demo, Layout(artifacts.PROJECT), with_dvc=True, machine=LAPTOP)


def test_the_plan_names_the_chain_and_every_size(
    demo: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(list(planned(demo)), demo, Layout(tmp_path), with_dvc=False, machine=LAPTOP)
    printed = capsys.readouterr().out
    assert "teacher: 4.2 M parameters, 5 layers of 256, FFN 704, 4 KV heads, vocabulary 2048" in printed
    assert (
        "tiny: cut from teacher, importance measured on it by stage targets; learns from teacher, its stored draws ("
        in printed
    )
    assert "on this CPU (a laptop, a product at 200 GFLOP/s just now); there is no GPU" in printed
    assert "H100" not in printed and "warning" not in printed, "minutes of small products say nothing of a GPU"


def test_a_7b_on_a_cpu_is_said_to_be_too_much_and_what_an_h100_would_take(
    seven: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _path: Usage(2e11, 1e11, 1e11))
    print_plan(list(planned(seven)), seven, Layout(tmp_path), with_dvc=False, machine=LAPTOP)
    printed = capsys.readouterr().out
    assert re.search(r"about \d+\.\d days on this CPU", printed) and "teacher: 7.62 G parameters" in printed
    (hours,) = re.findall(r"at least (\d+\.\d) h with one H100 beside it: an estimate from rates", printed)
    tokens, student_flops = 10_000 * 16 * 1024, 0.0
    for name in ("3b", "1_5b", "0_5b"):
        student_flops += require_chain(seven).submodels[name].training_flops(1024)
    taught_s = 20e6 / (16_384 / 0.372)
    learned_s = tokens / 131_810 * student_flops / MEASURED_STUDENT.training_flops(1024)
    family = require_chain(seven)
    on_cpu = [
        seconds(estimate(stage, config, family, bf16=True), LAPTOP, 989e12)
        for stage, config in planned(seven)
        if stage.name not in ("targets", "distill")
    ]
    assert float(hours) * 3600 == pytest.approx(taught_s + learned_s + sum(on_cpu), rel=0.02)
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert any(re.match(r"warning: targets needs up to 20\.0 GB of this machine's 16.0 GB.*teacher\.load=int4", w)
               for w in warnings)  # fmt: skip
    assert any(re.match(r"warning: 1\d\d\.\d GB of disk are needed, 100\.0 GB are free, most for distill 3b: try a "
                        r"higher distill.checkpoint_every_steps", w) for w in warnings)  # fmt: skip


def test_on_a_gpu_models_count_against_its_memory_and_its_rate(
    seven: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(list(planned(seven)), seven, Layout(tmp_path), with_dvc=False, machine=STATION)
    printed = capsys.readouterr().out
    rows = {row[0]: row for row in _rows(printed)}
    assert rows["targets"][6] == "17.6 GB" and rows["targets"][7] == "7.8 min" and rows["clean"][6] == ""
    assert "on one NVIDIA H100 80GB HBM3 (989 TFLOP/s): an estimate" in printed and "41%" in printed
    small = replace(STATION, gpu="NVIDIA L4", gpu_bytes=16e9, gpu_flops=121e12)
    print_plan(list(planned(seven)), seven, Layout(tmp_path), with_dvc=False, machine=small)
    printed = capsys.readouterr().out
    assert "warning: targets needs up to 17.6 GB of the GPU's 16.0 GB: try teacher.load=int4" in printed
    assert {row[0]: row for row in _rows(printed)}["targets"][7] == "63.6 min", "989 / 121 times as long"
    unknown = replace(STATION, gpu="NVIDIA X", gpu_flops=None)
    print_plan(list(planned(seven)), seven, Layout(tmp_path), with_dvc=False, machine=unknown)
    assert "its peak is not known here: as an H100" in capsys.readouterr().out


def test_a_7b_taken_whole_fits_a_laptop_until_something_holds_all_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _path: Usage(2e11, 1e11, 1e11))

    def printed(*overrides: str) -> str:
        configs = load_configs(["experiment=qwen2_5_7b_whole", *overrides])
        print_plan(list(planned(configs)), configs, Layout(tmp_path), with_dvc=False, machine=LAPTOP)
        return capsys.readouterr().out

    usual = printed()
    assert "whole: the teacher itself, nothing cut, nothing learned (7.62 G parameters" in usual
    assert "warning" not in usual
    ranked = printed("quantize.sensitivity_tokens=1024")
    assert re.search(r"warning: quantize whole needs up to .* try quantize.sensitivity_tokens=0$", ranked, re.M)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _path: Usage(2e10, 1e10, 1e10))
    assert re.search(r"warning: 5\d\.\d GB of disk are needed.*try fewer export\.containers", printed())


def test_this_machine_is_looked_at(demo: dict[str, Config]) -> None:
    import psutil
    import torch

    found = look_at_machine(demo["base"])
    assert found.memory_bytes == psutil.virtual_memory().total and 1e8 < found.cpu_flops < 1e14
    assert (found.gpu is None) == (not torch.cuda.is_available()) and "2 threads" in found.cpu


def test_a_run_that_the_disk_cannot_hold_is_refused(
    demo: dict[str, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = list(planned(demo))
    needs = [estimate(stage, config, require_chain(demo), bf16=True) for stage, config in chosen]
    needed = int(sum(each.disk_bytes for each in needs) + max(each.scratch_bytes for each in needs))
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _path: Usage(needed * 2, needed, needed))
    require_resources(chosen, demo, Layout(tmp_path))
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _path: Usage(needed * 2, needed, needed - 1))
    with pytest.raises(UserError, match=r"^free disk: got "):
        require_resources(chosen, demo, Layout(tmp_path))


@pytest.fixture(scope="module")
def seven() -> dict[str, Config]:
    return load_configs(["experiment=qwen2_5_7b"])


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
