"""Faults in a configuration: all at once, one line each, with the key that was meant."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.formats.errors import ConfigError
from pipeline.config import config_digest, load_configs
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher, FromScratchTeacher

ROOT = Path(__file__).resolve().parents[2]
ONE = "submodel=tiny"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("distil.steps=3", "distil.steps: no such key; did you mean distill.steps?"),
        ("distill.stepz=3", "distill.stepz: no such key; did you mean distill.steps?"),
        ("quantise=int4", "quantise: no such key; did you mean quantize?"),
        ("quantize=int5", "quantize: got 'int5', allowed: int4, int8; did you mean int8?"),
        ("submodel=smal", "submodel: got 'smal', allowed: 0_5b, 1_5b, 3b, base, ci_small, ci_tiny, small, tiny, whole;"
                          " did you mean small?"),
        ("experiment=qwen", "experiment: got 'qwen', allowed: ci, demo, llama_7b, qwen2_5_7b"),
        ("family=[base,smal]", "family: got 'smal', allowed: 0_5b, 1_5b, 3b, base, ci_small, ci_tiny, small, tiny,"
                               " whole; did you mean small?"),
        ("+x.y=1", "+x.y=1: allowed: KEY=VALUE with a key that conf/ has"),
        ("~distill.steps", "~distill.steps: allowed: KEY=VALUE with a key that conf/ has"),
        ("distill.steps", "distill.steps: allowed: KEY=VALUE with a key that conf/ has"),
        ("submodel.width=1.5", "submodel.width: got 1.5, allowed: less than or equal to 1"),
        ("submodel.width=0", "submodel.width: got 0, allowed: greater than 0"),
        ("seed=-1", "seed: got -1, allowed: greater than or equal to 0"),
        ("distill.draws=65", "distill.draws: got 65, allowed: less than or equal to 64"),
        ("distill.steps=many", "distill.steps: got 'many', allowed: a valid integer,"),
        ("quantize.rounding=awq", "quantize.rounding: got 'awq', allowed: 'rtn', 'mse', 'weighted_mse' or 'gptq'"),
        ("export.containers=[]", "export.containers: got [], allowed: List should have at least 1 item"),
        ("export.containers=[onnx,onnx]", "export: containers must not repeat"),
        ("export.containers=[gguf,safetensors]", "export: containers hold none that is run and measured; add one of"),
        ("gate.containers=[gguf]", "gate.containers.0: got 'gguf', allowed: 'onnx', 'tflite' or 'tflite_legacy'"),
        ("export.prefill_tokens=256", "export: prefill_tokens must be below context_tokens"),
        ("quantize=int8", "export.containers: tflite holds 4-bit codes; with quantize=int8 leave it out"),
        ("quantize.group=64", "quantize.group: tflite runs group 32; choose 32 or leave tflite out"),
        ("runtime.max_tokens=256", "runtime.max_tokens must be below export.context_tokens"),
        ("data.path=x.txt", "data: path is required by source=local and refused by the others"),
        ("data.min_chars=20000", "data: min_chars must be below max_chars"),
        ("teacher=from_scratch teacher.num_heads=6", "teacher: hidden_size must divide by num_heads"),
        ("teacher=from_scratch teacher.num_heads=32", "teacher: hidden_size / num_heads must be a multiple of 16"),
        ("teacher.kind=foo", "teacher.kind: got 'foo', allowed: 'from_scratch', 'local', 'hub'"),
        ("distill.target_tokens=1000", "distill: target_tokens must hold one batch"),
        ("distill.hidden_weight=1", "distill: hidden_weight needs the teacher's states, which are not stored"),
        ("distill.sharding=ddp", "distill.sharding: got 'ddp', allowed: 'none' or 'fsdp'"),
        ("distill.signal=none", "distill.signal: none teaches nobody; choose stored or online, or submodel=whole"),
        ("submodel=whole submodel.width=0.5", "submodel: whole is the teacher as it is; leave the ratios at 1.0"),
        ("submodel=whole submodel.checkpoint=x", "submodel: whole is the teacher as it is; leave the ratios at"),
        ("submodel=whole submodel.vocab_coverage=0.9", "submodel: whole is the teacher as it is; leave the ratios"),
        ("data=local", "data.path: is missing; add data.path=VALUE"),
        ("teacher=hub", "teacher.name: is missing; add teacher.name=VALUE"),
    ],
)  # fmt: skip
def test_one_fault_is_one_line_that_names_the_key(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_configs(override.split())
    (only,) = str(error.value).splitlines()
    assert only.startswith(line)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_configs(["distil.steps=3", "seed=-1", "teacher=local", "data=local", "quantize=int5", "gate.beats=1"])
    assert {line.partition(":")[0] for line in str(error.value).splitlines()} == {
        "distil.steps", "seed", "teacher.path", "data.path", "quantize", "gate.beats"
    }  # fmt: skip


def test_a_mistake_in_one_group_does_not_depend_on_the_order_of_overrides() -> None:
    for order in (["teacher.path=DIR", "teacher=local", ONE], [ONE, "teacher=local", "teacher.path=DIR"]):
        assert isinstance(load_configs(order)["tiny"].teacher, CheckpointTeacher)


def test_values_arrive_with_their_types() -> None:
    config = load_configs(
        [
            ONE,
            "teacher=from_scratch",
            "distill.steps=7",
            "export.containers=[onnx]",
            "submodel.hidden_size=96",
            "threads=1",
        ]
    )
    tiny = config["tiny"]
    assert (tiny.distill.steps, tiny.export.containers, tiny.submodel.hidden_size) == (7, ["onnx"], 96)
    assert isinstance(tiny.teacher, FromScratchTeacher) and tiny.threads == 1


def test_a_configuration_cannot_change_after_validation(ci_configs: dict[str, Config]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        ci_configs["ci_tiny"].seed = 3  # type: ignore[misc]


def test_digest_names_settings_and_not_what_is_run_of_them(ci_configs: dict[str, Config]) -> None:
    digest = config_digest(ci_configs)
    same = {name: c.model_copy(update={"stage": "clean", "dry_run": True}) for name, c in ci_configs.items()}
    other = {name: c.model_copy(update={"seed": 8}) for name, c in ci_configs.items()}
    assert len(digest) == 12 and config_digest(same) == digest != config_digest(other)


def test_help_costs_less_than_half_a_second_of_cpu() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _pipeline("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: python -m pipeline" in done.stdout and done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_names_every_stage_and_group() -> None:
    from pipeline.config import CONF_DIR
    from pipeline.flow import stage_names

    text = _pipeline("help").stdout
    assert not [name for name in stage_names() if name not in text]
    assert not [path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name not in text]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["distil.steps=3", "seed=-1"], ["distil.steps: no such key; did you mean distill.steps?", "seed: got -1"]),
        (["stage=exprot"], ["stage: got 'exprot', allowed: clean, teacher, targets, distill, quantize, export,"]),
        (["--dry-run"], ["--dry-run: allowed: KEY=VALUE with a key that conf/ has"]),
    ],
)
def test_a_user_error_exits_2_with_one_line_a_fault(arguments: list[str], lines: list[str]) -> None:
    done = _pipeline(*arguments)
    printed = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and len(printed) == len(lines), done.stderr
    assert all(found.startswith(expected) for found, expected in zip(printed, lines, strict=True))


def _pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
