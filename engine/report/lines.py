"""Lines over rounds as inline SVG: a value of several series, each with the interval of its mean as a band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from engine.report.charts import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, nice_ticks

NUM_COLOURS = 7
# Room for ticks such as -0.085.
LEFT = 64
_ROOM = 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """A value with its interval; ends that are unknown are the value."""

    x: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """A series.

    Attributes:
        name: of the series.
        colour: number of its colour.
        points: in order of x.
    """

    name: str
    colour: int
    points: tuple[Point, ...]


def line_chart(lines: Sequence[Line], *, title: str, x_title: str, y_title: str, mark: float | None = None) -> Markup:
    """The chart of a value.

    Args:
        lines: series; those without points are left out.
        title: of the chart, for readers who do not see it.
        x_title, y_title: of the axes.
        mark: value at which a dashed line is drawn.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return Markup('<p class="note">Not measured.</p>')
    points = [point for line in drawn for point in line.points]
    levels = [value for point in points for value in (point.value, point.low, point.high)]
    frame = _Frame.around([point.x for point in points], levels if mark is None else [*levels, mark])
    parts = [frame.axes(x_title, y_title)]
    if mark is not None:
        y = frame.y(mark)
        parts.append(f'<path class="axis" stroke-dasharray="5 4" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    parts += [_drawn(line, frame) for line in drawn]
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    left: int
    right: int
    low: float
    high: float

    @classmethod
    def around(cls, positions: Sequence[int], levels: Sequence[float]) -> _Frame:
        low, high = min(levels), max(levels)
        room = (high - low) * _ROOM or max(abs(high), 1e-3) * _ROOM
        return cls(min(positions), max(max(positions), min(positions) + 1), low - room, high + room)

    def x(self, position: float) -> float:
        return LEFT + (position - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, level: float) -> float:
        return HEIGHT - BOTTOM - (level - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_title: str, y_title: str) -> str:
        floor, parts = HEIGHT - BOTTOM, []
        for tick in nice_ticks(self.low, self.high, 5):
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in nice_ticks(self.left, self.right, 10):
            if math.isclose(tick, round(tick)):
                x = self.x(tick)
                parts.append(f'<path class="tick" d="M{x:.1f} {floor}v4"/>')
                parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{round(tick)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>')
        side = (TOP + floor) / 2
        parts.append(
            f'<text transform="translate(12 {side}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
        )
        return "".join(parts)


def _drawn(line: Line, frame: _Frame) -> str:
    """A band, a line and dots, so that a single round shows too."""
    points = line.points
    upper = [f"{frame.x(point.x):.1f} {frame.y(point.high):.1f}" for point in points]
    lower = [f"{frame.x(point.x):.1f} {frame.y(point.low):.1f}" for point in reversed(points)]
    path = "L".join(f"{frame.x(point.x):.1f} {frame.y(point.value):.1f}" for point in points)
    dots = "".join(
        f'<circle cx="{frame.x(point.x):.1f}" cy="{frame.y(point.value):.1f}" r="2.6"><title>{escape(line.name)}, round'
        f" {point.x}: {point.value:.4g} ({point.low:.4g} to {point.high:.4g})</title></circle>"
        for point in points
    )
    return (
        f'<g class="line s{line.colour % NUM_COLOURS}"><path class="band" d="M{"L".join([*upper, *lower])}Z"/>'
        f'<path class="path" d="M{path}"/>{dots}</g>'
    )
