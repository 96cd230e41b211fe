"""DVC over the real stages, at the size of ``experiment=ci``: reproducible, minimal, usable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import PROJECT, tree_digest
from pipeline.config import CONF_DIR
from tests.flows.conftest import copy_project

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("dvc")]
DVC = Path(sys.executable).parent / "dvc"
FAMILY = ["base", "tiny"]
_FEWER = {"export": {"containers": ["onnx", "tflite"]}}  # the legacy runtime is the other flow's business


def dvc(project: Path, *arguments: str) -> str:
    """Run dvc as a user without an activated environment does: its own path, and a PATH without it."""
    environment = {**os.environ, "PATH": os.defpath}
    done = subprocess.run(
        [str(DVC), *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout whose demo is as small as ``experiment=ci``, after its first ``dvc repro``."""
    project = copy_project(tmp_path_factory.mktemp("dvc") / "project")
    _shrink(project / "conf")
    (project / ".venv").symlink_to(sys.prefix)
    shutil.copytree(PROJECT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    _git(project, "init", "-q")
    _git(project, "config", "user.name", "test")
    _git(project, "config", "user.email", "test@example.org")
    _git(project, "add", "-A")
    _git(project, "commit", "-qm", "start")
    dvc(project, "repro")
    _git(project, "add", "-A")
    _git(project, "commit", "-qm", "first run")
    return project


def _shrink(conf: Path) -> None:
    ci = yaml.safe_load((CONF_DIR / "experiment" / "ci.yaml").read_text())
    shutil.copy2(conf / "teacher" / "from_scratch_ci.yaml", conf / "teacher" / "reference.yaml")
    files = {"distill": "distill/default", "export": "export/default"}
    for group, file in {**files, "runtime": "runtime/default", "gate": "gate/default"}.items():
        path = conf / f"{file}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **ci[group], **_FEWER.get(group, {})}))
    path = conf / "config.yaml"
    path.write_text(path.read_text().replace("threads: 2", "threads: 1"))
    (conf / "family.yaml").write_text(yaml.safe_dump({"family": FAMILY}))
    for name, size in (("base", ci_submodel("ci_small")), ("tiny", ci_submodel("ci_tiny"))):
        (conf / "submodel" / f"{name}.yaml").write_text(yaml.safe_dump({**size, "name": name}))


def ci_submodel(name: str) -> dict[str, object]:
    return yaml.safe_load((CONF_DIR / "submodel" / f"{name}.yaml").read_text())


def _git(project: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=project, check=True, capture_output=True)


def packages(project: Path) -> dict[str, str]:
    return {name: tree_digest(project / "artifacts" / "packages" / name) for name in FAMILY}


def test_repro_after_no_change_runs_nothing(repository):
    assert "Running stage" not in dvc(repository, "repro")


def test_repro_from_clean_makes_bit_identical_packages(repository):
    before = packages(repository)
    shutil.rmtree(repository / "artifacts")
    dvc(repository, "repro", "--force", "--no-run-cache")
    assert packages(repository) == before


def test_changing_one_submodel_runs_that_submodel_alone(repository):
    path = repository / "conf" / "submodel" / "tiny.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump({**yaml.safe_load(before), "ffn": 0.7}))
    printed = dvc(repository, "repro", "--dry")
    path.write_text(before)
    ran = {line.split("'")[1] for line in printed.splitlines() if "Running stage" in line}
    assert {"distill@tiny", "ship@tiny"} <= ran
    assert not ran & {"clean", "teacher", "targets", "distill@base", "ship@base"}


def test_experiments_and_metrics_are_usable(repository):
    before = json.loads((repository / "reports" / "family.json").read_text())
    dvc(repository, "exp", "run", "-S", "conf/submodel/tiny.yaml:ffn=0.7")
    after = json.loads((repository / "reports" / "family.json").read_text())
    assert after["submodels"]["tiny"]["params"] > before["submodels"]["tiny"]["params"]
    assert after["submodels"]["base"] == before["submodels"]["base"]
    difference = json.loads(dvc(repository, "metrics", "diff", "--json"))
    assert difference["reports/family.json"]["submodels.tiny.params"]["diff"] > 0
    shown = dvc(repository, "exp", "show", "--csv")
    assert "submodels.tiny.kl_to_teacher" in shown and "error" not in shown.lower()
