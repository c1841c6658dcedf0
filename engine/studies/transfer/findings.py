"""What the figures of a transfer study say, in sentences; what they do not show, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.methods.intervals import Estimate
from engine.studies.intervals import mean_interval
from engine.studies.transfer.matrix import ERRORS, VALID, Aligned, Cell, Contrast
from engine.studies.transfer.rows import Row
from engine.studies.transfer.sets import SetScores, in_words

_ALPHA = 0.05


def findings_of(aligned: Aligned, cells: Sequence[Cell], sets: Sequence[SetScores]) -> tuple[str, ...]:
    """All findings."""
    return (*_diagonal(aligned), *_beyond_unguided(aligned, cells), *_ensembles(aligned), *_sets(sets))


def points(difference: Estimate) -> str:
    """A difference of shares in percentage points, with its interval."""
    value, low, high = (round(100 * share, 1) + 0.0 for share in (difference.value, difference.low, difference.high))
    interval = "in every sample" if difference.is_degenerate else f"{low:+.1f} to {high:+.1f}"
    return f"{value:+.1f} points ({interval})"


def _measures(aligned: Aligned) -> Iterator[str]:
    yield ERRORS
    if aligned.columns(VALID):
        yield VALID


def _diagonal(aligned: Aligned) -> Iterator[str]:
    for measure in _measures(aligned):
        found = aligned.guided_and_others(measure)
        if found is None:
            continue
        text = (
            f"made against one classifier, the share of {measure} is {found.first:.2f} for the one that guided and"
            f" {found.second:.2f} for the others on average, {points(found.difference)}"
        )
        is_below = found.is_sure and found.difference.value > 0
        yield f"{text}: transfer is {'below the diagonal' if is_below else 'not shown to be below the diagonal'}"


def _beyond_unguided(aligned: Aligned, cells: Sequence[Cell]) -> Iterator[str]:
    for measure in _measures(aligned):
        found = aligned.others_and_unguided(measure)
        if found is None:
            continue
        text = (
            f"unguided samples of the same noise have {found.second:.2f} {measure} under these other classifiers;"
            f" guidance by another one changes that by {points(found.difference)}"
        )
        yield text if found.is_sure else f"{text}, which may be chance"
    others = [cell for cell in cells if cell.p_value is not None and not cell.is_guided]
    if others:
        num = sum(cell.p_value < _ALPHA and cell.more_errs.change.value > 0 for cell in others)  # type: ignore[operator, union-attr]
        yield (
            f"{num} of {len(others)} classifiers that did not guide a row err more often on it than on its unguided"
            f" samples (McNemar, Holm, p < {_ALPHA})"
        )


def _ensembles(aligned: Aligned) -> Iterator[str]:
    left_out = [row for row in aligned.design.ensembles if row.left_out]
    if left_out:
        yield from _ensemble(aligned, left_out, "ensembles of all but one, on the one left out")
        if evaluators := aligned.design.evaluators:
            yield from _ensemble(aligned, left_out, "ensembles of all but one, on the evaluators", evaluators)
    for row in aligned.design.ensembles:
        if not row.left_out:
            yield from _ensemble(aligned, [row], f"the ensemble {row.title}, on classifiers outside of it")


def _ensemble(
    aligned: Aligned, rows: Sequence[Row], subject: str, columns: Sequence[str] | None = None
) -> Iterator[str]:
    for measure in _measures(aligned):
        found = aligned.ensemble_and_singles(rows, measure, columns)
        if found is not None:
            yield (
                f"{subject}: {found.first:.2f} {measure}, where samples made against a single member have"
                f" {found.second:.2f} on the same classifiers, {points(found.difference)}: {_verdict(found)}"
            )


def _verdict(found: Contrast) -> str:
    if not found.is_sure:
        return f"no difference is shown with {found.num_noises} noises"
    return "ensembles transfer better" if found.difference.value > 0 else "ensembles transfer worse"


def _sets(sets: Sequence[SetScores]) -> Iterator[str]:
    if not sets:
        return
    texts = []
    for one in sets:
        # Images are the units: classifiers are the same in all sets.
        by_image = one.right.mean(1)
        mean = mean_interval(by_image.tolist()) if len(by_image) > 1 else None
        interval = f" ({mean.low:.2f} to {mean.high:.2f})" if mean else ""
        texts.append(f"{one.name} {float(np.mean(by_image)):.2f}{interval}")
    yield f"mean accuracy of the classifiers on images of {in_words(sets[0].classes)}: {', '.join(texts)}"
