"""The findings of a study of rounds in words, with its goals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.methods.intervals import Estimate
from engine.studies.retrain.accuracy import context_name
from engine.studies.retrain.arm_records import ACCEPTED, BEFORE, UNFILTERED, ArmChoice
from engine.studies.retrain.changes import ArmChange, ContextChange
from engine.studies.rounds.convergence import half_life
from engine.studies.rounds.measures import Figures, failure_rate
from engine.studies.rounds.player import Played

# In points: what weak contexts are to gain, and what the mean of the others may lose.
WANTED_GAIN, ALLOWED_LOSS = 3.0, 0.3
MAX_NAMED = 6


def findings(figures: Figures) -> Iterator[str]:
    """A sentence or two for each finding; nothing beyond the figures."""
    weak = figures.weak
    # Contexts have commas of their own.
    names = "; ".join(map(context_name, weak.contexts)) or "none"
    yield f"Weak contexts: {names} ({weak.source})."
    for arm in figures.design.arms:
        if arm.label != figures.design.base:
            yield from _of_arm(figures, arm)
    yield from _fewer_samples(figures)
    for arm in figures.design.finding:
        yield _failures(figures, arm)
    for arm in figures.design.arms:
        if (forgotten := figures.forgetting(arm.label)) is not None:
            yield (
                f"{arm.label} forgets {points(forgotten.mean, signed=False)} points on average over contexts,"
                f" {points(forgotten.worst, signed=False)} in the worst ({context_name(forgotten.worst_context)})."
            )


def _of_arm(figures: Figures, arm: ArmChoice) -> Iterator[str]:
    last, base = figures.design.spec.rounds, figures.design.base
    change = figures.change(arm.label)
    samples = figures.played.num_samples.get((arm.label, last), 0)
    parts = [f"all test images {points(change.overall)}"]
    if change.others is not None:
        parts.append(f"mean of the {len(change.rest)} contexts that are not weak {points(change.others)}")
    for name, what in (("seen", "in distribution"), ("corrupted", "corruptions")):
        difference = figures.difference(arm.label, base, last, figures.groups[name])
        if difference is not None:
            parts.append(f"{what} {points(difference)}")
    with_samples = f" with {samples} samples" if arm.record.samples else ""
    yield f"{arm.label} after round {last}{with_samples}, less {base}, in points: {'; '.join(parts)}."
    if change.weak:
        yield f"{arm.label}, weak contexts: {_listed(change.weak)}."
    if arm.record.samples and change.weak:
        yield _goals(arm, change)


def _goals(arm: ArmChoice, change: ArmChange) -> str:
    others = [] if change.others is None else [change.others]
    goals = {
        f"every weak context gains {WANTED_GAIN:g} points or more": _met(
            [row.change for row in change.weak], WANTED_GAIN
        ),
        f"the others lose {ALLOWED_LOSS:g} on average at most": _met(others, -ALLOWED_LOSS),
        "none is significantly worse after Holm": "no" if change.worse else "yes",
    }
    worse = f" ({_listed(change.worse)})" if change.worse else ""
    parts = "; ".join(f"{goal}: {answer}" for goal, answer in goals.items())
    return f"{arm.label}, goals: {parts}{worse}."


def _met(changes: Sequence[Estimate], least: float) -> str:
    """Whether all changes are as large as they should be, by their intervals or by their estimates alone.

    Args:
        least: in points.
    """
    if all(100 * change.low >= least for change in changes):
        return "yes"
    is_estimated = all(100 * change.value >= least for change in changes)
    return "by the estimate, the interval allows less" if is_estimated else "no"


def _listed(rows: tuple[ContextChange, ...]) -> str:
    shown = [f"{context_name(row.context)} {points(row.change)}" for row in rows[:MAX_NAMED]]
    more = len(rows) - MAX_NAMED
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def _fewer_samples(figures: Figures) -> Iterator[str]:
    """Whether accepted samples do as much as more unfiltered ones."""
    last, weak = figures.design.spec.rounds, figures.groups["weak"]
    if not len(weak):
        return
    arms = figures.design.sampled
    for few in (arm for arm in arms if arm.record.samples == ACCEPTED):
        for many in (arm for arm in arms if arm.record.samples == UNFILTERED):
            counts = [figures.played.num_samples[arm.label, last] for arm in (few, many)]
            if not 0 < counts[0] < counts[1]:
                continue
            difference = figures.difference(few.label, many.label, last, weak)
            assert difference is not None
            yield (
                f"{few.label} with {counts[0]} samples less {many.label} with {counts[1]}, weak contexts:"
                f" {points(difference)} points."
            )


def _failures(figures: Figures, arm: ArmChoice) -> str:
    rates = [failure_rate(figures.failures(arm.label, number)) for number in range(figures.design.spec.rounds + 1)]
    shown = ", ".join(f"{100 * rate.value:.1f}" for rate in rates if rate is not None)
    return f"{arm.label}: valid failures among attempts {shown} % by round; {half_life(figures.decay(arm))}."


def points(estimate: Estimate, *, signed: bool = True) -> str:
    """A share or a difference of shares in percentage points, with its interval."""
    sign = "+" if signed else ""
    value, low, high = (round(100 * share, 1) + 0.0 for share in (estimate.value, estimate.low, estimate.high))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def notes(figures: Figures) -> Iterator[str]:
    """What was left out, and what limits the findings."""
    design, material = figures.design, figures.material
    if figures.weak.missing:
        names = "; ".join(map(context_name, figures.weak.missing))
        yield f"weak in the first run, and no image of test has these contexts: {names}"
    if design.base == BEFORE:
        yield "arms are compared with the target before; with the arm none: with training on real images alone"
    if material.overlap:
        yield f"not independent: {material.overlap} different images of test are also in real"
    if not any(design.job.independent_oracles):
        yield "no oracle: a failure is what the target gets wrong, whether or not the sample shows its class"
    screened = [
        one.name
        for one in design.job.requests
        if one.name in design.risky and one.conditioning and one.conditioning.is_screened
    ]
    if screened and design.spec.rounds > 1:
        yield f"{', '.join(screened)}: screened in all rounds by the errors of the target before"
    if design.job.models.further_targets and design.sampled:
        yield "further_targets of the job guide all runs as they are: they are not retrained"
    empty = _without_samples(figures.played, design.spec.rounds, [arm.label for arm in design.sampled])
    if empty:
        yield f"no samples to train on, so real images alone: {', '.join(empty)}"
    if design.sampled:
        yield "failures are counted with the network of the first seed of an arm; its samples train all seeds"
    yield "forgetting is above zero without any, as the best of several noisy accuracies is too large; compare arms"


def _without_samples(played: Played, rounds: int, arms: list[str]) -> list[str]:
    return [
        f"{arm} in round {number}"
        for arm in arms
        for number in range(1, rounds + 1)
        if not played.num_samples[arm, number]
    ]
