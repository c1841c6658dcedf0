"""The figures of the matrix: errors by what samples are made against and who evaluates them, and means of them.

Samples of two rows that began with the same noise are pairs. Means over cells are taken sample by sample first, so that
their intervals are over independent noises and hold whatever the classifiers have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.compare.significance import Difference, holm, median_difference, share_difference
from engine.studies.intervals import mean_interval
from engine.studies.transfer.rows import Design, Row
from engine.studies.transfer.samples import Judges, RowSamples, Values, common_rows

ERRORS, VALID = "errors", "valid failures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A classifier on the samples of a row.

    Attributes:
        is_guided: whether the classifier guided these samples.
        errs: share of the samples on which it errs.
        valid: share of valid failures; None without an oracle that guided nothing and is another model.
        median_risk: in nats.
        more_errs, more_valid, more_risk: differences to the unguided samples of the same noise; None of those.
        p_value: of `more_errs`, adjusted by Holm over all cells that have one.
        carried: share of the valid failures of those that guided on which it errs, too; None without any.
    """

    row: Row
    column: str
    is_guided: bool
    num_samples: int
    errs: Estimate
    valid: Estimate | None
    median_risk: float
    more_errs: Difference | None = None
    more_valid: Difference | None = None
    more_risk: Difference | None = None
    p_value: float | None = None
    carried: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two means over the same samples.

    Attributes:
        first, second: the means.
        difference: first less second, with its interval over noises.
        num_noises: on which it rests.
    """

    first: float
    second: float
    difference: Estimate
    num_noises: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.difference.low > 0 or self.difference.high < 0


def matrix_of(samples: Sequence[RowSamples], design: Design, judges: Judges) -> list[Cell]:
    """All cells, row by row.

    Args:
        samples: of all rows, the unguided one first.
    """
    baseline = samples[0]
    cells = [
        _cell(row, baseline, place, name, judges[name])
        for row in samples
        for place, name in enumerate(design.classifiers)
    ]
    cells = [_with_carried(cell, samples, design, judges) for cell in cells]
    tested = [place for place, cell in enumerate(cells) if cell.more_errs is not None]
    adjusted = holm([cells[place].more_errs.p_value for place in tested])  # type: ignore[union-attr]
    p_values = dict(zip(tested, adjusted, strict=True))
    return [replace(cell, p_value=p_values.get(place)) for place, cell in enumerate(cells)]


def cells_by_request(samples: Sequence[RowSamples], design: Design, judges: Judges) -> list[tuple[str, Cell]]:
    """Request and cell, without differences; empty where the job has one request."""
    requests = list(dict.fromkeys(request for request, _, _ in samples[0].noise))
    if len(requests) < 2:
        return []
    parts = [(request, row.of_request(request)) for request in requests for row in samples]
    return [
        (request, _shares(part, place, name, judges[name]))
        for request, part in parts
        if len(part)
        for place, name in enumerate(design.classifiers)
    ]


def _shares(row: RowSamples, place: int, name: str, judges: Sequence[int]) -> Cell:
    num = len(row)
    return Cell(
        row=row.row,
        column=name,
        is_guided=name in row.row.members,
        num_samples=num,
        errs=wilson_interval(int(row.errs[:, place].sum()), num),
        valid=wilson_interval(int(row.valid(place, judges).sum()), num) if judges else None,
        median_risk=float(np.median(row.risks[:, place])),
    )


def _cell(row: RowSamples, baseline: RowSamples, place: int, name: str, judges: Sequence[int]) -> Cell:
    cell = _shares(row, place, name, judges)
    if not row.row.members:
        return cell
    plain, made = common_rows([baseline, row])
    if not len(made):
        return cell
    return replace(
        cell,
        more_errs=share_difference(plain.errs[:, place], made.errs[:, place], is_paired=True),
        more_valid=share_difference(plain.valid(place, judges), made.valid(place, judges), is_paired=True)
        if judges
        else None,
        more_risk=median_difference(plain.risks[:, place], made.risks[:, place], is_paired=True),
    )


def _with_carried(cell: Cell, samples: Sequence[RowSamples], design: Design, judges: Judges) -> Cell:
    """A cell with the share of the guiding classifiers' valid failures on which the evaluating one errs."""
    if cell.is_guided or not cell.row.members:
        return cell
    row = next(one for one in samples if one.row is cell.row)
    names = list(design.classifiers)
    failures = np.ones(len(row), dtype=bool)
    for member in cell.row.members:
        if not judges[member]:
            return cell
        failures &= row.valid(names.index(member), judges[member])
    if not failures.any():
        return cell
    both = int((row.errs[:, names.index(cell.column)] & failures).sum())
    return replace(cell, carried=wilson_interval(both, int(failures.sum())))


def contrast(first: Iterable[Values], second: Iterable[Values]) -> Contrast | None:
    """The difference of two means over samples of the same noise; None with fewer than two noises.

    Args:
        first, second: values [N] of some cells each, whose samples are those of the same N noises in the same order.
    """
    ours, theirs = (np.mean(np.stack([values.astype(float) for values in side]), axis=0) for side in (first, second))
    if len(ours) < 2:
        return None
    # Rounded, so that equal differences are equal.
    differences = np.round(ours - theirs, 12)
    return Contrast(
        first=float(ours.mean()),
        second=float(theirs.mean()),
        difference=mean_interval(differences.tolist()),
        num_noises=len(ours),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """All rows on the noises that they have in common."""

    samples: Sequence[RowSamples]
    design: Design
    judges: Judges

    @classmethod
    def of(cls, samples: Sequence[RowSamples], design: Design, judges: Judges) -> Aligned:
        """From the samples of all rows."""
        return cls(common_rows(samples), design, judges)

    def values(self, row: Row, column: str, measure: str) -> Values:
        """Errors or valid failures of a classifier on a row, 0 or 1 by noise, [N]."""
        place = list(self.design.classifiers).index(column)
        one = next(samples for samples in self.samples if samples.row is row)
        flags = one.errs[:, place] if measure == ERRORS else one.valid(place, self.judges[column])
        return flags.astype(np.float64)

    def columns(self, measure: str) -> tuple[str, ...]:
        """The classifiers for which a measure is defined."""
        return tuple(name for name in self.design.classifiers if measure == ERRORS or self.judges[name])

    def guided_and_others(self, measure: str) -> Contrast | None:
        """Samples made against one classifier: that classifier against the mean of all others."""
        return self._mean_contrast(
            [(row, column) for row, column in self._singles(measure) if column in row.members],
            [(row, column) for row, column in self._singles(measure) if column not in row.members],
            measure,
        )

    def others_and_unguided(self, measure: str) -> Contrast | None:
        """Classifiers on samples made against another one, against unguided samples."""
        others = [(row, column) for row, column in self._singles(measure) if column not in row.members]
        unguided = self.samples[0].row
        return self._mean_contrast(others, [(unguided, column) for _, column in others], measure)

    def ensemble_and_singles(
        self, rows: Sequence[Row], measure: str, columns: Sequence[str] | None = None
    ) -> Contrast | None:
        """Ensembles against single targets: classifiers outside of an ensemble on its samples, and on its members'.

        Args:
            columns: the classifiers; without any the one that was left out, or all outside of an ensemble.
        """
        ensemble, singles = list[Values](), list[Values]()
        single = {row.members[0]: row for row in self.design.guided if not row.is_ensemble}
        for row in rows:
            chosen = columns or ([row.left_out] if row.left_out else self.design.classifiers)
            for column in self.columns(measure):
                if column in row.members or column not in chosen:
                    continue
                ensemble.append(self.values(row, column, measure))
                # Each column counts once on both sides.
                of_members = [self.values(single[member], column, measure) for member in row.members]
                singles.append(np.mean(np.stack(of_members), axis=0))
        return contrast(ensemble, singles) if ensemble else None

    def _singles(self, measure: str) -> list[tuple[Row, str]]:
        rows = [row for row in self.design.guided if not row.is_ensemble]
        return [(row, column) for row in rows for column in self.columns(measure)]

    def _mean_contrast(
        self, first: Sequence[tuple[Row, str]], second: Sequence[tuple[Row, str]], measure: str
    ) -> Contrast | None:
        if not first or not second:
            return None
        return contrast(
            (self.values(row, column, measure) for row, column in first),
            (self.values(row, column, measure) for row, column in second),
        )
