"""Stages in order: what each declares covers what it reads, and nothing runs twice."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from edge_runtime.formats.errors import UserError
from pipeline import flow
from pipeline.artifacts import Layout, StageRun, write_json
from pipeline.config import load_configs
from pipeline.flow import SHIP, STAGES, execute, planned, stage_fingerprint, stage_names, why_run
from pipeline.settings import Config
from tests.pipeline.source_graph import ROOT, module_file, reached, settings_read

# Code that carries values and no results: reading a configuration, writing files, showing progress, wording errors.
PLUMBING = {
    "pipeline/artifacts.py",
    "pipeline/config.py",
    "pipeline/progress.py",
    "pipeline/settings.py",
    "pipeline/settings_training.py",
    "edge_runtime/formats/errors.py",
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_only_the_settings_it_declares(name: str) -> None:
    declared = STAGES[name].sections
    read = {setting: d for d in reached(f"pipeline.stages.{name}") for setting in settings_read(d)}
    assert read, "no setting was seen: the analysis is broken"
    missing = {
        setting: f"{d.module}.{d.name}"
        for setting, d in read.items()
        if setting != "submodel.name"  # part of the output's path
        and not any(setting == section or setting.startswith(f"{section}.") for section in declared)
    }
    assert not missing, f"{name} reads these and does not declare them"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_calls_only_code_it_declares(name: str) -> None:
    declared = (f"pipeline/stages/{name}.py", *STAGES[name].code)
    missing: dict[str, list[str]] = {}
    for definition in reached(f"pipeline.stages.{name}"):
        file = module_file(definition.module)
        assert file is not None
        path = file.relative_to(ROOT).as_posix()
        if path not in PLUMBING and not any(path == code or path.startswith(f"{code}/") for code in declared):
            missing.setdefault(path, []).append(definition.name)
    assert not missing, f"a change of these would not run {name} again"


@pytest.mark.parametrize("name", STAGES)
def test_declared_code_and_settings_exist(name: str) -> None:
    stage = STAGES[name]
    assert all((ROOT / path).exists() for path in stage.code) and len(set(stage.code)) == len(stage.code)
    values = load_configs(["submodel=tiny"])["tiny"].model_dump(mode="json")
    for section in stage.sections:
        assert flow._setting(values, section) is not None, section


def test_inputs_come_before_the_stages_that_read_them(ci_configs: dict[str, Config]) -> None:
    done: set[tuple[str, str]] = set()
    for stage, config in planned(ci_configs):
        for name in stage.inputs:
            families = config.family if STAGES[name].per_submodel and not stage.per_submodel else [config.submodel.name]
            for submodel in families if STAGES[name].per_submodel else [""]:
                assert (name, submodel) in done, f"{stage.name} before {name} {submodel}"
        done.add((stage.name, config.submodel.name if stage.per_submodel else ""))
    assert len(done) == len(list(planned(ci_configs))) == 15
    assert stage_names() == [*STAGES, "ship", "gate", "adapter"] and set(SHIP) < set(STAGES)
    assert not {"ship", "gate", "adapter"} & set(STAGES)


class TestExecute:
    """With stage modules replaced by ones that write a line."""

    @pytest.fixture
    def ran(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []

        def run(run: StageRun) -> None:
            name = f"{run.output.parent.name}/{run.output.name.removesuffix('.partial')}"
            calls.append(name)
            (run.output / "result").write_text(name + str(run.config.seed))
            for stage in ("clean", "teacher", "targets"):
                if not run.layout.metrics(stage).exists():
                    write_json(run.layout.metrics(stage), {})
            for stage in ("distill", "quantize"):
                write_json(run.layout.metrics(stage, run.submodel), {})

        monkeypatch.setattr(flow, "import_module", lambda _name: type("Module", (), {"run": staticmethod(run)}))
        monkeypatch.setattr(flow, "prepare_process", lambda _stage, _config: None)
        return calls

    def test_a_current_output_is_left_alone(self, ran: list[str], config: Config, tmp_path: Path) -> None:
        layout, clean = Layout(tmp_path), STAGES["clean"]
        assert why_run(clean, config, layout) == "no finished output"
        assert execute(clean, config, layout) and why_run(clean, config, layout) is None
        assert not execute(clean, config, layout) and ran == ["artifacts/corpus"]
        assert execute(clean, config, layout, force=True) and len(ran) == 2

    def test_a_changed_setting_runs_the_stages_that_declare_it(
        self, ran: list[str], config: Config, tmp_path: Path
    ) -> None:
        layout = Layout(tmp_path)
        chain = [STAGES[name] for name in ("clean", "teacher", "targets", "distill")]
        _run_all(chain, config, layout)
        changed = config.model_copy(update={"distill": config.distill.model_copy(update={"steps": 99})})
        assert [stage.name for stage in chain if why_run(stage, changed, layout)] == ["distill"]
        changed = config.model_copy(update={"gate": config.gate.model_copy(update={"top1_to_fp_min": 0.9})})
        assert not [stage.name for stage in chain if why_run(stage, changed, layout)]

    def test_a_changed_input_runs_what_reads_it_and_an_equal_one_does_not(
        self, ran: list[str], config: Config, tmp_path: Path
    ) -> None:
        layout = Layout(tmp_path)
        chain = [STAGES[name] for name in ("clean", "teacher", "targets", "distill", "quantize")]
        _run_all(chain, config, layout)
        execute(STAGES["clean"], config, layout, force=True)
        assert not _run_all(chain, config, layout), "the same bytes again"
        execute(STAGES["clean"], config.model_copy(update={"seed": 1}), layout, force=True)
        read_it = ["teacher", "targets", "distill"]
        assert _run_all(chain[1:], config, layout) == read_it, "these gave the same bytes as before"

    def test_an_output_that_something_else_changed_is_made_again(
        self, ran: list[str], config: Config, tmp_path: Path
    ) -> None:
        layout = Layout(tmp_path)
        execute(STAGES["clean"], config, layout)
        (layout.corpus / "result").write_text("edited by hand")
        assert why_run(STAGES["clean"], config, layout) == "output changed by something else"
        layout.metrics("clean").unlink()
        assert why_run(STAGES["clean"], config, layout) == "no finished output"

    @pytest.mark.parametrize(
        ("failure", "shown", "words"),
        [
            (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
            (OSError(errno.ENOSPC, "No space"), UserError, r"^free disk: got 'none left at .*corpus', .*run it again"),
            (OSError(errno.EDQUOT, "Quota"), UserError, "^free disk"),
            (SafetensorError("I/O error: No space left on device (os error 28)"), UserError, "^free disk"),
            (SafetensorError("I/O error: Permission denied (os error 13)"), SafetensorError, "os error 13"),
            (OSError(errno.EACCES, "Not yours"), PermissionError, "Not yours"),
        ],
        ids=["interrupted", "disk full", "quota", "safetensors full", "safetensors otherwise", "another error"],
    )
    def test_a_stage_that_fails_leaves_the_earlier_output(
        self, ran: list[str], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        failure: BaseException, shown: type[BaseException], words: str,
    ) -> None:  # fmt: skip
        layout = Layout(tmp_path)
        execute(STAGES["clean"], config, layout)
        before = (layout.corpus / "result").read_bytes()

        def fails(run: StageRun) -> None:
            (run.output / "half").write_text("half")
            raise failure

        monkeypatch.setattr(flow, "import_module", lambda _name: type("Module", (), {"run": staticmethod(fails)}))
        with pytest.raises(shown, match=words):
            execute(STAGES["clean"], config, layout, force=True)
        assert [(path.name, path.read_bytes()) for path in layout.corpus.iterdir()] == [("result", before)]

    def test_a_stage_before_its_input_names_what_to_run(self, ran: list[str], config: Config, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"^stage: got 'teacher', .*; run python -m pipeline stage=clean$"):
            execute(STAGES["teacher"], config, Layout(tmp_path))
        with pytest.raises(UserError, match=r"run python -m pipeline stage=evaluate submodel=ci_small$"):
            execute(STAGES["report"], config, Layout(tmp_path))
        assert not ran

    @pytest.fixture
    def config(self, ci_configs: dict[str, Config]) -> Config:
        return ci_configs["ci_small"]


def _run_all(chain: list[flow.Stage], config: Config, layout: Layout) -> list[str]:
    return [stage.name for stage in chain if execute(stage, config, layout)]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("longer text"),
        lambda path: (path.parent / "second.txt").write_text("x"),
        lambda path: os.utime(path, ns=(1, 1)),
    ],
    ids=["content", "another file", "time of change"],
)
def test_the_users_own_files_are_part_of_the_fingerprint(tmp_path: Path, change: Callable[[Path], object]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "first.txt").write_text("text")
    config = load_configs(["submodel=tiny", "data=local", f"data.path={data}"])["tiny"]
    before = [stage_fingerprint(STAGES[name], config, Layout(tmp_path)) for name in ("clean", "teacher")]
    change(data / "first.txt")
    after = [stage_fingerprint(STAGES[name], config, Layout(tmp_path)) for name in ("clean", "teacher")]
    assert before[0] != after[0] and before[1] == after[1]
