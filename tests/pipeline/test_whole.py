"""A teacher taken whole: its files under second names, and a plan that counts what reading a 7B by layers takes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from edge_runtime.formats.errors import UserError
from pipeline import model_bytes
from pipeline.config import load_configs
from pipeline.distillation.whole import take_whole
from pipeline.export.checkpoint import load_student
from pipeline.flow import STAGES
from pipeline.needs import Needs, estimate
from pipeline.plan import require_chain
from pipeline.quantization import streamed_logits


def test_shards_are_the_teachers_own_and_so_are_links_to_them(checkpoint: Path, tmp_path: Path) -> None:
    """As the hub's cache holds them: links to files of other names."""
    teacher, output = tmp_path / "snapshot", tmp_path / "student"
    teacher.mkdir(), output.mkdir()
    for path in checkpoint.iterdir():
        (teacher / path.name).symlink_to(path)
    taken = take_whole(teacher, output)
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(shards) > 1
    for name in shards:
        assert not (output / name).is_symlink() and (output / name).samefile(checkpoint / name)
    names = {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}
    assert {path.name for path in output.iterdir()} == names, "the tokenizer stays with the teacher"
    expected, found = load_student(checkpoint).state_dict(), load_student(output).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert taken["params"] == sum(value.numel() for value in expected.values()) and taken["kl_to_teacher"] == 0.0


def test_on_another_disk_shards_are_copied(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refused)
    take_whole(checkpoint, tmp_path)
    for path in checkpoint.glob("*.safetensors"):
        assert not (tmp_path / path.name).samefile(path) and (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_missing_shard_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "teacher")
    next((tmp_path / "teacher").glob("model-*.safetensors")).unlink()
    (tmp_path / "student").mkdir()
    with pytest.raises(UserError, match="every shard that the index names"):
        take_whole(tmp_path / "teacher", tmp_path / "student")


def test_a_7b_fits_into_a_machine_of_16_gb_and_its_tokens_are_its_time() -> None:
    stages = [name for name in STAGES if name not in ("clean", "teacher")]
    usual = {stage: _needs(stage) for stage in stages}
    assert all(each.host_bytes + sum(each.device_bytes.values()) < 9e9 for each in usual.values())
    assert usual["distill"].disk_bytes < 1e6 and usual["targets"].forward_flops == usual["distill"].forward_flops == 0
    flops = require_chain(load_configs(["experiment=qwen2_5_7b_whole"])).teacher.forward_flops(512)
    more = _needs("evaluate", "runtime.task_tokens=32768")
    assert more.forward_flops - usual["evaluate"].forward_flops == pytest.approx(16384 * flops), "the model in fp32"
    assert more.host_flops - usual["evaluate"].host_flops == pytest.approx(16384 * flops), "and the one file that runs"


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("quantize", "quantize.sensitivity_tokens=1024"),
        ("quantize", "quantize.qad_steps=10"),
        ("quantize", "quantize.qad_scale_steps=10"),
        ("export", "export.train_buckets=[64]"),
        ("evaluate", "runtime.task_files=[mine.jsonl]"),
    ],
)
def test_what_holds_the_whole_model_in_fp32_is_said_to(stage: str, override: str) -> None:
    found = _needs(stage, override)
    assert found.host_bytes + sum(found.device_bytes.values()) > 4 * 7.6e9


def test_the_plan_counts_with_the_sizes_of_the_code() -> None:
    assert model_bytes._STREAMED_TOKENS == streamed_logits.BATCH_TOKENS
    assert model_bytes._STREAMED_HEAD_WEIGHTS == streamed_logits._HEAD_BLOCK_WEIGHTS


def _needs(stage: str, *overrides: str) -> Needs:
    configs = load_configs(["experiment=qwen2_5_7b_whole", *overrides])
    return estimate(STAGES[stage], configs["whole"], require_chain(configs), bf16=False)
