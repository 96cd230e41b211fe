"""Runs that the flow tests share: the project's code in a folder of its own, and one finished run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.artifacts import PROJECT, Layout

OVERRIDES = ("experiment=ci",)
LEGACY_PYTHON = PROJECT / ".venv-legacy" / "bin" / "python"

Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run of ``experiment=ci`` from clean: where it wrote and what it printed."""

    layout: Layout
    printed: subprocess.CompletedProcess[str]


def copy_project(target: Path) -> Path:
    """The code alone, so that a run disturbs nothing of this checkout."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("pipeline", "edge_runtime", "server", "conf", "assets"):
        shutil.copytree(PROJECT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy2(PROJECT / name, target / name)
    (target / ".venv-legacy").symlink_to(PROJECT / ".venv-legacy")
    return target


def run_pipeline(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m pipeline`` of a copied project."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def run_edge(python: Path, *arguments: str, project: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    """``python -m edge_runtime`` of this checkout in any interpreter."""
    return subprocess.run(
        [str(python), "-m", "edge_runtime", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("run") / "project")


@pytest.fixture(scope="session")
def finished(project: Path) -> FinishedRun:
    done = run_pipeline(project, *OVERRIDES)
    assert done.returncode == 0, done.stderr[-3000:]
    (root,) = (project / "runs").iterdir()
    return FinishedRun(Layout(root), done)


@pytest.fixture(scope="session")
def edge_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with ``pip install .[edge]`` alone: what a phone-class device has, without this checkout."""
    folder = tmp_path_factory.mktemp("edge")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", "constraints.txt", ".[edge]"],
        cwd=PROJECT,
        check=True,
    )
    return python
