"""The picture of what 4 bits cost: one cell a weight, shades and places that follow the figures."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from edge_runtime.formats.decoder import PROJECTIONS, module_name
from pipeline.report.sensitivity import draw

SVG = "{http://www.w3.org/2000/svg}"


def _figures(layers: int, *, tied: bool = True) -> dict[str, Any]:
    names = [f"{module_name(layer, p)}.weight" for layer in range(layers) for p in PROJECTIONS]
    costs = {name: 0.001 * (1 + index) for index, name in enumerate(names)}
    costs |= {"model.embed_tokens.weight": 0.9} | ({} if tied else {"lm_head.weight": 0.3})
    curve = [{"int8": 9 * n, "weight_ratio": 0.28 + 0.08 * n, "kl": 0.04 / 4**n, "expected_kl": 0.05 / 4**n}
             for n in range(4)]  # fmt: skip
    return {"tokens": 512, "by_weight": costs, "curve": curve}


def _parse(figures: dict[str, Any]) -> ElementTree.Element:
    return ElementTree.fromstring(draw(figures).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 6, 40])
def test_every_weight_has_one_cell_inside_the_picture(layers: int, tied: bool) -> None:
    figures = _figures(layers, tied=tied)
    root = _parse(figures)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    titles = [group.find(f"{SVG}title").text for group in root.iter(f"{SVG}g") if group.find(f"{SVG}rect") is not None]  # type: ignore[union-attr]
    assert sorted(str(title).partition(":")[0] for title in titles) == sorted(figures["by_weight"])
    boxes = [
        tuple(float(rect.attrib[key]) for key in ("x", "y", "width", "height")) for rect in root.iter(f"{SVG}rect")
    ]
    assert all(x >= 0 and y >= 0 and w > 0 and h > 8 and x + w <= width and y + h < height for x, y, w, h in boxes)
    for i, (x, y, w, h) in enumerate(boxes):
        assert not [b for b in boxes[:i] if x < b[0] + b[2] and b[0] < x + w and y < b[1] + b[3] and b[1] < y + h]
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert ("9e+02" in texts) == (layers <= 16), "numbers where cells are high enough"
    assert {"embedding", "layer 0", f"layer {(layers - 1) // 2 * 2}"} <= set(texts)


def test_what_costs_more_is_darker_and_a_hundredth_is_blank() -> None:
    figures = _figures(2)
    figures["by_weight"] |= {
        "model.layers.0.self_attn.q_proj.weight": 0.009,
        "model.layers.1.mlp.down_proj.weight": 0.0,
    }
    shades = {}
    for group in _parse(figures).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        if rect is not None and title is not None:
            shades[str(title.text).partition(":")[0]] = float(rect.attrib["fill-opacity"])
    costs = figures["by_weight"]
    order = sorted(costs, key=lambda name: costs[name])
    assert [shades[name] for name in order] == sorted(shades.values())
    assert shades["model.embed_tokens.weight"] == 0.6 and shades["model.layers.0.self_attn.q_proj.weight"] == 0
    assert shades["model.layers.1.mlp.down_proj.weight"] == 0
    tenth = figures["by_weight"] | {"model.layers.1.self_attn.k_proj.weight": 0.09}
    assert 'fill-opacity="0.300"' not in draw(figures)
    assert 'fill-opacity="0.300"' in draw(figures | {"by_weight": tenth}), "a tenth is half way"


def test_the_curve_falls_to_the_right_and_marks_the_choice() -> None:
    figures = _figures(3)
    without = _circles(figures)
    assert len(without) == 4 and [x for x, _ in without] == sorted(x for x, _ in without)
    assert [y for _, y in without] == sorted(y for _, y in without), "less divergence lies lower"
    gaps = [later[1] - earlier[1] for earlier, later in pairwise(without)]
    assert max(gaps) - min(gaps) < 0.3, "logarithmic: equal factors, equal steps"
    figures["chosen"] = {"int8": 5, "weight_ratio": 0.33, "kl": 0.02, "expected_kl": 0.02, "weights": []}
    drawn = draw(figures)
    assert len(_circles(figures)) == 5 and "chosen" in drawn and "5 weights in 8 bits: 33.0 % of fp16, KL 0.02" in drawn
    assert "chosen" not in draw(_figures(3))


def test_one_point_is_no_curve() -> None:
    figures = _figures(2)
    figures["curve"] = figures["curve"][:1]
    assert _circles(figures) == [] and "% of fp16" not in draw(figures)


def test_names_are_escaped() -> None:
    figures = _figures(1)
    figures["curve"][1]["int8"] = "<script>"
    assert "<script>" not in draw(figures)


def _circles(figures: dict[str, Any]) -> list[tuple[float, float]]:
    found = re.findall(r'<circle class="marker \w+" cx="([\d.]+)" cy="([\d.]+)"', draw(figures))
    return [(float(x), float(y)) for x, y in found]
