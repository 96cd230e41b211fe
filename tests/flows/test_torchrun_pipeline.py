"""``torchrun -m pipeline``: two processes make the student of one; one line says what went wrong in any of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import Layout
from pipeline.config import config_digest, load_configs
from pipeline.flow import STAGES, execute
from pipeline.settings import Config
from tests.flows.conftest import copy_project
from tests.pipeline.conftest import TEXTS

pytestmark = [pytest.mark.flow, pytest.mark.slow, pytest.mark.xdist_group("torchrun")]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = (
    "experiment=ci", "submodel=ci_small", "export.containers=[onnx]", "data=local", "teacher.steps=6",
    "distill.target_tokens=1024", "distill.precision=fp32", "distill.steps=8", "distill.checkpoint_every_steps=3",
    "distill.signal=online", "distill.hidden_weight=0.5", "distill.hidden_layers=2", "distill.micro_sequences=1",
    "distill.on_policy_steps=2", "distill.on_policy_prompt_tokens=6", "distill.on_policy_tokens=6",
    "distill.from_scratch_baseline=false",
)  # fmt: skip
ENDS_IN_ONE = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.distillation import trainer
from edge_runtime.formats.errors import UserError
take_step = trainer._take_step
def end(training, step, batches):
    if step == 5 and os.environ["RANK"] == "1":
        if "distill.sharding=fsdp" in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("shard", "cut", "a whole one")
    return take_step(training, step, batches)
trainer._take_step = end
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Project:
    """A copy of the code with everything that distillation reads."""

    folder: Path
    text: Path
    inputs: Path

    def overrides(self, sharding: str) -> list[str]:
        return [*SMALL, f"data.path={self.text}", f"distill.sharding={sharding}"]

    @property
    def config(self) -> Config:
        return load_configs(self.overrides("none"))["ci_small"]

    def layout(self, sharding: str) -> Layout:
        """Its inputs are there; they do not depend on how students are spread."""
        configs = load_configs([*self.overrides(sharding), "stage=distill"])
        layout = Layout(self.folder / "runs" / config_digest(configs))
        if not layout.teacher.exists():
            shutil.copytree(self.inputs, layout.root)
        return layout

    def run(self, sharding: str, *program: str) -> tuple[int, str]:
        """(exit code, stderr) of two processes."""
        self.layout(sharding)
        command = [sys.executable, *TORCHRUN, *program, *self.overrides(sharding), "stage=distill"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        return done.returncode, done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("torchrun")
    made = Project(copy_project(folder / "project"), folder / "notes.jsonl", folder / "inputs")
    made.text.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS * 5), encoding="utf-8")
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    for name in ("clean", "teacher", "targets"):
        execute(STAGES[name], made.config, Layout(made.inputs))
    yield made
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def alone(project: Project) -> Layout:
    """Where one process made the student."""
    layout = Layout(project.folder / "alone")
    shutil.copytree(project.inputs, layout.root)
    execute(STAGES["distill"], project.config, layout)
    return layout


def test_what_fails_in_one_ends_both_with_its_line_and_both_end_like_one(
    project: Project, alone: Layout, tmp_path: Path
) -> None:
    (tmp_path / "ends.py").write_text(ENDS_IN_ONE)
    code, printed = project.run("none", str(tmp_path / "ends.py"))
    assert code != 0 and printed.count("shard: got 'cut', allowed: a whole one") == 1
    assert printed.count("exitcode  : 2") and "[rank" not in printed, "no traceback of ours"
    assert not project.layout("none").student("ci_small").exists()
    code, printed = project.run("none", "-m", "pipeline")
    assert code == 0, printed
    assert printed.count("distill ci_small ...") == printed.count("output: runs/") == 1, "one of them speaks"
    _same(project.layout("none"), alone)


def test_spread_and_killed_they_end_like_one(project: Project, alone: Layout, tmp_path: Path) -> None:
    """kill -9 of the second process after a checkpoint; then the same command again."""
    (tmp_path / "ends.py").write_text(ENDS_IN_ONE)
    code, printed = project.run("fsdp", str(tmp_path / "ends.py"))
    assert code != 0 and "SIGKILL" in printed and "[rank" not in printed
    layout = project.layout("fsdp")
    assert list(layout.root.glob(".cache/checkpoints/distill-*/student/state-00000003.safetensors"))
    code, printed = project.run("fsdp", "-m", "pipeline")
    assert code == 0, printed
    _same(layout, alone)


def _same(found: Layout, expected: Layout) -> None:
    """To what sums in another order may differ by."""
    weights, wanted = (load_file(each.student("ci_small") / "model.safetensors") for each in (found, expected))
    assert list(weights) == list(wanted), "no projection is left"
    for name, value in wanted.items():
        assert float((weights[name] - value).norm() / value.norm()) < 3e-6, name
    metrics, wanted_metrics = (
        json.loads(each.metrics("distill", "ci_small").read_text()) for each in (found, expected)
    )
    assert metrics.keys() == wanted_metrics.keys()
    assert metrics["perplexity"] == pytest.approx(wanted_metrics["perplexity"], rel=1e-5)
    for history in ("history", "on_policy_history"):
        losses, wanted_losses = ([entry["loss"] for entry in each[history]] for each in (metrics, wanted_metrics))
        assert losses == pytest.approx(wanted_losses, abs=2e-5)
    assert not list(found.root.glob(".cache/checkpoints/*"))
