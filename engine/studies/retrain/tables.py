"""The tables of a comparison, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from engine.driver.progress import ABSENT, MAX_GROUP_ROWS
from engine.methods.intervals import LEVEL
from engine.studies.retrain.accuracy import Comparison, ErrorAgreement, context_name, points
from engine.studies.retrain.arm_records import BEFORE, NONE

if TYPE_CHECKING:
    from engine.methods.intervals import Estimate


def accuracy_table(comparison: Comparison, main: str) -> Table:
    """Accuracy by context, arms as columns, the weakest contexts first, and what the main arm changes."""
    arms = list(comparison.overall.accuracies)
    table = _table(
        "Accuracy on the test images: before with Wilson's interval, arms as means over the seeds, difference with its"
        " interval over seeds and images",
        ["context", "images", BEFORE, *arms, f"{main} - {NONE}, points"],
        len(comparison.contexts),
    )
    generated = [comparison.held_out] if comparison.held_out else []
    for row in (comparison.overall, *generated, *comparison.contexts[:MAX_GROUP_ROWS]):
        table.add_row(
            Text(context_name(row.context)),
            str(row.num_images),
            _share(row.before),
            *(f"{row.mean(arm):.1%}" for arm in arms),
            points(row.differences[main]),
        )
    return table


def change_table(comparison: Comparison) -> Table:
    """What each arm changes on all images, in the weak contexts and in the others, against both baselines."""
    table = _table(
        "Changes in points, with intervals over seeds and images; worse: other contexts that are significantly worse"
        f" (Holm, {1 - LEVEL:.2f})",
        ["arm", "less", "all images", "weak contexts", "other contexts", "worse"],
        0,
    )
    for change in comparison.changes:
        weak, others = (points(mean) if mean else ABSENT for mean in (change.gain, change.others))
        worse = f"{len(change.worse)} of {len(change.rest)}"
        table.add_row(change.arm, change.base, points(change.overall), weak, others, worse)
    return table


def agreement_table(agreement: ErrorAgreement) -> Table:
    """Error rates of the target by context: among valid generated samples, and on test images."""
    table = _table(
        "Errors of the target before retraining, with Wilson's intervals",
        ["context", "valid samples", "errors among them", "test images", "errors among them"],
        len(agreement.rows),
    )
    for row in agreement.rows[:MAX_GROUP_ROWS]:
        table.add_row(
            Text(context_name(row.context)),
            str(row.num_generated),
            _share(row.generated) if row.generated else ABSENT,
            str(row.num_test),
            _share(row.test),
        )
    return table


def _table(title: str, names: list[str], num_rows: int) -> Table:
    if num_rows > MAX_GROUP_ROWS:
        title += f" ({MAX_GROUP_ROWS} of {num_rows} contexts; all are in retrain.json)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="left" if name in ("context", "arm", "less") else "right")
    return table


def _share(share: Estimate) -> str:
    return f"{share.value:.1%} ({share.low:.0%} to {share.high:.0%})"
