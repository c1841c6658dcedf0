"""The figures of an ablation: differences as a forest, and shares by the quality of predictors or by components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.data.run.study_document import StudyFigure
from engine.studies.ablate.arms import Arm
from engine.studies.ablate.measures import CONFORMITY, ERRORS, TRANSFER, VALID, Measure, Samples, share
from engine.studies.ablate.results import Results
from engine.studies.experiments.figures import draw, series_style

# Of the forest, from left to right, as far as they are known.
FOREST = (VALID, ERRORS, TRANSFER, CONFORMITY)
SHARES = (ERRORS, VALID, TRANSFER)


def figures_of(results: Results) -> tuple[StudyFigure, ...]:
    """The main figure first: the forest, or the first of the others where no part is taken away."""
    figures = []
    if results.has_changed_parts:
        figures.append(_forest(results))
    if results.predictors:
        aucs = {step: predictor.auc for step, predictor in enumerate(results.predictors)}
        caption = "Screening by weakened predictors, alone and with guidance, by their AUC on held-out images"
        figures.append(_curves(results, results.design.of("predictor"), aucs, "predictor", "AUC", caption))
    if arms := results.design.of("components"):
        numbers = {arm.step: float(arm.step) for arm in arms if arm.step is not None}
        caption = "One Gaussian a class and mixtures, alone and with guidance"
        figures.append(_curves(results, arms, numbers, "components", "Gaussians a class", caption))
    if figures and figures[0].name != "figure":
        figures[0] = figures[0].model_copy(update={"name": "figure"})
    return tuple(figures)


def _forest(results: Results) -> StudyFigure:
    """Differences to the whole recipe with their intervals, a panel a measure."""
    arms = [arm for arm in results.design.of("parts") if results.changes.get(arm.name)]
    measures = [one for one in FOREST if any(one.name in results.changes[arm.name] for arm in arms)]

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for panel, measure in zip(panels, measures, strict=True):
            _panel(panel, results, arms, measure)
        panels[0].set_yticks(range(len(arms)), [arm.title for arm in arms])
        panels[0].invert_yaxis()

    svg = draw(2.6 + 2.1 * len(measures), 1.0 + 0.32 * len(arms), paint)
    caption = (
        "Differences to the whole recipe with 95 % intervals, from pairs of equal noise; filled: significant at 5 %"
        " after Holm over the parts"
    )
    return StudyFigure(name="figure", caption=caption, svg=svg)


def _panel(panel: Any, results: Results, arms: Sequence[Arm], measure: Measure) -> None:
    panel.axvline(0, color="#888888", linewidth=0.8)
    for row, arm in enumerate(arms):
        if (found := results.changes[arm.name].get(measure.name)) is None:
            continue
        change, style = found.change, series_style(0 if arm.part else 6)
        panel.plot([change.low, change.high], [row, row], color=style["color"], linewidth=1.2)
        face = style["color"] if results.is_shown(arm.name, measure) else "white"
        panel.plot([change.value], [row], marker="o", markersize=5, color=style["color"], markerfacecolor=face)
    panel.set_title(measure.title, fontsize=9.5)
    panel.locator_params(axis="x", nbins=4)


def _curves(
    results: Results, arms: Sequence[Arm], places: Mapping[int, float], name: str, axis: str, caption: str
) -> StudyFigure:
    """Shares with their intervals, and draws, by the place of each arm on the x axis; alone and with guidance."""
    measures = [one for one in SHARES if all(one.values(results.samples[arm.name]) is not None for arm in arms)]

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(measures) + 1, squeeze=False)[0]
        for number, (is_guided, label) in enumerate(((False, "screening alone"), (True, "with guidance"))):
            own = [(places[arm.step or 0], results.samples[arm.name]) for arm in arms if arm.is_guided == is_guided]
            for panel, measure in zip(panels, measures, strict=False):
                _shares(panel, own, measure, label, number)
            if is_guided:
                panels[-1].plot([x for x, _ in own], [samples.draws for _, samples in own], **series_style(2))
        for panel, title in zip(panels, [*(one.title for one in measures), "draws a sample"], strict=True):
            panel.set_title(title, fontsize=9.5)
            panel.set_xlabel(axis)
        for panel in panels[:-1]:
            panel.set_ylim(-0.03, 1.03)
        panels[0].legend(fontsize=8)
        panels[-1].set_ylim(bottom=0)
        for panel in panels:
            panel.set_xticks(sorted(set(places.values())), [f"{x:.3g}" for x in sorted(set(places.values()))])

    return StudyFigure(name=name, caption=caption, svg=draw(2.6 * (len(measures) + 1), 2.7, paint))


def _shares(panel: Any, own: Sequence[tuple[float, Samples]], measure: Measure, label: str, number: int) -> None:
    """A line of shares with their intervals."""
    estimates = [(x, share(measure.values(samples))) for x, samples in own]  # type: ignore[arg-type]
    known = [(x, one) for x, one in estimates if one is not None]
    bars = [[one.value - one.low for _, one in known], [one.high - one.value for _, one in known]]
    values = [one.value for _, one in known]
    panel.errorbar([x for x, _ in known], values, yerr=bars, capsize=2, label=label, **series_style(number))
