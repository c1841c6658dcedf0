"""Risk against conformity, sample by sample, as inline SVG: a colour and a shape for each request.

The samples of the gallery are drawn one by one, so that the page's script can open them; others, up to a bound, are
one path for each request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from engine.job.columns import BY_NAME
from engine.report.charts import Axis, axis_title, make_axis, nice_ticks
from engine.report.data import Rows
from engine.report.text import number

MAX_POINTS = 1500
WIDTH, HEIGHT = 900, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 48
ACROSS, UP = BY_NAME["conformity"], BY_NAME["risk"]
# Drawn about the place of a point: circle, square, triangle, diamond, cross, plus, and a bar for all other requests.
SHAPES = (
    "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z", "m-3 -3h6v6h-6z", "m0 -4l3.9 6.8h-7.8z",
    "m0 -4.4l4 4.4l-4 4.4l-4 -4.4z",
    "m-3.2 -3.2l6.4 6.4m0 -6.4l-6.4 6.4", "m0 -4v8m-4 -4h8", "m-3.6 0h7.2",
)  # fmt: skip


def scatter(rows: Rows, series_of: np.ndarray, names: Sequence[str], shown: dict[int, str]) -> Markup:
    """The chart, or a line that there is nothing to draw.

    Args:
        series_of: of each request, the number of its series.
        names: of the series.
        shown: keys of the samples in the gallery by row number.
    """
    scored = np.flatnonzero(rows.scored)
    if not len(scored):
        return Markup('<p class="note">No scored sample.</p>')
    axes = [make_axis(rows.numbers[score.name][scored], score.axis == "log") for score in (ACROSS, UP)]
    x = _scale(axes[0], rows.numbers[ACROSS.name], LEFT, WIDTH - RIGHT)
    y = _scale(axes[1], rows.numbers[UP.name], HEIGHT - BOTTOM, TOP)
    series = series_of[rows.request.codes]
    drawn = _choose(rows, series, shown)
    parts = [_frame(axes[0], axes[1])]
    for place, name in enumerate(names):
        own = [row for row in drawn if series[row] == place]
        quiet = "".join(f"M{x[row]:.1f} {y[row]:.1f}{SHAPES[place]}" for row in own if row not in shown)
        dots = [_dot(rows, row, x[row], y[row], place, name, shown[row]) for row in own if row in shown]
        parts.append(
            f'<g class="dots s{place}" data-series="{place}"><path class="quiet" d="{quiet}"/>{"".join(dots)}</g>'
        )
    label = f"{UP.title} against {ACROSS.label} of the samples, by request"
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def num_drawn(rows: Rows, shown: dict[int, str]) -> int:
    """How many samples the chart has."""
    return min(int(rows.scored.sum()), max(MAX_POINTS, sum(bool(rows.scored[row]) for row in shown)))


def _choose(rows: Rows, series: np.ndarray, shown: dict[int, str]) -> list[int]:
    """Rows to draw: those of the gallery, and others evenly along each series up to the bound."""
    scored = np.flatnonzero(rows.scored)
    if len(scored) <= MAX_POINTS:
        return [int(row) for row in scored]
    chosen = {row for row in shown if rows.scored[row]}
    others = scored[~np.isin(scored, list(chosen))]
    others = others[np.argsort(series[others], kind="stable")]
    even = np.linspace(0, len(others) - 1, max(0, MAX_POINTS - len(chosen))).astype(int)
    return sorted(chosen | {int(others[place]) for place in even})


def _scale(axis: Axis, values: np.ndarray, first: float, last: float) -> np.ndarray:
    low, high = float(axis.edges[0]), float(axis.edges[-1])
    return first + (axis.place(values) - low) / (high - low) * (last - first)


def _dot(rows: Rows, row: int, x: float, y: float, place: int, name: str, key: str) -> str:
    values = ", ".join(f"{score.label} {number(float(rows.numbers[score.name][row]))}" for score in (UP, ACROSS))
    return (
        f'<path class="dot" data-key="{escape(key)}" d="M{x:.1f} {y:.1f}{SHAPES[place]}">'
        f"<title>{escape(name)}: {values}</title></path>"
    )


def _frame(across: Axis, up: Axis) -> str:
    floor, parts = HEIGHT - BOTTOM, []
    low, high = float(up.edges[0]), float(up.edges[-1])
    for coordinate, text in up.ticks():
        y = floor - (coordinate - low) / (high - low) * (floor - TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    low, high = float(across.edges[0]), float(across.edges[-1])
    for tick in nice_ticks(low, high, 8):
        x = LEFT + (tick - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<path class="tick" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{axis_title(ACROSS)}</text>')
    y = (TOP + floor) / 2
    parts.append(f'<text transform="translate(13 {y}) rotate(-90)" text-anchor="middle">{axis_title(UP)}</text>')
    return "".join(parts)
