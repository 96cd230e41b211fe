"""A federation's settings: one place for defaults, every fault at once, contradictions refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.formats.errors import ConfigError, UserError
from server.config import MAX_FILE_BYTES, FederationConfig, config_from_json, load_federation, with_overrides

SECURE = ["secure.enabled=true", "cohort.size=9", "cohort.quorum=9"]
NOISE = ["privacy.noise=central", "privacy.clip_norm=1", "privacy.noise_multiplier=1"]


def faults(*overrides: str, name: str = "demo") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_federation(name, overrides)
    return str(caught.value).split("\n")


def test_a_named_file_states_only_what_differs_from_the_defaults() -> None:
    demo, default = load_federation("demo"), load_federation("default", ["name=x", "package=y"])
    assert demo.codec == default.codec and demo.local.weight == default.local.weight
    assert demo.cohort.size == 3 != default.cohort.size


def test_overrides_take_dotted_keys_and_yaml_values() -> None:
    config = load_federation("demo", ["adapter.ranks=[4, 8]", "local.learning_rate=1e-2", "gate=false", "name=b"])
    assert config.adapter.ranks == (4, 8)
    assert config.local.learning_rate == 0.01
    assert (config.gate, config.name) == (False, "b")


def test_a_file_of_ones_own_is_laid_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\npackage: some/where\nlocal: {steps: 3}\n")
    config = load_federation(str(path), ["rounds=2"])
    assert (config.name, config.package, config.local.steps, config.rounds) == ("mine", Path("some/where"), 3, 2)
    assert config.local.batch_sequences == load_federation("default", ["name=x", "package=y"]).local.batch_sequences


def test_json_gives_back_the_same_configuration(tmp_path: Path) -> None:
    config = load_federation("demo", ["adapter.ranks=[2,8]", "codec.up=int4"])
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert config_from_json(path) == config


def test_every_fault_is_named_at_once_with_what_is_allowed() -> None:
    found = faults(
        "rouns=3", "local.steps=0", "codec.up=fp8", "adapter.ranks=[8,4]", "cohort.quorum=9", "rounds", "local=3"
    )
    assert "rouns: no such key; did you mean rounds?" in found
    assert "local.steps: got 0, allowed: greater than or equal to 1" in found
    assert "codec.up: got 'fp8', allowed: 'fp32', 'fp16', 'int8' or 'int4'" in found
    assert "adapter.ranks: got [8, 4], allowed: different ranks that grow; write [4, 8]" in found
    assert "cohort.quorum: got 9, allowed: at most cohort.size (3); lower the quorum" in found
    assert "rounds: allowed: key=value, for example rounds=10" in found
    assert any(line.startswith("local: got 3, allowed: a group of keys") for line in found)
    assert len(found) == 7


def test_names_that_are_paths_are_refused() -> None:
    for name in ("../x", "/x", ".x", "a/b", "", "x" * 65):
        assert faults(f"name={name!r}")[0].startswith("name: got")


def test_an_unknown_federation_lists_those_there_are() -> None:
    (line,) = faults(name="demmo")
    assert "allowed: default, demo or the path of a YAML file; did you mean demo?" in line


def test_name_and_package_have_no_default() -> None:
    assert faults(name="default") == ["name: is missing; add name=VALUE", "package: is missing; add package=VALUE"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ([*SECURE, "mode.name=buffered"], "mode.name"),
        ([*SECURE, "codec.up=fp16"], "codec.up"),
        ([*SECURE, "robust.method=group_median", "robust.groups=4"], "cohort.quorum"),
        ([*SECURE, "secure.largest_code=8000000", "local.weight=sequences"], "secure.largest_code"),
        (["secure.enabled=true"], "cohort.quorum"),
        (["privacy.noise=central", "privacy.noise_multiplier=1"], "privacy.clip_norm"),
        (["privacy.noise=central", "privacy.clip_norm=1"], "privacy.noise_multiplier"),
        ([*NOISE, "local.weight=sequences"], "local.weight"),
        ([*NOISE, "robust.method=group_median", "cohort.quorum=3"], "robust.method"),
        ([*NOISE, "privacy.noise=distributed"], "privacy.noise"),
        (["robust.method=group_median", "robust.groups=2", "cohort.quorum=3"], "robust.groups"),
        (["robust.method=group_median", "cohort.quorum=2"], "robust.groups"),
        (["robust.method=group_median", "cohort.quorum=3", "mode.name=buffered", "mode.buffer=3"], "robust.method"),
        (["mode.name=buffered", "mode.buffer=4"], "mode.buffer"),
        (["cohort.longest_deadline_s=5"], "cohort.longest_deadline_s"),
        (["phases.schedule=core", "phases.warmup_rounds=0"], "phases.warmup_rounds"),
        (["adapter.targets=[q_proj, q_proj]"], "adapter.targets"),
        (["cohort.size=9000", "local.weight=sequences", "local.weight_cap=1024"], "local.weight_cap"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], field: str) -> None:
    assert [line.partition(":")[0] for line in faults(*overrides)] == [field]


@pytest.mark.parametrize(
    "overrides",
    [
        SECURE,
        [*SECURE, "robust.method=group_median", "robust.groups=3"],
        [*SECURE, *NOISE, "privacy.noise=distributed"],
        NOISE,
        ["mode.name=buffered", "mode.buffer=3"],
        ["phases.schedule=core"],
        ["rounds=1"],
    ],
)
def test_settings_that_go_together_are_taken(overrides: list[str]) -> None:
    assert isinstance(load_federation("demo", overrides), FederationConfig)


@pytest.mark.parametrize("method", ["median", "krum", "trimmed_mean"])
def test_methods_that_need_every_update_say_why_they_are_not_there(method: str) -> None:
    (line,) = faults(f"robust.method={method}")
    assert "allowed: 'none' or 'group_median'" in line and "folds and forgets" in line


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", ".inf", "-1", "1e30", "[1]", "x"])
def test_numbers_are_finite_and_bounded(value: str) -> None:
    assert faults(f"local.learning_rate={value}")[0].startswith("local.learning_rate: got")


def test_selected_devices_are_rounded_up_but_not_by_float_dust() -> None:
    sizes = [(10, 1.1, 11), (10, 1.2, 12), (3, 1.1, 4), (7, 1.0, 7)]
    for size, over, expected in sizes:
        config = load_federation("demo", [f"cohort.size={size}", f"cohort.over_selection={over}"])
        assert config.cohort.selected == expected


def test_overrides_of_a_finished_configuration_are_checked_like_the_first() -> None:
    config = load_federation("demo")
    assert with_overrides(config, ["rounds=99"]).model_dump() == config.model_dump() | {"rounds": 99}
    with pytest.raises(ConfigError, match="did you mean rounds"):
        with_overrides(config, ["round=99"])


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    for text in ("a: [", "- 1", "x" * (MAX_FILE_BYTES + 1), "!!python/object/apply:os.getcwd []"):
        bad.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_federation(str(bad))
        assert "\n" not in str(caught.value) and str(bad) in str(caught.value)
    config = tmp_path / "config.json"
    for text in ("{", "[]", "[" * 100_000):
        config.write_text(text)
        with pytest.raises(UserError, match="config"):
            config_from_json(config)
    config.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match="rounds: is missing"):
        config_from_json(config)
