"""The figures of a sweep: frontiers with intervals, and measures over a field of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.data.run.study_document import StudyFigure
from engine.job.spec import JOINT_SEPARATOR
from engine.methods.intervals import Estimate
from engine.studies.experiments.figures import COLOURS, MARKERS, draw, series_style
from engine.studies.sweep.cells import CLASS_FIELDS, CrossedJob, SweepCell
from engine.studies.sweep.measures import Measure
from engine.studies.sweep.results import CellResult, Frontier

MAX_PANELS = 6
# Of the figure over a field of numbers: sets of classes, and panels of each where there are several.
MAX_SETS, SET_PANELS = 3, 4
MAX_SERIES = len(COLOURS)
PANEL = (4.6, 3.6)
# Before the name of a request, where a cell has no value of a field.
_NO_VALUE = "request "


def frontier_figure(crossed: CrossedJob, frontiers: Sequence[Frontier]) -> StudyFigure | None:
    """A panel for each frontier: all cells with their intervals, those on it filled and joined."""
    shown = list(frontiers)[:MAX_PANELS]
    if not shown:
        return None
    styles = _Styles(crossed, [one for frontier in shown for one in frontier.results])
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)

    def paint(figure: Any) -> None:
        panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axis, frontier in zip(panels, shown, strict=False):
            _paint_frontier(axis, frontier, styles)
        for axis in panels[len(shown) :]:
            axis.set_visible(False)
        figure.legend(handles=styles.handles(), loc="outside right upper", frameon=False, fontsize=8)

    width = PANEL[0] * columns + 1.6
    caption = (
        "Medians, shares and distances of the cells with 95 % intervals; filled and joined: those that no other cell of"
        " the same classes beats in both measures."
    )
    return StudyFigure(name="figure", caption=caption, svg=draw(width, PANEL[1] * rows, paint))


def _paint_frontier(axis: Any, frontier: Frontier, styles: _Styles) -> None:
    across, up = frontier.axes.across, frontier.axes.up
    points = []
    for place, one in enumerate(frontier.results):
        x, y = one.figures[across.name].estimate, one.figures[up.name].estimate
        style = styles.of(one.cell)
        bars: dict[str, Any] = {"ecolor": style["color"], "elinewidth": 0.7, "alpha": 0.9, "zorder": 2}
        filled = style["color"] if frontier.is_on[place] else "white"
        sides = [[[one.value - one.low], [one.high - one.value]] for one in (x, y)]
        look = {"fmt": style["marker"], "color": style["color"], "markerfacecolor": filled, "markersize": 6}
        axis.errorbar(x.value, y.value, xerr=sides[0], yerr=sides[1], **look, **bars)
        points += [(x.value, y.value)] if frontier.is_on[place] else []
    axis.plot(*zip(*sorted(points), strict=True), color="#555555", linewidth=1, zorder=1)
    axis.set_xlabel(_axis_title(across))
    axis.set_ylabel(_axis_title(up))
    axis.set_title(_title(frontier), fontsize=9)
    for measure, name in ((across, "x"), (up, "y")):
        if "kldb" in measure.name:
            _make_logarithmic(axis, name)


def _make_logarithmic(axis: Any, name: str) -> None:
    """A logarithmic axis with plain numbers, of which matplotlib chooses those that have room."""
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        def __call__(self, value: float, place: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, place) else ""

    getattr(axis, f"set_{name}scale")("log")
    line = getattr(axis, f"{name}axis")
    line.set_major_formatter(PlainNumbers())
    line.set_minor_formatter(PlainNumbers(minor_thresholds=(1.5, 0.5)))


def _title(frontier: Frontier) -> str:
    """The classes of a panel, where it is of a joint prompt."""
    first = frontier.results[0]
    return first.cell.asked_names(JOINT_SEPARATOR)


def _axis_title(measure: Measure) -> str:
    better = {1: ", more is better", -1: ", less is better"}.get(measure.better, "")
    unit = f", {measure.unit}" if measure.unit else ""
    return f"{measure.title}{unit}{better}"


class _Styles:
    """Colour by one field, or the request, and marker by another: those with the most values that still differ."""

    def __init__(self, crossed: CrossedJob, results: Sequence[CellResult]) -> None:
        self._crossed = crossed
        cells = [one.cell for one in results]
        keys = {"": [cell.request for cell in cells]}
        keys |= {field: [_value(cell, field) for cell in cells] for field in crossed.titles}
        varied = {field: list(dict.fromkeys(texts)) for field, texts in keys.items()}
        usable = [
            field for field, texts in varied.items() if 1 < len(texts) <= MAX_SERIES and field not in CLASS_FIELDS
        ]
        usable.sort(key=lambda field: -len(varied[field]))
        self._colour, self._marker = (*usable, None, None)[:2]
        # Values with names of their own need no title.
        self._named = {
            cell.texts[field]
            for cell in cells
            for field, value in cell.values.items()
            if isinstance(value, dict | list)
        }
        self._varied = varied

    def of(self, cell: SweepCell) -> dict[str, Any]:
        """Colour and marker of a cell."""
        return {"color": COLOURS[self._place(cell, self._colour)], "marker": MARKERS[self._place(cell, self._marker)]}

    def _place(self, cell: SweepCell, field: str | None) -> int:
        if field is None:
            return 0
        return self._varied[field].index(cell.request if field == "" else _value(cell, field))

    def handles(self) -> list[Any]:
        """The entries of the legend."""
        from matplotlib.lines import Line2D

        handles = []
        for field, is_colour in ((self._colour, True), (self._marker, False)):
            if field is None:
                continue
            for number, text in enumerate(self._varied[field]):
                look: dict[str, Any] = (
                    {"color": COLOURS[number], "marker": "o"}
                    if is_colour
                    else {"color": "#555", "marker": MARKERS[number]}
                )
                is_plain = field == "" or text in self._named or text.startswith(_NO_VALUE)
                label = text.removeprefix(_NO_VALUE) if is_plain else f"{self._crossed.titles[field]} {text}"
                handles.append(Line2D([], [], linestyle="", label=label, **look))
        return handles


def _value(cell: SweepCell, field: str) -> str:
    return cell.texts.get(field, f"{_NO_VALUE}{cell.request}")


def profile_figure(
    crossed: CrossedJob, results: Sequence[CellResult], measures: Sequence[Measure]
) -> StudyFigure | None:
    """Measures over the field of numbers with the most values, a line for each combination of the other values.

    Sets of classes have a row of panels each; cells without the field are dashed levels.
    """
    field = _field_of_numbers(crossed, results)
    shown = [one for one in measures if any(one.name in result.figures for result in results)]
    if field is None or not shown:
        return None
    lines = _lines(crossed, [result for result in results if field in result.cell.values], field)
    sets = list(dict.fromkeys(one.cell.asked for line in lines.values() for one in line))[:MAX_SETS]
    if len(lines) > MAX_SERIES:
        return None
    shown = shown[: MAX_PANELS if len(sets) == 1 else SET_PANELS]
    columns = min(3, len(shown)) if len(sets) == 1 else len(shown)
    panels = [(asked, measure) for asked in sets for measure in shown]
    rows = -(-len(panels) // columns)
    levels = [result for result in results if field not in result.cell.values]

    def paint(figure: Any) -> None:
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for axis, (asked, measure) in zip(axes, panels, strict=False):
            own = {label: [one for one in line if one.cell.asked == asked] for label, line in lines.items()}
            _paint_profile(axis, field, measure, own, [one for one in levels if one.cell.asked == asked])
            axis.set_xlabel(crossed.titles[field])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)

    caption = f"Over {crossed.titles[field]}, with 95 % intervals; every point is a cell, all from the same noise."
    svg = draw(3.4 * columns + 1.5, 3.0 * rows, paint)
    return StudyFigure(name="profile", caption=caption, svg=svg)


def _paint_profile(
    axis: Any, field: str, measure: Measure, lines: Mapping[str, Sequence[CellResult]], levels: Sequence[CellResult]
) -> None:
    """A panel: the cells of one set of classes."""
    for number, (label, cells) in enumerate(lines.items()):
        there = [one for one in cells if measure.name in one.figures]
        points = [(float(one.cell.values[field]), one.figures[measure.name].estimate) for one in there]
        _paint_line(axis, points, number, label)
    for one in levels:
        if measure.name in one.figures:
            level = one.figures[measure.name].shown.value
            axis.axhline(level, color="#555555", linestyle="--", label=one.cell.request)
    title = f"{measure.title}, {measure.unit}" if measure.unit else measure.title
    first = next(one for cells in lines.values() for one in cells)
    axis.set_title(f"{title}\n{first.cell.asked_names(JOINT_SEPARATOR)}", fontsize=9)


def _field_of_numbers(crossed: CrossedJob, results: Sequence[CellResult]) -> str | None:
    best, most = None, 1
    for field in crossed.titles:
        values = [one.cell.values[field] for one in results if field in one.cell.values]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            count = len({float(value) for value in values})
            best, most = (field, count) if count > most else (best, most)
    return best


def _lines(crossed: CrossedJob, results: Sequence[CellResult], field: str) -> dict[str, list[CellResult]]:
    """The cells by their values of the other fields, in words, in the order of the field; of all sets of classes."""
    lines: dict[str, list[CellResult]] = {}
    for one in sorted(results, key=lambda one: float(one.cell.values[field])):
        label = crossed.label_without(one.cell, (field, *CLASS_FIELDS))
        lines.setdefault(label, []).append(one)
    order = [crossed.label_without(one.cell, (field, *CLASS_FIELDS)) for one in results]
    return {label: lines[label] for label in dict.fromkeys(order)}


def _paint_line(axis: Any, there: Sequence[tuple[float, Estimate]], number: int, label: str) -> None:
    """A line through points with their intervals, in the order given."""
    if not there:
        return
    values = [estimate.value for _, estimate in there]
    bars = [[one.value - one.low for _, one in there], [one.high - one.value for _, one in there]]
    positions = [value for value, _ in there]
    axis.errorbar(positions, values, yerr=bars, capsize=2, label=label, linewidth=1.2, **series_style(number))
    if min(positions) > 0 and max(positions) / min(positions) >= 10:
        axis.set_xscale("log")
    elif min(positions) == 0 and max(positions) >= 10:
        axis.set_xscale("symlog")
    axis.set_xticks(positions, [f"{value:g}" for value in positions])
    axis.minorticks_off()
