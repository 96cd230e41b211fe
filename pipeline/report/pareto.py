"""The picture of the family: bytes against perplexity, with the speed as the markers' area.

Drawn as SVG by hand, coloured by the page's CSS classes, so that it needs nothing but a browser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 920, 540
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 24, 64
MARKER_AREA_MIN, MARKER_AREA_MAX = 60.0, 900.0
CHARACTER_WIDTH, LINE_HEIGHT = 6.7, 16.0


@dataclass(frozen=True, slots=True)
class Point:
    """One package, or an fp16 student (``container`` "fp16", no speed), in the picture."""

    label: str
    container: str
    size_bytes: float
    perplexity: float
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``; logarithmic or linear."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def pixel(self, value: float) -> float:
        """Return where ``value`` is drawn."""
        low, high, at = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that text or a marker covers, in pixels."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Return the common area in square pixels."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0.0) * max(height, 0.0)


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other point beats, ordered by the first coordinate.

    Every coordinate is better when smaller. A point is beaten by one that is nowhere larger and
    somewhere smaller; of equal points all stay.
    """

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

    front = [i for i, point in enumerate(points) if not any(beats(rival, point) for rival in points)]
    return sorted(front, key=lambda i: tuple(points[i]))


def draw(points: Sequence[Point], teacher_perplexity: float | None = None) -> str:
    """Return the picture as an ``<svg>`` element.

    Args:
        points: Packages and fp16 students.
        teacher_perplexity: Drawn as a dashed line.
    """
    perplexities = [p.perplexity for p in points] + ([] if teacher_perplexity is None else [teacher_perplexity])
    spread = max(perplexities) / min(perplexities)
    x = axis([p.size_bytes for p in points], LEFT, WIDTH - RIGHT, logarithmic=True)
    y = axis(perplexities, HEIGHT - BOTTOM, TOP, logarithmic=spread > 8)
    packages = [p for p in points if p.container != "fp16"]
    fastest = max((p.tokens_per_s or 0.0 for p in packages), default=0.0)
    parts = [*_grid(x, y), *_teacher_line(teacher_perplexity, y), *_front_line(packages, x, y)]
    for point in sorted(points, key=lambda p: -_radius(p, fastest)):
        parts.append(_marker(point, x.pixel(point.size_bytes), y.pixel(point.perplexity), _radius(point, fastest)))
    parts += _labels(points, x, y, fastest, _front_corners(packages, x, y))
    title = "Size against perplexity of every package; larger markers run faster"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" class="pareto">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def marker(container: str, x: float = 8, y: float = 8, radius: float = 6) -> str:
    """Return the shape that stands for a container: the legend draws with it too."""
    name = f'class="marker {escape(container)}"'
    if container == "tflite":
        side = radius * math.sqrt(math.pi)
        return f'<rect {name} x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}"/>'
    if container == "tflite_legacy":
        half = radius * math.sqrt(math.pi / 2)
        corners = ((x, y - half), (x + half, y), (x, y + half), (x - half, y))
        return f'<polygon {name} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>'
    return f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def axis(values: Sequence[float], start: float, end: float, *, logarithmic: bool) -> Axis:
    """Return an axis with a margin around the values; a linear one does not go below zero."""
    low, high = min(values), max(values)
    if logarithmic:
        margin = max((high / low) ** 0.12, 1.25)
        return Axis(low / margin, high * margin, start, end, True)
    margin = max((high - low) * 0.16, high * 0.05)
    return Axis(max(low - margin, 0.0), high + margin, start, end, False)


def ticks(axis: Axis) -> list[float]:
    """Return round values inside the axis: 1, 2, 5 a decade, or four to eight equal steps."""
    if axis.logarithmic:
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    else:
        rough = (axis.high - axis.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        ticks = [step * i for i in range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)]
    return [tick for tick in ticks if axis.low <= tick <= axis.high]


def _grid(x: Axis, y: Axis) -> Iterable[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in ticks(x):
        at = x.pixel(tick)
        yield f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{bottom + 20}" text-anchor="middle">{tick / 1e6:g}</text>'
    for tick in ticks(y):
        at = y.pixel(tick)
        yield f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 10}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
    middle = (LEFT + right) / 2
    yield f'<text class="axis" x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">file size in MB, logarithmic</text>'
    turned = f'transform="translate(20 {(TOP + bottom) / 2}) rotate(-90)"'
    yield f'<text class="axis" {turned} text-anchor="middle">held-out perplexity, lower is better</text>'


def _teacher_line(perplexity: float | None, y: Axis) -> Iterable[str]:
    if perplexity is None:
        return
    at, right = y.pixel(perplexity), WIDTH - RIGHT
    yield f'<line class="teacher" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>'
    yield f'<text class="note" x="{right - 6}" y="{at + 16:.1f}" text-anchor="end">teacher {perplexity:.2f}</text>'


def _front_line(packages: Sequence[Point], x: Axis, y: Axis) -> Iterable[str]:
    corners = _front_corners(packages, x, y)
    if corners:
        yield f'<path class="front" d="M {" L ".join(f"{a:.1f} {b:.1f}" for a, b in corners)}"/>'


def _front_corners(packages: Sequence[Point], x: Axis, y: Axis) -> list[tuple[float, float]]:
    """A staircase: between two packages nothing better than the smaller one exists."""
    front = [packages[i] for i in pareto_front([(p.size_bytes, p.perplexity) for p in packages])]
    corners: list[tuple[float, float]] = []
    for point in front:
        at = x.pixel(point.size_bytes), y.pixel(point.perplexity)
        corners += [(at[0], corners[-1][1])] if corners else []
        corners.append(at)
    return [*corners, (WIDTH - RIGHT, corners[-1][1])] if corners else []


def _radius(point: Point, fastest: float) -> float:
    if point.tokens_per_s is None or fastest <= 0:
        return 5.0
    area = max(MARKER_AREA_MAX * point.tokens_per_s / fastest, MARKER_AREA_MIN)
    return math.sqrt(area / math.pi)


def _marker(point: Point, x: float, y: float, radius: float) -> str:
    speed = "" if point.tokens_per_s is None else f", {point.tokens_per_s:.0f} tokens/s"
    text = f"{point.label}: {point.size_bytes / 1e6:.3g} MB, perplexity {point.perplexity:.2f}{speed}"
    return f"<g><title>{escape(text)}</title>{marker(point.container, x, y, radius)}</g>"


def _labels(
    points: Sequence[Point], x: Axis, y: Axis, fastest: float, line: Sequence[tuple[float, float]]
) -> Iterable[str]:
    """Text beside each marker, moved along rings until it covers no text, marker or part of the line."""
    centres = [(x.pixel(p.size_bytes), y.pixel(p.perplexity), _radius(p, fastest)) for p in points]
    taken = [Box(cx - r, cy - r, 2 * r, 2 * r) for cx, cy, r in centres]
    for (x1, y1), (x2, y2) in pairwise(line):
        taken.append(Box(min(x1, x2) - 2, min(y1, y2) - 2, abs(x2 - x1) + 4, abs(y2 - y1) + 4))
    for point, (cx, cy, radius) in zip(points, centres, strict=True):
        text = point.label if point.tokens_per_s is None else f"{point.label} · {point.tokens_per_s:.0f}/s"
        chosen = _place(len(text) * CHARACTER_WIDTH, cx, cy, radius, taken)
        taken.append(chosen)
        near_x = min(max(cx, chosen.x), chosen.x + chosen.width)
        near_y = min(max(cy, chosen.y), chosen.y + chosen.height)
        if math.hypot(near_x - cx, near_y - cy) > radius + 8:
            yield f'<line class="leader" x1="{cx:.1f}" y1="{cy:.1f}" x2="{near_x:.1f}" y2="{near_y:.1f}"/>'
        at = f'x="{chosen.x:.1f}" y="{chosen.y + LINE_HEIGHT - 4:.1f}"'
        yield f'<text class="label {escape(point.container)}" {at}>{escape(text)}</text>'


def _place(width: float, cx: float, cy: float, radius: float, taken: Sequence[Box]) -> Box:
    """Return the free box nearest to the marker, or the one that covers least."""
    frame = Box(LEFT, TOP, WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - TOP)
    best, best_cost = frame, math.inf
    for ring in range(6):
        reach = radius + 4 + ring * LINE_HEIGHT
        for step in range(16):
            angle = step * math.pi / 8
            dx, dy = math.cos(angle), math.sin(angle)
            x = cx + dx * reach - width * (1 - dx) / 2
            box = Box(x, cy + dy * reach - LINE_HEIGHT * (1 - dy) / 2, width, LINE_HEIGHT)
            outside = width * LINE_HEIGHT - box.overlap(frame)
            cost = 10 * outside + 10 * sum(box.overlap(other) for other in taken) + reach
            if cost < best_cost:
                best, best_cost = box, cost
    return best
