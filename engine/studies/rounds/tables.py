"""The tables of a study of rounds, and its figure."""

from __future__ import annotations

from typing import Any

from engine.data.run.study_document import Cell, Interval, StudyColumn, StudyFigure, StudyTable
from engine.methods.intervals import Estimate
from engine.studies.experiments.figures import draw, series_style
from engine.studies.retrain.accuracy import context_name
from engine.studies.retrain.arm_records import BEFORE
from engine.studies.rounds.convergence import half_life
from engine.studies.rounds.measures import Figures, failure_rate
from engine.studies.rounds.player import slug

GROUPS = {
    "seen": ("In distribution", "Test images of contexts that the images to train on have"),
    "other": ("Other contexts", "Test images of all other contexts"),
    "weak": ("Weak contexts", "Test images of the contexts that are to gain"),
    "corrupted": ("Corruptions", "Corrupted copies of test images in distribution"),
}


def percent(estimate: Estimate | None) -> Cell:
    """A share in percent, or its difference in points."""
    if estimate is None:
        return None
    return Interval.of(Estimate(*(100 * value + 0.0 for value in (estimate.value, estimate.low, estimate.high))))


def rounds_table(figures: Figures) -> StudyTable:
    """Accuracies and failures left, by arm and round."""
    groups = [name for name, rows in figures.groups.items() if len(rows)]
    columns = [
        StudyColumn(name="arm", title="Arm"),
        StudyColumn(name="round", title="Round"),
        StudyColumn(name="samples", title="Samples", note="Generated samples that a training of the round had."),
        StudyColumn(
            name="failures", title="Failures left", unit="%", digits=1,
            note="Valid failures among the attempts of the run that the network of this row was the target of.",
        ),
        *(
            StudyColumn(name=name, title=GROUPS[name][0], unit="%", digits=1, note=f"{GROUPS[name][1]}.")
            for name in groups
        ),
    ]  # fmt: skip
    rows = [_round_row(figures, BEFORE, 0, groups)]
    for arm in figures.design.arms:
        rows += [_round_row(figures, arm.label, number, groups) for number in range(1, figures.design.spec.rounds + 1)]
    return StudyTable(
        name="table",
        title="Accuracy by arm and round",
        columns=tuple(columns),
        rows=tuple(rows),
        note="95 % intervals: of accuracies over seeds and images, before over images alone; of failures over samples.",
    )


def _round_row(figures: Figures, arm: str, number: int, groups: list[str]) -> tuple[Cell, ...]:
    counted = arm if number else next((one.label for one in figures.design.sampled), arm)
    return (
        arm,
        number,
        figures.played.num_samples.get((arm, number)) if number else None,
        percent(failure_rate(figures.failures(counted, number))),
        *(percent(figures.accuracy(arm, number, figures.groups[name])) for name in groups),
    )


def contexts_table(figures: Figures) -> StudyTable:
    """By context after the last round: before, and the change of each arm; corruptions last."""
    design = figures.design
    arms = [arm for arm in design.arms if arm.label != design.base]
    changes = {arm.label: {row.context: row for row in figures.change(arm.label).contexts} for arm in arms}
    columns = [
        StudyColumn(name="context", title="Context"),
        StudyColumn(
            name="kind",
            title="Kind",
            note="seen: the images to train on have it; weak: to gain; corrupted: a copy of images of seen contexts.",
        ),
        StudyColumn(name="images", title="Images"),
        StudyColumn(name="before", title="Before", unit="%", digits=1),
    ]
    if design.base != BEFORE:
        columns.append(StudyColumn(name="base", title=f"{design.base}, last round", unit="%", digits=1))
    for arm in arms:
        name, title = f"arm_{slug(arm).replace('-', '_')}", f"{arm.label} less {design.base}"
        columns.append(StudyColumn(name=name, title=title, unit="points", digits=1))
        columns.append(
            StudyColumn(
                name=f"{name}_p",
                title="p worse",
                digits=3,
                is_p_value=True,
                note="One-sided, after Holm; none for a weak context.",
            )
        )
    rows = []
    for context, members in figures.material.rows_of.items():
        row: list[Cell] = [context_name(context), _kind(figures, context), len(members)]
        row.append(percent(figures.accuracy(BEFORE, 0, members)))
        if design.base != BEFORE:
            row.append(percent(figures.accuracy(design.base, design.spec.rounds, members)))
        for arm in arms:
            row.append(percent(figures.difference(arm.label, design.base, design.spec.rounds, members)))
            change = changes[arm.label].get(context)
            row.append(change.p_holm if change else None)
        rows.append(tuple(row))
    return StudyTable(
        name="contexts",
        title=f"By context after round {design.spec.rounds}",
        columns=tuple(columns),
        rows=tuple(rows),
        note="95 % intervals over seeds and images; before over images alone. The order is that of the test images.",
    )


def _kind(figures: Figures, context: str) -> str:
    return "weak" if context in figures.weak.contexts else figures.material.kind(context)


def failures_table(figures: Figures) -> StudyTable:
    """Failures by arm, round and request."""
    columns = (
        StudyColumn(name="arm", title="Arm"),
        StudyColumn(name="round", title="After round"),
        StudyColumn(name="request", title="Request"),
        StudyColumn(name="attempts", title="Attempts"),
        StudyColumn(
            name="failures", title="Valid failures", unit="%", digits=1, note="The target errs, the oracle agrees."
        ),
        StudyColumn(name="accepted", title="Accepted", note="By the rule of the request."),
    )
    rows = [
        (arm.label, number, row.request, row.attempts, percent(failure_rate([row])), row.accepted)
        for arm in figures.design.finding
        for number in range(figures.design.spec.rounds + 1)
        for row in figures.failures(arm.label, number)
    ]
    return StudyTable(
        name="failures",
        title="Failures of the retrained networks of the first seed",
        columns=columns,
        rows=tuple(rows),
        note="Intervals over samples (Wilson, 95 %). The first run is one for all arms.",
    )


def forgetting_table(figures: Figures) -> StudyTable:
    """Forgetting and convergence by arm."""
    columns = (
        StudyColumn(name="arm", title="Arm"),
        StudyColumn(
            name="forgetting", title="Forgetting, mean", unit="points", note="Best earlier accuracy less the last."
        ),
        StudyColumn(name="worst", title="Forgetting, worst", unit="points"),
        StudyColumn(name="context", title="In context"),
        StudyColumn(name="decay", title="Failures left after each round, as a share of those before it"),
        StudyColumn(name="convergence", title="Convergence"),
    )
    rows = []
    for arm in figures.design.arms:
        forgotten = figures.forgetting(arm.label)
        decay = figures.decay(arm) if arm in figures.design.finding else None
        rows.append(
            (
                arm.label,
                percent(forgotten.mean) if forgotten else None,
                percent(forgotten.worst) if forgotten else None,
                context_name(forgotten.worst_context) if forgotten else None,
                _share_left(decay),
                half_life(decay) if arm in figures.design.finding else None,
            )
        )
    return StudyTable(
        name="forgetting", title="Forgetting and convergence", columns=columns, rows=tuple(rows),
        note="95 % intervals: of forgetting from a bootstrap over seeds and images; of the decay by likelihood.",
    )  # fmt: skip


def _share_left(decay: Estimate | None) -> Cell:
    import math

    if decay is None:
        return None
    # A rate without a bound below would mean more failures without end.
    return Interval(
        value=math.exp(-max(decay.value, -50.0)),
        low=math.exp(-max(decay.high, -50.0)),
        high=math.exp(-max(decay.low, -50.0)),
    )


def rounds_figure(figures: Figures) -> StudyFigure:
    """Accuracy and failures left by round, a line for each arm."""
    shown = [name for name in ("weak", "other", "seen", "corrupted") if len(figures.groups[name])]
    if "weak" in shown and "other" in shown:
        shown.remove("other")
    has_failures = bool(figures.design.finding)
    panels = [*shown, *(["failures"] if has_failures else [])]

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, name in zip(axes, panels, strict=True):
            _paint_panel(axis, figures, name)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(7, len(figures.design.arms))
        )

    return StudyFigure(
        name="figure",
        caption="Accuracy on test images, and valid failures among the attempts of a run, by round (95 % intervals).",
        svg=draw(3.2 * len(panels), 3.4, paint),
    )


def _paint_panel(axis: Any, figures: Figures, name: str) -> None:
    rounds = range(figures.design.spec.rounds + 1)
    arms = figures.design.finding if name == "failures" else figures.design.arms
    for place, arm in enumerate(figures.design.arms):
        if arm not in arms:
            continue
        if name == "failures":
            values = [failure_rate(figures.failures(arm.label, number)) for number in rounds]
        else:
            values = [figures.accuracy(arm.label, number, figures.groups[name]) for number in rounds]
        known = [(number, value) for number, value in zip(rounds, values, strict=True) if value is not None]
        # Side by side, so that intervals can be told apart.
        shift = 0.05 * (place - (len(figures.design.arms) - 1) / 2)
        axis.errorbar(
            [number + shift for number, _ in known],
            [100 * value.value for _, value in known],
            yerr=[
                [100 * (value.value - value.low) for _, value in known],
                [100 * (value.high - value.value) for _, value in known],
            ],
            label=arm.label,
            linewidth=1.2,
            markersize=4,
            elinewidth=0.7,
            **series_style(place),
        )
    axis.set_title("Valid failures left, %" if name == "failures" else f"{GROUPS[name][0]}, %", fontsize=10)
    axis.set_xlabel("round")
    axis.set_xticks(list(rounds))
