"""The picture of what 4 bits cost: weight by weight as a heat map, and what 8 bits for some of them win back.

Drawn as ``pareto`` is. Shades are logarithmic: the darkest weight costs the most, one that costs a hundredth is blank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from edge_runtime.formats.decoder import EMBEDDING, HEAD, PROJECTIONS, module_name
from pipeline.report.pareto import Axis, axis, ticks

WIDTH, TOP, BOTTOM = 920, 46, 58
MAP_LEFT, MAP_RIGHT = 76, 560
CURVE_LEFT, CURVE_RIGHT = 640, 896
CELL_HEIGHT_MAX, CELL_HEIGHT_MIN, MAP_HEIGHT_MIN = 44.0, 11.0, 260.0
_NUMBERED_HEIGHT_MIN = 15.0  # of a cell that a number fits into
_DECADES = 2.0
_DARKEST = 0.6  # numbers stay readable on it
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

Figures = Mapping[str, Any]


def draw(figures: Figures) -> str:
    """Return the picture as an ``<svg>`` element.

    Args:
        figures: ``sensitivity`` of the quantize stage's metrics: ``by_weight`` and ``curve``, perhaps ``chosen``.
    """
    costs: Mapping[str, float] = figures["by_weight"]
    layers = 1 + max((int(found[1]) for name in costs if (found := _LAYER.match(name))), default=-1)
    rows = layers + 1
    cell = min(CELL_HEIGHT_MAX, max(CELL_HEIGHT_MIN, MAP_HEIGHT_MIN / rows))
    height = TOP + max(rows * cell, MAP_HEIGHT_MIN) + BOTTOM
    parts = [*_heat_map(costs, layers, cell), *_curve(figures, height)]
    title = "What 4 bits cost: the divergence that each weight alone causes, and the divergence left by bytes"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{title}" class="pareto sensitivity">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def _heat_map(costs: Mapping[str, float], layers: int, cell: float) -> Iterator[str]:
    """A row for the embedding and a head of its own, then one a layer; a column a projection."""
    width = (MAP_RIGHT - MAP_LEFT) / len(PROJECTIONS)
    darkest = max(costs.values())
    yield _text(MAP_LEFT, 16, "divergence from fp by weight, in thousandths of a nat", "axis", "start")
    for column, projection in enumerate(PROJECTIONS):
        yield _text(MAP_LEFT + (column + 0.5) * width, TOP - 8, projection, "tick")
    outer = [(name, f"{name}.weight") for name in (EMBEDDING, HEAD) if f"{name}.weight" in costs]
    whole = (MAP_RIGHT - MAP_LEFT) / max(len(outer), 1)
    yield _text(MAP_LEFT - 8, TOP + cell / 2 + 4, "embedding", "tick", "end")
    for column, (_, name) in enumerate(outer):
        yield from _cell(name, costs[name], darkest, MAP_LEFT + column * whole, TOP, whole, cell)
    for layer in range(layers):
        y = TOP + (layer + 1) * cell
        if cell >= _NUMBERED_HEIGHT_MIN or layer % 2 == 0:
            yield _text(MAP_LEFT - 8, y + cell / 2 + 4, f"layer {layer}", "tick", "end")
        for column, projection in enumerate(PROJECTIONS):
            name = f"{module_name(layer, projection)}.weight"
            yield from _cell(name, costs[name], darkest, MAP_LEFT + column * width, y, width, cell)


def _cell(name: str, cost: float, darkest: float, x: float, y: float, width: float, height: float) -> Iterator[str]:
    shade = _DARKEST * max(0.0, 1 + math.log10(max(cost, 1e-30) / darkest) / _DECADES)
    yield (
        f'<g><title>{escape(name)}: {cost:.3g} nats</title><rect fill="currentColor" fill-opacity="{shade:.3f}" '
        f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}"/></g>'
    )
    if height >= _NUMBERED_HEIGHT_MIN:
        yield _text(x + width / 2, y + height / 2 + 4, f"{cost * 1e3:.2g}", "label")


def _curve(figures: Figures, height: float) -> Iterator[str]:
    """Divergence over bytes, from 4 bits for all weights to 8: measured, and as sums of single weights foretell."""
    points = [point for point in figures["curve"] if point["kl"] > 0]
    if len(points) < 2:
        return
    x = axis([100 * point["weight_ratio"] for point in points], CURVE_LEFT, CURVE_RIGHT, logarithmic=False)
    y = axis([point["kl"] for point in points], height - BOTTOM, TOP, logarithmic=True)
    yield from _grid(x, y, height)
    foretold = [point | {"kl": point["expected_kl"]} for point in points if y.low < point["expected_kl"] < y.high]
    yield f'<path class="teacher" fill="none" d="M {" L ".join(_places(foretold, x, y))}"/>' if foretold else ""
    yield f'<path class="front" d="M {" L ".join(_places(points, x, y))}"/>'
    for point in points:
        yield _point(point, x, y, 4, "fp16")
    if (chosen := figures.get("chosen")) is not None and y.low < chosen["kl"] < y.high:
        yield _point(chosen, x, y, 6, "onnx")
        at = x.pixel(100 * chosen["weight_ratio"]), y.pixel(chosen["kl"])
        yield _text(at[0] + 10, at[1] - 6, "chosen", "label", "start")


def _grid(x: Axis, y: Axis, height: float) -> Iterator[str]:
    bottom = height - BOTTOM
    for tick in ticks(x):
        at = x.pixel(tick)
        yield f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom:.1f}"/>'
        yield _text(at, bottom + 18, f"{tick:g}", "tick")
    for tick in ticks(y):
        at = y.pixel(tick)
        yield f'<line class="grid" x1="{CURVE_LEFT}" y1="{at:.1f}" x2="{CURVE_RIGHT}" y2="{at:.1f}"/>'
        yield _text(CURVE_LEFT - 8, at + 4, f"{tick:g}", "tick", "end")
    yield _text((CURVE_LEFT + CURVE_RIGHT) / 2, height - 14, "weights, % of fp16", "axis")
    yield _text(CURVE_LEFT - 60, 16, "KL to fp with 8 bits for the dearest weights", "axis", "start")


def _places(points: Sequence[Figures], x: Axis, y: Axis) -> Iterable[str]:
    return (f"{x.pixel(100 * point['weight_ratio']):.1f} {y.pixel(point['kl']):.1f}" for point in points)


def _point(point: Figures, x: Axis, y: Axis, radius: float, kind: str) -> str:
    text = f"{point['int8']} weights in 8 bits: {100 * point['weight_ratio']:.1f} % of fp16, KL {point['kl']:.3g}"
    (place,) = _places([point], x, y)
    cx, cy = place.split()
    return f'<g><title>{escape(text)}</title><circle class="marker {kind}" cx="{cx}" cy="{cy}" r="{radius}"/></g>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
