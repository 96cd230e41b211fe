"""dvc.yaml against pipeline/flow.py, and against what Hydra loads for each of its commands."""

from __future__ import annotations

import configparser
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo
from hydra import compose, initialize_config_dir

from pipeline.config import CONF_DIR, load_configs
from pipeline.flow import SHIP, STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
FAMILY = yaml.safe_load((CONF_DIR / "family.yaml").read_text(encoding="utf-8"))["family"]
NAMES = [name for name in STAGES if name not in SHIP] + ["ship"]
COMMANDS = [
    f"{name}@{submodel}" if submodel else name
    for name in NAMES
    for submodel in (FAMILY if name == "ship" or STAGES[name].per_submodel else [None])
]


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[str, Any]]:
    """What DVC itself reads, matrix and variables resolved."""
    with Repo(str(ROOT)) as repo:
        yield {stage.addressing: stage for stage in repo.index.stages}


def test_every_stage_of_the_flow_is_one_of_dvcs(stages: dict[str, Any]) -> None:
    assert sorted(stages) == sorted(COMMANDS) and len(stages) == 6 - 1 + 2 * len(FAMILY)


@pytest.mark.parametrize("address", COMMANDS)
def test_the_command_runs_that_stage_in_place(stages: dict[str, Any], address: str) -> None:
    name, _, submodel = address.partition("@")
    expected = ["python3", "-m", "pipeline", f"stage={name}", *([f"submodel={submodel}"] if submodel else [])]
    assert shlex.split(stages[address].cmd) == expected


@pytest.mark.parametrize("address", COMMANDS)
def test_code_is_that_of_the_flow(stages: dict[str, Any], address: str) -> None:
    found = {dep.def_path for dep in stages[address].deps if not _is_params(dep) and not _is_data(dep.def_path)}
    wanted = {path for part in _parts(address) for path in (f"pipeline/stages/{part.name}.py", *part.code)}
    assert found == {path for path in wanted if not any(path.startswith(f"{other}/") for other in wanted)}


@pytest.mark.parametrize("address", COMMANDS)
def test_inputs_are_the_outputs_of_the_stages_that_the_flow_names(stages: dict[str, Any], address: str) -> None:
    found = {dep.def_path for dep in stages[address].deps if _is_data(dep.def_path)}
    made = {part.name for part in _parts(address)}
    submodel = address.partition("@")[2]
    wanted = set()
    for needed in {name for part in _parts(address) for name in part.inputs} - made:
        folder = STAGES[needed].folder
        wanted.add(folder.format(submodel) if submodel else folder.removesuffix("/{}"))
    assert found == wanted


@pytest.mark.parametrize("address", COMMANDS)
def test_outputs_are_the_stages_folders_and_the_reports_that_git_keeps(stages: dict[str, Any], address: str) -> None:
    submodel = address.partition("@")[2]
    cached = {out.def_path for out in stages[address].outs if out.use_cache}
    kept = {out.def_path for out in stages[address].outs if not out.use_cache}
    assert cached == {part.folder.format(submodel) for part in _parts(address)}
    if address == "report":
        assert kept == {"reports/family.json", "reports/index.html", "reports/cards"}
    else:
        tail = f"-{submodel}" if submodel else ""
        names = [part.name for part in _parts(address) if part.name != "register"]
        assert kept == {f"reports/metrics/{name}{tail}.json" for name in names}


@pytest.mark.parametrize("address", COMMANDS)
def test_every_conf_file_that_supplies_a_setting_is_among_the_params(stages: dict[str, Any], address: str) -> None:
    overrides = shlex.split(stages[address].cmd)[3:]
    tracked = {dep.def_path: dep.params for dep in stages[address].deps if _is_params(dep)}
    sections = [section for part in _parts(address) for section in part.sections]
    supplied = {pair for section in sections for pair in _suppliers(section, overrides)}
    missing = [(file, key) for file, key in supplied if not _covers(tracked.get(file), key)]
    assert not missing, "a change of these would not run the stage again"
    assert set(tracked) == {file for file, _ in supplied}, "a change of the others would run it for nothing"


@pytest.mark.parametrize("address", COMMANDS)
def test_params_name_keys_that_exist(stages: dict[str, Any], address: str) -> None:
    for dep in stages[address].deps:
        if _is_params(dep):
            values = yaml.safe_load((ROOT / dep.def_path).read_text(encoding="utf-8"))
            assert all(_has(values, key) for key in dep.params), dep.def_path


def test_the_check_sees_an_experiment_that_overrides_a_declared_setting() -> None:
    """runtime.prompt comes from experiment/demo.yaml: the file must be tracked where runtime is declared."""
    overrides = ["stage=ship", "submodel=tiny"]
    files = {file for file, _ in _suppliers("runtime", overrides)}
    assert files == {"conf/runtime/default.yaml", "conf/experiment/demo.yaml"}
    assert _suppliers("runtime.evaluation_sequences", overrides) == [
        ("conf/runtime/default.yaml", "evaluation_sequences")
    ]
    assert _suppliers("submodel", overrides) == [("conf/submodel/tiny.yaml", "")]
    assert _suppliers("seed", overrides) == [("conf/config.yaml", "seed")]
    assert _suppliers("family", overrides) == [("conf/family.yaml", "family")]


def test_the_matrix_is_the_family_that_hydra_composes() -> None:
    assert list(load_configs([])) == FAMILY


def test_dvc_composes_nothing_itself_and_reports_nothing() -> None:
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / ".dvc" / "config").read_text(encoding="utf-8"))
    values = {f"{section}.{key}": value for section in parser.sections() for key, value in parser[section].items()}
    assert values["core.analytics"] == "false"
    assert not [key for key in values if "hydra" in key]


def test_dvc_accepts_the_file_without_an_activated_environment() -> None:
    dvc = Path(sys.executable).parent / "dvc"
    done = subprocess.run(
        [dvc, "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip
    assert sorted(done.stdout.split()) == sorted(COMMANDS)


def _parts(address: str) -> list[Stage]:
    name = address.partition("@")[0]
    return [STAGES[part] for part in (SHIP if name == "ship" else [name])]


def _is_params(dependency: Any) -> bool:
    return dependency.def_path.startswith("conf/")


def _is_data(path: str) -> bool:
    return path.startswith("artifacts/")


def _suppliers(section: str, overrides: list[str]) -> list[tuple[str, str]]:
    """(file, key in it or "" for all of it) of every conf file that supplies ``section`` to a command."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", overrides, return_hydra_config=True)
    choices: dict[str, str] = dict(composed.hydra.runtime.choices)
    group, _, key = section.partition(".")
    if group in choices:
        found = [(f"conf/{group}/{choices[group]}.yaml", key)]
    else:
        holders = [name for name in ("config", "family") if group in _load(f"conf/{name}.yaml")]
        found = [(f"conf/{name}.yaml", section) for name in holders]
    experiment = f"conf/experiment/{choices['experiment']}.yaml"
    values = _load(experiment)
    assert "defaults" not in values, "an experiment that builds on another: follow it here too"
    if _has(values, section):
        found.append((experiment, section))
    assert found, section
    return found


def _load(path: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    return values


def _covers(params: list[str] | None, key: str) -> bool:
    """Whether a params entry (None: absent, empty: the whole file) tracks ``key``."""
    if params is None:
        return False
    return not params or any(key == param or key.startswith(f"{param}.") for param in params)


def _has(values: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True
