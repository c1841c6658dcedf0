"""The tables of a sweep: cells, changes against the baseline, frontiers, and the effect of each field."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from engine.data.run.study_document import Cell, Interval, StudyColumn, StudyTable
from engine.methods.intervals import Estimate
from engine.studies.sweep.cells import CrossedJob, SweepCell
from engine.studies.sweep.fields import canonical
from engine.studies.sweep.measures import Measure
from engine.studies.sweep.results import Axes, CellResult, Effect, Frontier

_KINDS = {
    "share": "95 % Wilson interval",
    "median": "median with quartiles",
    "images": "95 % interval from the resamples",
}
_RESAMPLED = "from resamples of the noises that all cells share"


def cell_columns(crossed: CrossedJob) -> list[StudyColumn]:
    """The columns that say which cell a row is of."""
    columns = [StudyColumn(name="request", title="request")] * has_requests(crossed)
    fields = [(field, f"field_{number + 1}") for number, field in enumerate(crossed.titles)]
    return columns + [
        StudyColumn(name=_column_name(crossed.titles[field], name), title=crossed.titles[field], note=field)
        for field, name in fields
    ]


def has_requests(crossed: CrossedJob) -> bool:
    """Whether cells are of several requests."""
    return len({cell.request for cell in crossed.cells}) > 1


def _column_name(title: str, fallback: str) -> str:
    name = title.lower().replace(".", "_")
    taken = ("cell", "request", "n", "failed", "baseline", "across", "x", "up", "y", "share", "is_on", "frontier")
    return name if name.isidentifier() and name.isascii() and name[0] != "_" and name not in taken else fallback


def cell_cells(crossed: CrossedJob, cell: SweepCell) -> list[Cell]:
    """The first cells of a row."""
    return [
        *[cell.request] * has_requests(crossed),
        *(_value_cell(cell, field) for field in crossed.titles),
    ]


def _value_cell(cell: SweepCell, field: str) -> Cell:
    """A value as a cell: whole numbers as they are, so that a file has them as numbers."""
    value, text = cell.values.get(field), cell.texts.get(field)
    return value if isinstance(value, int) and text == str(value) else text


def main_table(
    crossed: CrossedJob, results: Sequence[CellResult], measures: Sequence[Measure], frontiers: Sequence[Frontier]
) -> StudyTable:
    """A row for each cell, with all that was measured."""
    used = [measure for measure in measures if any(measure.name in one.figures for one in results)]
    has_failed = any(one.samples.num_failed for one in results)
    pairs = list(dict.fromkeys(frontier.axes for frontier in frontiers))
    columns = [
        *cell_columns(crossed),
        StudyColumn(name="n", title="n", note="scored samples"),
        *[StudyColumn(name="failed", title="failed", note="samples without scores")] * has_failed,
        *map(_measure_column, used),
        *(column for number, axes in enumerate(pairs) for column in _frontier_columns(number, axes)),
        StudyColumn(name="cell", title="cell", note="its request in the run"),
    ]
    rows = []
    for one in results:
        row: list[Cell] = [*cell_cells(crossed, one.cell), len(one.samples)]
        row += [one.samples.num_failed] * has_failed
        places = [_place(one, [front for front in frontiers if front.axes == axes]) for axes in pairs]
        row += [_shown(one, measure.name) for measure in used]
        row += itertools.chain.from_iterable([*places, [one.cell.name]])
        rows.append(tuple(row))
    note = (
        "Shares with 95 % Wilson intervals, medians with quartiles, figures of sets of images with 95 % intervals."
        " Frontier: whether no other cell of the same classes is as good in both measures and better in one, and the"
        " share of resamples in which that is so."
    )
    return StudyTable(name="table", title="Cells", columns=tuple(columns), rows=tuple(rows), note=note)


def _measure_column(measure: Measure) -> StudyColumn:
    note = "; ".join(filter(None, [measure.note, _KINDS[measure.kind]]))
    return StudyColumn(name=measure.name, title=measure.title, unit=measure.unit, digits=measure.digits, note=note)


def _frontier_columns(number: int, axes: Axes) -> list[StudyColumn]:
    end, title = ("", "frontier") if number == 0 else (f"_{number + 1}", f"frontier, {axes.up.title}")
    note = f"{axes.up.title} against {axes.across.title}"
    return [
        StudyColumn(name=f"frontier{end}", title=title, note=note),
        StudyColumn(name=f"frontier_share{end}", title="share", note=f"{note}: of resamples in which it is on it"),
    ]


def _place(result: CellResult, frontiers: Sequence[Frontier]) -> list[Cell]:
    """Whether a cell is on its frontier, and in what share of the resamples."""
    for frontier in frontiers:
        if result in frontier.results:
            place = frontier.results.index(result)
            return [bool(frontier.is_on[place]), float(frontier.shares[place])]
    return [None, None]


def _shown(result: CellResult, name: str) -> Cell:
    figure = result.figures.get(name)
    return None if figure is None else Interval.of(figure.shown)


def changes_table(
    crossed: CrossedJob,
    rows: Sequence[tuple[CellResult, CellResult, dict[str, Estimate]]],
    measures: Sequence[Measure],
) -> StudyTable:
    """How far each cell is from its baseline.

    Args:
        rows: cell, baseline, and the change of each measure.
    """
    used = [measure for measure in measures if any(measure.name in changed for _, _, changed in rows)]
    columns = (
        *cell_columns(crossed),
        StudyColumn(name="baseline", title="against", note="the cell that it is compared with"),
        *map(_measure_column, used),
    )
    cells = tuple(
        (
            *cell_cells(crossed, one.cell),
            baseline.cell.name,
            *(Interval.of(changed[measure.name]) if measure.name in changed else None for measure in used),
        )
        for one, baseline, changed in rows
    )
    note = f"Differences to the baseline with 95 % intervals, {_RESAMPLED}; each on its own, without correction."
    return StudyTable(name="changes", title="Changes against the baseline", columns=columns, rows=cells, note=note)


def frontier_table(crossed: CrossedJob, frontiers: Sequence[Frontier]) -> StudyTable:
    """The points of the frontier figures."""
    columns = (
        *cell_columns(crossed),
        StudyColumn(name="across", title="across"),
        StudyColumn(name="x", title="value", digits=3),
        StudyColumn(name="up", title="up"),
        StudyColumn(name="y", title="value", digits=3),
        StudyColumn(name="is_on", title="on the frontier"),
        StudyColumn(name="share", title="share of resamples on it"),
    )
    rows = tuple(
        (
            *cell_cells(crossed, one.cell),
            frontier.axes.across.title,
            Interval.of(one.figures[frontier.axes.across.name].estimate),
            frontier.axes.up.title,
            Interval.of(one.figures[frontier.axes.up.name].estimate),
            bool(frontier.is_on[place]),
            float(frontier.shares[place]),
        )
        for frontier in frontiers
        for place, one in enumerate(frontier.results)
    )
    note = f"95 % intervals, {_RESAMPLED}."
    return StudyTable(name="frontier", title="Frontiers", columns=columns, rows=rows, note=note)


def effects_table(
    crossed: CrossedJob,
    found: Sequence[Effect],
    measures: Sequence[Measure],
    texts: Mapping[str, Mapping[str, str]],
) -> StudyTable:
    """What each field changes, over the others.

    Args:
        texts: what tables call the values of each field, by `canonical`.
    """
    used = [measure for measure in measures if any(measure.name in effect.changes for effect in found)]
    columns = (
        StudyColumn(name="field", title="field"),
        *[StudyColumn(name="request", title="request")] * has_requests(crossed),
        StudyColumn(name="old", title="from"),
        StudyColumn(name="new", title="to"),
        StudyColumn(name="pairs", title="pairs", note="of cells that differ in it alone"),
        *map(_measure_column, used),
    )
    rows = tuple(
        (
            crossed.titles[effect.field],
            *[effect.request] * has_requests(crossed),
            texts[effect.field][canonical(effect.old)],
            texts[effect.field][canonical(effect.new)],
            effect.num_pairs,
            *(Interval.of(effect.changes[one.name]) if one.name in effect.changes else None for one in used),
        )
        for effect in found
    )
    note = f"Mean differences of pairs of cells that differ in one field alone, with 95 % intervals, {_RESAMPLED}."
    return StudyTable(name="effects", title="What each field changes", columns=columns, rows=rows, note=note)
