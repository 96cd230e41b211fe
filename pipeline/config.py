"""The validated configuration: Hydra composes conf/, pydantic checks it once, all faults at once."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from edge_runtime.formats.errors import ConfigError, UserError
from pipeline.distillation.chain import ChainStep, Link, plan_chain, require_vocabularies
from pipeline.settings import Config

_VARIANTS = {"from_scratch", "local", "hub", "pairs", "python_docs", "python_packages"}  # of teacher and data
CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


def load_configs(overrides: Sequence[str]) -> dict[str, Config]:
    """Compose and validate one Config for each submodel of the family, in its order.

    ``submodel=NAME`` among the overrides makes a family of that one, unless ``stage`` names one step of a run
    of the whole family.

    Raises:
        ConfigError: One line for each fault: misspelt keys and options, values out of range.
    """
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        faults, usable = _split_overrides(overrides)
        try:
            values, missing = _compose(usable)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError("\n".join([*faults, _one_line(error)])) from None
        faults += [f"{key}: is missing; add {key}=VALUE" for key in missing]
        first, errors = _validate(values)
        if faults or errors or first is None:
            raise ConfigError("\n".join(dict.fromkeys([*faults, *errors])))
        family = first.family
        if any(override.startswith("submodel=") for override in usable):
            if first.stage is None:
                family = [first.submodel.name]
                usable.append(f"family=[{family[0]}]")
            elif first.submodel.name not in family:
                raise ConfigError(f"submodel: got {first.submodel.name!r}, allowed in this family: {', '.join(family)}")
        members = {name: _member(usable, name) for name in family}
    return {step.name: members[step.name] for step in family_chain(members)}


def family_chain(members: dict[str, Config]) -> tuple[ChainStep, ...]:
    """The submodels of a family, each after those that it is cut from or learns from.

    Raises:
        ConfigError: They are no chain.
    """
    submodels = [config.submodel for config in members.values()]
    links = [
        Link(each.name, each.cut_from, each.checkpoint, each.learns_from, each.trims, each.whole) for each in submodels
    ]
    aligned = any(config.distill.loss == "aligned" for config in members.values())
    try:
        steps = plan_chain(links)
        require_vocabularies(links, aligned=aligned)
        return steps
    except UserError as error:
        raise ConfigError(str(error)) from None


def config_digest(configs: dict[str, Config]) -> str:
    """Twelve hex digits that name this configuration; what is run of it does not count."""
    left_out = {"stage", "dry_run", "action", "candidate", "package", "adapter"}
    values = {name: config.model_dump(mode="json", exclude=left_out) for name, config in configs.items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _member(overrides: Sequence[str], name: str) -> Config:
    options = _options("submodel")
    if name not in options:
        raise ConfigError(f"family: got {name!r}, allowed: {', '.join(options)}{_did_you_mean(name, options)}")
    config, errors = _validate(_compose([*overrides, f"submodel={name}"])[0])
    if config is None:
        raise ConfigError("\n".join(errors))
    return config


def _compose(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values, keys that conf/ leaves to the user and the user left out)."""
    composed = compose("config", list(overrides))
    values = OmegaConf.to_container(composed, resolve=True)
    named = {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
    return named, sorted(OmegaConf.missing_keys(composed))


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(one line for each override that Hydra cannot take, the others)."""
    groups = [path.name for path in sorted(CONF_DIR.iterdir()) if path.is_dir()]
    chosen = [o for o in overrides if o.partition("=")[0] in groups]
    usable: list[str] = []
    faults: list[str] = []
    for override in [*chosen, *(o for o in overrides if o not in chosen)]:
        key, equals, value = override.partition("=")
        if not equals or key.startswith(("+", "~")):
            faults.append(f"{override}: allowed: KEY=VALUE with a key that conf/ has")
        elif key in groups and value not in _options(key):
            allowed = ", ".join(_options(key))
            faults.append(f"{key}: got {value!r}, allowed: {allowed}{_did_you_mean(value, _options(key))}")
        else:
            try:
                compose("config", [*usable, override])
                usable.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                keys = list(_keys(OmegaConf.to_container(compose("config", usable), resolve=False)))
                known = key in keys
                hint = _one_line(error) if known else f"no such key{_did_you_mean(key, keys)}"
                faults.append(f"{key}: {hint}")
    return faults, usable


def _validate(values: dict[str, Any]) -> tuple[Config | None, list[str]]:
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        return None, [_fault_line(fault, values) for fault in error.errors()]


def _fault_line(fault: Any, values: dict[str, Any]) -> str:
    path = [str(part) for part in fault["loc"] if part not in _VARIANTS]
    name = ".".join(path) or "configuration"
    if fault["type"] == "extra_forbidden":
        return f"{name}: no such key here"
    if fault["type"] == "value_error":
        return f"{name}: {fault['ctx']['error']}" if path else str(fault["ctx"]["error"])
    if fault["type"] == "union_tag_invalid":
        return f"{name}.kind: got {fault['ctx']['tag']!r}, allowed: {fault['ctx']['expected_tags']}"
    if fault["type"] == "missing":
        return f"{name}: is missing"
    return f"{name}: got {fault['input']!r}, allowed: {fault['msg'].removeprefix('Input should be ')}"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _did_you_mean(word: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
