"""Sizes that a plan counts with are those of the models that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest

from edge_runtime.formats.errors import UserError
from pipeline import __main__, config
from pipeline.config import family_chain, load_configs
from pipeline.distillation.pruning import random_student, student_shape
from pipeline.distillation.speed import training_flops_per_token
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher
from pipeline.sizes import ModelSizes, family_sizes, is_downloaded, teacher_sizes
from tests.pipeline.conftest import MakeModel

LOADS = get_args(CheckpointTeacher.model_fields["load"].annotation)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_checkpoint_is_counted_from_its_config(
    make_model: MakeModel, tmp_path: Path, architecture: str, tied: bool
) -> None:
    model: Any = make_model(architecture, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    configs = load_configs(["teacher=local", f"teacher.path={tmp_path}"])
    sizes = family_sizes(configs, family_chain(configs))
    assert sizes.teacher.params == sum(parameter.numel() for parameter in model.parameters())
    for name, found in sizes.submodels.items():
        student = random_student(model, student_shape(model.config, configs[name].submodel), 0)
        assert found.params == sum(parameter.numel() for parameter in student.parameters())
        assert found.training_flops(24) == pytest.approx(training_flops_per_token(student, 24), rel=1e-9)


def test_a_teacher_trained_here_is_counted_from_its_settings() -> None:
    from pipeline.distillation.teachers import build_teacher

    teacher: Any = load_configs(["teacher=from_scratch"])["base"]
    real = sum(parameter.numel() for parameter in build_teacher(teacher.teacher, 0).parameters())
    assert teacher_sizes(teacher).params == real


@pytest.mark.parametrize(
    ("experiment", "params"), [("qwen2_5_7b", 7_615_616_512), ("llama_7b", 6_738_415_616)]
)  # as their model cards count them
def test_the_experiments_teachers_are_known_without_the_hub(experiment: str, params: int) -> None:
    configs = load_configs([f"experiment={experiment}"])
    assert teacher_sizes(next(iter(configs.values()))).params == params


def test_what_the_hubs_cache_holds_is_read_there(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def cached(name: str, file: str, revision: str) -> str | None:
        asked.append((name, file, revision))
        return str(checkpoint / file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    teacher: Any = load_configs(["teacher=hub", "teacher.name=Qwen/Qwen2.5-7B", "teacher.revision=v2"])["base"]
    assert teacher_sizes(teacher).hidden_size == 64 and is_downloaded(teacher.teacher)
    assert set(asked) == {("Qwen/Qwen2.5-7B", "config.json", "v2")}


def test_a_teacher_that_nobody_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_arguments: Any, **_named: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    teacher = load_configs(["teacher=hub", "teacher.name=a/b"])["base"]
    with pytest.raises(UserError, match=r"^teacher\.name: got 'a/b', allowed: a checkpoint whose config\.json the hub"):
        teacher_sizes(teacher)


@pytest.mark.parametrize(
    "change", [{"hidden_size": None}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": 0}, "[]", "{"]
)
def test_a_config_without_sizes_is_refused(checkpoint: Path, tmp_path: Path, change: Any) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    text = change if isinstance(change, str) else json.dumps(values | change)
    (tmp_path / "config.json").write_text(text)
    configs = load_configs(["teacher=local", f"teacher.path={tmp_path}"])
    with pytest.raises(UserError, match=r"^teacher\.path: got .*"):
        teacher_sizes(configs["base"])


def test_a_load_in_few_bits_keeps_embedding_and_head() -> None:
    sizes = ModelSizes(1000, 64, 128, 2, 4, 2, 16, tie_word_embeddings=False)
    matrices = sizes.params - 2 * 64_000
    found = {load: sizes.loaded_bytes(load) for load in LOADS}
    assert set(found) == {"fp32", "bf16", "float8", "int8", "int4"} and found["float8"] == found["int8"]
    assert found["fp32"] == 4 * sizes.params and found["bf16"] == 2 * sizes.params
    assert found["int8"] == matrices + 4 * 64_000 and found["int4"] == 0.5625 * matrices + 4 * 64_000


def test_a_chain_that_grows_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, in plans and in runs, whole or of the one stage that would cut."""
    configs = _chained("small", "tiny")
    assert [s.hidden_size for s in family_sizes(configs, family_chain(configs)).submodels.values()] == [160, 128]
    grown = _chained("tiny", "small")
    started: list[str] = []
    monkeypatch.setattr("pipeline.flow.execute", lambda stage, *_a, **_n: started.append(stage.name))
    monkeypatch.setattr("subprocess.run", lambda *_a, **_n: started.append("dvc"))
    for arguments in ([], ["dry_run=true"], ["seed=9"], ["stage=distill"], ["stage=export", "submodel=small"]):
        monkeypatch.setattr(config, "load_configs", lambda _overrides, given=arguments: _asked(grown, given))
        assert __main__.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("submodel small: hidden_size: got 160, allowed: at most the 128 of tiny; make it")
        assert error.count("\n") == 1
    assert not started


def _chained(larger: str, smaller: str) -> dict[str, Config]:
    configs = load_configs(["export.containers=[onnx]", f"family=[{larger},{smaller}]"])
    cut = configs[smaller].submodel.model_copy(update={"cut_from": larger})
    return configs | {smaller: configs[smaller].model_copy(update={"submodel": cut})}


def _asked(configs: dict[str, Config], arguments: list[str]) -> dict[str, Config]:
    given = dict(argument.split("=") for argument in arguments)
    update = {"stage": given.get("stage"), "dry_run": "dry_run" in given}
    return {name: each.model_copy(update=update) for name, each in configs.items()}
