"""The tables of an ablation: parts, their differences, predictors and components."""

from __future__ import annotations

import numpy as np

from engine.data.run.study_document import Cell, Interval, StudyColumn, StudyTable
from engine.methods.intervals import Estimate
from engine.studies.ablate.arms import Arm
from engine.studies.ablate.measures import MEASURES, Measure, share
from engine.studies.ablate.parts import WHOLE
from engine.studies.ablate.results import Results
from engine.studies.compare.significance import Flags, Values

SHARED = "Shares have 95 % Wilson intervals, risk, conformity and PSNR are medians."
PARTS = "the parts"
PAIRED = (
    "Samples of equal noise are pairs: McNemar's exact test and the interval of Bonett and Price for shares, Wilcoxon's"
    " test and a paired bootstrap for medians; each interval is of its difference alone, p is after Holm"
)


def tables_of(results: Results) -> tuple[StudyTable, ...]:
    """The main table first."""
    tables = [_main(results)]
    if results.has_changed_parts:
        tables.append(_differences(results))
    if results.predictors:
        tables.append(_predictors(results))
    if results.design.of("components"):
        tables.append(_components(results))
    return tuple(tables)


def _main(results: Results) -> StudyTable:
    """A row an arm of the parts."""
    columns = (StudyColumn(name="recipe", title="recipe"), *_columns(results, "whole recipe", PARTS))
    rows = tuple((arm.title, *_cells(results, arm)) for arm in results.design.of("parts"))
    return StudyTable(
        name="table", title=f"{results.design.request.name} without each of its parts", columns=columns, rows=rows,
        note=f"{SHARED} {PAIRED} over the parts.",
    )  # fmt: skip


def _columns(results: Results, reference: str, family: str) -> list[StudyColumn]:
    """Columns of what the samples of an arm show, and of the difference by which arms are judged.

    Args:
        reference: what arms are compared with.
        family: over what p values are adjusted.
    """
    whole = results.samples[WHOLE]
    columns = [StudyColumn(name="n", title="n"), StudyColumn(name="errors", title="target errs")]
    if whole.valid is not None:
        columns.append(StudyColumn(name="valid", title="valid failures"))
    columns += [
        StudyColumn(name="change", title=f"change of {results.main.title}", note=f"row less {reference}"),
        StudyColumn(name="p", title="p", digits=3, is_p_value=True, note=f"after Holm over {family}"),
        StudyColumn(name="risk", title="risk", unit="nats"),
        StudyColumn(name="conformity", title="conformity"),
        StudyColumn(name="draws", title="draws", digits=1, note="embeddings drawn for a sample, on average"),
    ]
    several = len(whole.transfer) > 1
    columns += [
        StudyColumn(
            name=f"transfer_{number}", title=f"transfer {number} errs" if several else "transfer errs",
            note=f"{model}, which guided nothing",
        )
        for number, model in enumerate(whole.transfer, 1)
    ]  # fmt: skip
    if whole.psnr is not None and family == PARTS:
        columns.append(StudyColumn(name="psnr", title="PSNR to twin", unit="dB", digits=1))
    return columns


def _cells(results: Results, arm: Arm) -> list[Cell]:
    """The cells of `_columns`."""
    samples, whole = results.samples[arm.name], results.samples[WHOLE]
    cells: list[Cell] = [len(samples), _share(samples.errs)]
    if whole.valid is not None:
        cells.append(_share(samples.valid))
    cells += _judged(results, arm, results.main)
    cells += [_median(samples.risk), _median(samples.conformity), samples.draws]
    cells += [_share(samples.transfer.get(model)) for model in whole.transfer]
    if whole.psnr is not None and arm.group == "parts":
        cells.append(_median(samples.psnr))
    return cells


def _share(flags: Flags | None) -> Cell:
    return _interval(share(flags))


def _median(values: Values | None) -> Cell:
    return None if values is None or not len(values) else float(np.median(values))


def _interval(estimate: Estimate | None) -> Cell:
    return None if estimate is None else Interval.of(estimate)


def _judged(results: Results, arm: Arm, measure: Measure) -> tuple[Cell, Cell]:
    """A difference and its p value; nothing of the reference."""
    found = results.changes.get(arm.name, {}).get(measure.name)
    p_value = results.p_values.get(arm.name, {}).get(measure.name)
    return None if found is None else Interval.of(found.change), p_value


def _differences(results: Results) -> StudyTable:
    """Each part taken away, by all measures."""
    arms = [arm for arm in results.design.of("parts") if arm.name in results.changes]
    known = [measure for measure in MEASURES if any(measure.name in results.changes[arm.name] for arm in arms)]
    columns = [StudyColumn(name="recipe", title="recipe")]
    for measure in known:
        columns.append(StudyColumn(name=measure.name, title=measure.title))
        columns.append(StudyColumn(name=f"p_{measure.name}", title="p", digits=3, is_p_value=True))
    rows = tuple((arm.title, *(cell for one in known for cell in _judged(results, arm, one))) for arm in arms)
    return StudyTable(
        name="differences", title="Differences to the whole recipe", columns=tuple(columns), rows=rows,
        note=f"Row less whole recipe. {PAIRED} over the parts.",
    )  # fmt: skip


def _predictors(results: Results) -> StudyTable:
    """Each predictor, alone and with guidance."""
    columns = (
        StudyColumn(name="predictor", title="predictor"),
        StudyColumn(name="auc", title="AUC", note="on held-out images"),
        StudyColumn(name="exchanged", title="exchanged", note="share of the training images with another's outcome"),
        StudyColumn(name="screened", title="passed", note="share of the samples whose embedding passed"),
        *_columns(results, "the first predictor", "the predictors"),
    )
    rows = []
    for arm in results.design.of("predictor"):
        assert arm.step is not None
        predictor, samples = results.predictors[arm.step], results.samples[arm.name]
        auc = Interval(value=predictor.auc, low=predictor.low, high=predictor.high)
        own: list[Cell] = [arm.title, auc, predictor.exchanged, samples.screened]
        rows.append((*own, *_cells(results, arm)))
    return StudyTable(
        name="predictor", title="Error predictors weakened on purpose", columns=columns, rows=tuple(rows),
        note=f"{SHARED} {PAIRED} over the predictors.",
    )  # fmt: skip


def _components(results: Results) -> StudyTable:
    """Each number of Gaussians a class, alone and with guidance."""
    columns = (
        StudyColumn(name="embeddings", title="embeddings"),
        StudyColumn(name="screened", title="passed", note="share of the samples whose embedding passed"),
        *_columns(results, "the first number", "the numbers"),
    )
    rows = tuple(
        (arm.title, results.samples[arm.name].screened, *_cells(results, arm))
        for arm in results.design.of("components")
    )
    return StudyTable(
        name="components", title="One Gaussian a class or a mixture", columns=columns, rows=rows,
        note=f"{SHARED} {PAIRED} over the numbers.",
    )  # fmt: skip
