"""What a package allows a federation to train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from edge_runtime.formats.errors import ConfigError
from edge_runtime.formats.manifest import FOREIGN_CONTAINERS, AdapterSlots
from pipeline.settings import RUN_CONTAINERS, Container
from server.following import check_package


def _check(slots: dict[str, AdapterSlots]) -> list[str]:
    config: Any = SimpleNamespace(
        local=SimpleNamespace(sequence_tokens=64), adapter=SimpleNamespace(targets=("q_proj", "v_proj"), ranks=(4, 8))
    )
    containers = {name: SimpleNamespace(adapters=each) for name, each in slots.items()}
    manifest: Any = SimpleNamespace(decoder=SimpleNamespace(context_tokens=256), containers=containers)
    return check_package(config, manifest)


def test_files_for_other_runtimes_take_no_adapter_and_stop_no_federation() -> None:
    slots = {"onnx": AdapterSlots(("q_proj", "v_proj")), "tflite": AdapterSlots(("q_proj", "v_proj"), 4)}
    foreign = dict.fromkeys(FOREIGN_CONTAINERS, AdapterSlots())
    assert _check(slots | foreign) == _check(slots) == ["adapter.ranks: 8 is more than tflite can load (4)"]


def test_a_container_that_devices_run_must_take_the_projections() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: .*none \(onnx takes no others\)"):
        _check({"onnx": AdapterSlots(), "gguf": AdapterSlots()})


def test_every_container_is_one_that_runs_or_one_for_others() -> None:
    known = {name for part in get_args(Container) for name in (get_args(part) or (part,))}
    assert known == {*RUN_CONTAINERS, *FOREIGN_CONTAINERS}
