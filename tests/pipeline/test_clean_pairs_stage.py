"""stage=clean of pairs: what the configuration says reaches the shards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.formats.errors import ConfigError
from pipeline.artifacts import Layout
from pipeline.config import load_configs
from pipeline.flow import STAGES, execute


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (8, 96, 128, 3), dtype=np.uint8)
    for number, picture in enumerate(noise):
        Image.fromarray(picture).save(folder / f"{number}.png")
    rows = [{"image": f"{number}.png", "text": f"noise, picture number {number}"} for number in range(8)]
    rows.append({"image": "../outside.png", "text": "a path that leaves the folder"})
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_pairs_become_shards_and_counts(pairs: Path, tmp_path: Path) -> None:
    overrides = ["stage=clean", "data=pairs", f"data.path={pairs}", "data.held_out_modulus=2", "data.workers=1"]
    config = next(iter(load_configs(overrides).values()))
    layout = Layout(tmp_path / "run")
    assert execute(STAGES["clean"], config, layout)
    figures = json.loads(layout.metrics("clean").read_text())
    assert (figures["pairs"], figures["kept"], figures["dropped"]) == (9, 8, {"path_outside": 1})
    names: list[str] = []
    for path in layout.corpus.glob("*.tar"):
        with tarfile.open(path) as shard:
            names += shard.getnames()
    assert sum(name.endswith(".jpg") for name in names) == 8
    assert not execute(STAGES["clean"], config, layout)


def test_pairs_are_refused_by_every_other_stage(pairs: Path) -> None:
    for stage in ([], ["stage=teacher"]):
        with pytest.raises(ConfigError, match="data: pairs of media and text have stage=clean alone"):
            load_configs(["data=pairs", f"data.path={pairs}", *stage])
