"""Histograms as inline SVG: several series over the same bins, each as the share of its own samples.

Colours and dashes come from the style sheet by class (`s0`, `s1`, ...), so that dark mode and print can change them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from engine.job.columns import Column

NUM_BINS = 36
WIDTH, HEIGHT = 440, 254
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 48
LOG_FLOOR = 1e-3  # below this a risk or a KLDB is zero to every reader


@dataclass(frozen=True, slots=True)
class Axis:
    """Bin edges in the coordinate that is drawn: log10 of the value on a logarithmic axis, else the value itself."""

    edges: np.ndarray
    log: bool

    def place(self, values: np.ndarray) -> np.ndarray:
        """Drawn coordinates of values; what is outside the axis goes to its end."""
        values = np.log10(np.maximum(values, LOG_FLOOR)) if self.log else values
        return np.clip(values, self.edges[0], self.edges[-1])

    def value(self, coordinate: float) -> float:
        """The value at a drawn coordinate."""
        return float(10**coordinate if self.log else coordinate)

    def ticks(self) -> list[tuple[float, str]]:
        """Coordinates and texts of the ticks."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        if not self.log:
            return [(tick, f"{tick:g}") for tick in nice_ticks(low, high, 6)]
        decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        floor = math.log10(LOG_FLOOR)
        # From the text: the end of an axis may be above all floats.
        return [(float(power), ("≤ " if power == floor else "") + f"{float(f'1e{power}'):g}") for power in decades]


def make_axis(values: np.ndarray, log: bool) -> Axis:
    """An axis over all values, the same bins for every series of a chart."""
    if log:
        values = np.log10(np.maximum(values, LOG_FLOOR))
        low, high = math.floor(values.min()), math.ceil(values.max())
        return Axis(np.linspace(low, max(high, low + 1), NUM_BINS + 1), True)
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-6:
        low, high = low - 0.05, high + 0.05
    return Axis(np.linspace(low, high, NUM_BINS + 1), False)


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers from `low` to `high`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def histogram(score: Column, series: list[tuple[str, np.ndarray]]) -> Markup:
    """The chart of a score.

    Args:
        score: its column.
        series: name and values of each; series without values are kept out of the drawing but keep their colour.
    """
    filled = [values for _, values in series if len(values)]
    if not filled:
        return Markup('<p class="note">No scored sample.</p>')
    axis = make_axis(np.concatenate(filled), score.axis == "log")
    shares = [_shares(axis, values) for _, values in series]
    top = max(float(share.max()) for share in shares) * 1.05
    lines = [_frame(score, axis, top)]
    for number, ((name, values), share) in enumerate(zip(series, shares, strict=True)):
        if len(values):
            lines.append(_series(number, name, axis, share, top, float(np.median(values)), score.unit.name))
    label = f"Histogram of {score.title} by request"
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">' + "".join(lines) + "</svg>"
    )


def axis_title(score: Column) -> str:
    """The title of an axis, with unit and scale."""
    notes = [score.unit.name, "log scale" if score.axis == "log" else ""]
    note = ", ".join(filter(None, notes))
    return f"{score.title} ({note})" if note else score.title


def _shares(axis: Axis, values: np.ndarray) -> np.ndarray:
    counts = np.histogram(axis.place(values), bins=axis.edges)[0]
    return counts / max(len(values), 1)


def _x(axis: Axis, coordinate: float) -> float:
    low, high = float(axis.edges[0]), float(axis.edges[-1])
    return LEFT + (coordinate - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(share: float, top: float) -> float:
    return HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM)


def _frame(score: Column, axis: Axis, top: float) -> str:
    """Grid lines, ticks and axis titles."""
    floor, parts = HEIGHT - BOTTOM, []
    for tick in nice_ticks(0, top, 4):
        y = _y(tick, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * 100:g}</text>')
    for coordinate, text in axis.ticks():
        x = _x(axis, coordinate)
        parts.append(f'<path class="tick" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axis_title(score))}</text>')
    y = (TOP + floor) / 2
    parts.append(f'<text transform="translate(12 {y}) rotate(-90)" text-anchor="middle">samples (%)</text>')
    return "".join(parts)


def _series(number: int, name: str, axis: Axis, share: np.ndarray, top: float, median: float, unit: str) -> str:
    """A step line with a light fill, and a mark at the median."""
    floor = _y(0, top)
    points = [f"M{_x(axis, float(axis.edges[0])):.1f} {floor:.1f}"]
    for edge, value in zip(axis.edges[1:], share, strict=True):
        points.append(f"V{_y(float(value), top):.1f}H{_x(axis, float(edge)):.1f}")
    x = _x(axis, float(axis.place(np.array([median]))[0]))
    return (
        f'<g class="series s{number}" data-series="{number}">'
        f"<title>{escape(name)}: median {median:.3g} {escape(unit)}</title>"
        f'<path class="area" d="{"".join(points)}V{floor:.1f}Z"/>'
        f'<path class="median" d="M{x:.1f} {floor:.1f}V{TOP}"/></g>'
    )
