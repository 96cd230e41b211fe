"""Every file under conf/ composes within its group and validates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pipeline.config import CONF_DIR, load_configs
from pipeline.settings import Config
from pipeline.settings_training import CheckpointTeacher
from server.config import load_federation

FILES = sorted(path for path in CONF_DIR.rglob("*.yaml") if path.parent.name != "federation")  # the server's, see below
ROOT_FILES = {"config.yaml", "family.yaml"}
REQUIRED = {  # what a file leaves to the user (???)
    "teacher/local.yaml": ["teacher.path=/nowhere"],
    "teacher/hub.yaml": ["teacher.name=someone/model"],
    "data/local.yaml": ["data.path=/nowhere.txt"],
    "data/pairs.yaml": ["data.path=/nowhere", "stage=clean"],
    "quantize/int8.yaml": ["export.containers=[onnx]"],
}


def test_this_many_files_are_checked() -> None:
    assert len(FILES) == 34
    assert {path.name for path in FILES if path.parent == CONF_DIR} == ROOT_FILES
    assert not [path for path in CONF_DIR.rglob("*") if path.is_file() and path.suffix != ".yaml"]


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name not in ROOT_FILES], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_every_file_composes_and_validates(path: Path) -> None:
    group, option = path.parent.name, path.stem
    one = [] if group in ("experiment", "submodel") else ["submodel=tiny"]
    configs = load_configs([f"{group}={option}", *one, *REQUIRED.get(f"{group}/{option}.yaml", [])])
    for name, config in configs.items():
        assert isinstance(config, Config) and config.submodel.name == name
        assert (CONF_DIR / "submodel" / f"{name}.yaml").is_file()
    if group == "submodel":
        assert list(configs) == [option], "the file's name and its name: must agree"
    if group == "experiment":
        first = next(iter(configs.values()))
        assert list(configs) == first.family, "an experiment makes every member of its family, in its order"
        assert first.submodel.name == first.family[0], "the experiment's own submodel is the first of its family"


def test_every_federation_loads_and_names_itself() -> None:
    names = {path.stem for path in (CONF_DIR / "federation").glob("*.yaml")} - {"default"}
    assert names == {"demo"}
    for name in names:
        assert load_federation(name).name == name
    default = load_federation("default", ["name=x", "package=y"]).model_dump(mode="json")
    stated = yaml.safe_load((CONF_DIR / "federation" / "default.yaml").read_text())
    assert stated == {key: value for key, value in default.items() if key not in ("name", "package")}


@pytest.mark.parametrize("experiment", ["demo", "ci", "qwen2_5_7b", "llama_7b"])
def test_members_of_a_family_shrink(experiment: str) -> None:
    shares = [c.submodel.width * c.submodel.depth * (c.submodel.ffn + c.submodel.heads)
              for c in load_configs([f"experiment={experiment}"]).values()]  # fmt: skip
    assert len(shares) >= 2 and all(later < earlier for earlier, later in pairwise(shares))


def test_defaults_are_the_demo() -> None:
    assert load_configs([]) == load_configs(["experiment=demo"])


def test_seven_billion_experiments_differ_in_the_teacher_alone() -> None:
    qwen, llama = (next(iter(load_configs([f"experiment={name}"]).values())) for name in ("qwen2_5_7b", "llama_7b"))
    assert isinstance(qwen.teacher, CheckpointTeacher) and isinstance(llama.teacher, CheckpointTeacher)
    assert (qwen.teacher.name, llama.teacher.name) == ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-2-7b-hf")
    assert qwen.model_copy(update={"teacher": llama.teacher}) == llama


def test_a_users_own_run_takes_the_paths_given() -> None:
    overrides = ["teacher=local", "teacher.path=some/model", "data=local", "data.path=my texts/notes.txt"]
    config = load_configs(overrides)["base"]
    assert (config.teacher.kind, getattr(config.teacher, "path", None)) == ("local", Path("some/model"))
    assert (config.data.source, config.data.path) == ("local", Path("my texts/notes.txt"))
