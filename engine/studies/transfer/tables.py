"""Tables and figures of a transfer study."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.data.run.study_document import Cell as Shown
from engine.data.run.study_document import Interval, StudyColumn, StudyFigure, StudyTable
from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.compare.significance import Difference, share_difference
from engine.studies.transfer.drawing import DASHED, FULL, HeatMap, draw_maps
from engine.studies.transfer.matrix import Cell
from engine.studies.transfer.rows import Design
from engine.studies.transfer.sets import SetScores, in_words

GUIDED = "guided"
_INTERVALS = "Shares have 95 % Wilson intervals."


def study_tables(
    cells: Sequence[Cell], by_request: Sequence[tuple[str, Cell]], sets: Sequence[SetScores], design: Design
) -> tuple[StudyTable, ...]:
    """The main table, both matrices, differences to unguided samples, risks, requests, accuracies on image sets."""
    has_valid = any(cell.valid for cell in cells)
    tables = [_main_table(cells), _matrix(cells, design, "errors")]
    tables += [_matrix(cells, design, "valid")] if has_valid else []
    tables += [_differences(cells), _risks(cells)]
    tables += [_requests(by_request)] if by_request else []
    return (*tables, *([_sets_table(sets, design)] if sets else []))


def _requests(by_request: Sequence[tuple[str, Cell]]) -> StudyTable:
    table = _main_table([cell for _, cell in by_request])
    columns = (StudyColumn(name="request", title="request"), *table.columns)
    rows = tuple((request, *row) for (request, _), row in zip(by_request, table.rows, strict=True))
    return StudyTable(name="requests", title="By request", columns=columns, rows=rows, note=table.note)


def _of_cells(
    name: str,
    title: str,
    cells: Sequence[Cell],
    columns: Sequence[tuple[StudyColumn, Callable[[Cell], Shown]]],
    note: str,
) -> StudyTable:
    """A table with a row for each cell of the matrix."""
    keys = (
        StudyColumn(name="made_against", title="made against"),
        StudyColumn(name="evaluated_by", title="evaluated by"),
        StudyColumn(name=GUIDED, title=GUIDED, note="whether this classifier guided these samples"),
    )
    return StudyTable(
        name=name,
        title=title,
        columns=(*keys, *(column for column, _ in columns)),
        rows=tuple(
            (cell.row.title, cell.column, cell.is_guided, *(read(cell) for _, read in columns)) for cell in cells
        ),
        note=note,
    )


def _main_table(cells: Sequence[Cell]) -> StudyTable:
    columns = [
        (StudyColumn(name="errs", title="errs"), lambda cell: _interval(cell.errs)),
        (StudyColumn(name="valid_failures", title="valid failures"), lambda cell: _interval(cell.valid)),
    ]
    note = (
        f"{_INTERVALS} Valid failures: the classifier errs, and the oracles that guided nothing all predict the class."
    )
    return _of_cells("table", "Transfer", cells, columns, note)


def _differences(cells: Sequence[Cell]) -> StudyTable:
    columns = [
        (StudyColumn(name="more_errs", title="errs more"), lambda cell: _change(cell.more_errs)),
        (StudyColumn(name="p_value", title="p, Holm", digits=4, is_p_value=True), lambda cell: cell.p_value),
        (StudyColumn(name="more_valid", title="valid failures more"), lambda cell: _change(cell.more_valid)),
    ]
    note = (
        "Less unguided samples of the same noise: paired differences of shares with the intervals of Bonett and Price;"
        " p values of McNemar's exact test of the errors, adjusted over all cells."
    )
    return _of_cells("differences", "Differences to unguided samples", cells, columns, note)


def _risks(cells: Sequence[Cell]) -> StudyTable:
    columns = [
        (StudyColumn(name="samples", title="samples"), lambda cell: cell.num_samples),
        (StudyColumn(name="median_risk", title="median risk", unit="nats"), lambda cell: cell.median_risk),
        (StudyColumn(name="more_risk", title="risk more", unit="nats"), lambda cell: _change(cell.more_risk)),
        (StudyColumn(name="carried", title="failures carried"), lambda cell: _interval(cell.carried)),
    ]
    note = (
        "Differences of medians to unguided samples have bootstrap intervals over pairs. Failures carried: of the"
        " samples that are valid failures of all classifiers that guided, the share on which this one errs, too."
    )
    return _of_cells("risks", "Risks, and failures that carry over", cells, columns, note)


def _matrix(cells: Sequence[Cell], design: Design, measure: str) -> StudyTable:
    """A matrix in text: rows are what samples are made against, columns who evaluates."""
    columns = [StudyColumn(name="made_against", title="made against")]
    # Names of classifiers may begin with a digit, those of columns do not.
    columns += [StudyColumn(name=f"by_{name.replace('-', '_')}", title=name) for name in design.classifiers]
    by_row: dict[str, list[Shown]] = {}
    for cell in cells:
        by_row.setdefault(cell.row.title, [cell.row.title]).append(_marked(cell, measure))
    title = "Error rates by classifier" if measure == "errors" else "Valid failures by classifier"
    note = f"{_INTERVALS} Of classifiers that guided the samples it says `{GUIDED}`."
    return StudyTable(
        name=f"matrix-{measure}",
        title=title,
        columns=tuple(columns),
        rows=tuple(map(tuple, by_row.values())),
        note=note,
    )


def _marked(cell: Cell, measure: str) -> str:
    share = cell.errs if measure == "errors" else cell.valid
    if share is None:
        return ""
    text = f"{share.value:.2f} ({share.low:.2f} to {share.high:.2f})"
    return f"{text}, {GUIDED}" if cell.is_guided else text


def _sets_table(sets: Sequence[SetScores], design: Design) -> StudyTable:
    shared = sets[0].classes
    columns = (
        StudyColumn(name="set", title="set"),
        StudyColumn(name="classifier", title="classifier"),
        StudyColumn(name="images", title="images"),
        StudyColumn(name="accuracy", title="right of all its classes"),
        StudyColumn(name="accuracy_among", title=f"right among the {len(shared)}"),
        StudyColumn(name="less", title=f"accuracy less {sets[0].name}'s"),
    )
    rows = []
    for one in sets:
        for place, name in enumerate(design.classifiers):
            rows.append((
                one.name, name, len(one.right), _interval(_share(one.right[:, place])),
                _interval(_share(one.right_among[:, place])),
                None if one is sets[0] else _interval(
                    share_difference(sets[0].right[:, place], one.right[:, place], is_paired=False).change
                ),
            ))  # fmt: skip
    note = (
        f"Images of the classes that all sets and classifiers have: {in_words(shared)}. A prediction is the likeliest"
        " of all classes of a classifier, so that any other class is wrong; beside it the likeliest among the shared"
        f" ones. {_INTERVALS} Differences are Newcombe's."
    )
    return StudyTable(name="sets", title="Accuracy by data set", columns=columns, rows=tuple(rows), note=note)


def _share(flags: np.ndarray) -> Estimate:
    return wilson_interval(int(flags.sum()), len(flags))


def _interval(estimate: Estimate | None) -> Interval | None:
    return Interval.of(estimate) if estimate else None


def _change(difference: Difference | None) -> Interval | None:
    return Interval.of(difference.change) if difference else None


def study_figures(cells: Sequence[Cell], sets: Sequence[SetScores], design: Design) -> tuple[StudyFigure, ...]:
    """The matrices as heat maps, and that of the image sets."""
    maps = [_map(cells, design, "errors")]
    if any(cell.valid for cell in cells):
        maps.append(_map(cells, design, "valid"))
    caption = (
        "Share of samples on which each classifier errs, and of valid failures, by what the samples are made against."
        " Framed: the classifier guided; dashed: the one that an ensemble left out."
    )
    figures = [StudyFigure(name="figure", caption=caption, svg=draw_maps(maps))]
    if sets:
        accuracies = HeatMap(
            title="accuracy",
            rows=[one.name for one in sets],
            columns=list(design.classifiers),
            shares=[[float(share) for share in one.right.mean(0)] for one in sets],
            outlines={},
            row_title="images",
            column_title="classified by",
        )
        figures.append(
            StudyFigure(
                name="sets",
                caption=f"Accuracy by data set, on images of {in_words(sets[0].classes)}.",
                svg=draw_maps([accuracies]),
            )
        )
    return tuple(figures)


def _map(cells: Sequence[Cell], design: Design, measure: str) -> HeatMap:
    columns, titles = list(design.classifiers), [row.title for row in design.rows]
    shares: list[list[float | None]] = [[None] * len(columns) for _ in titles]
    outlines: dict[tuple[int, int], str] = {}
    for cell in cells:
        place = titles.index(cell.row.title), columns.index(cell.column)
        share = cell.errs if measure == "errors" else cell.valid
        shares[place[0]][place[1]] = share.value if share else None
        if cell.is_guided:
            outlines[place] = FULL
        elif cell.column == cell.row.left_out:
            outlines[place] = DASHED
    return HeatMap(
        title="errs" if measure == "errors" else "valid failures",
        rows=titles,
        columns=columns,
        shares=shares,
        outlines=outlines,
        row_title="made against",
        column_title="evaluated by",
    )
