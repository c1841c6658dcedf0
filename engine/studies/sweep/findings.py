"""What the figures of a sweep say, in sentences; what shows no effect is said too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from engine.methods.intervals import Estimate
from engine.studies.sweep.cells import CLASS_FIELDS, CrossedJob
from engine.studies.sweep.fields import canonical
from engine.studies.sweep.measures import Measure
from engine.studies.sweep.results import CellResult, Effect, Frontier

# A point that is on the frontier in so many resamples is not there by luck.
STEADY = 0.95
MAX_NAMED = 5
# Measures whose best cell is named, and those that tell what a field of numbers costs.
BEST = ("valid_failures", "target_errs", "kldb", "transfer_kldb")
COSTS = ("coverage", "recall", "spread", "kid", "kldb", "transfer_kldb", "valid_failures", "conformity")
Changed = Sequence[tuple[CellResult, CellResult, dict[str, Estimate]]]


def findings(
    crossed: CrossedJob,
    texts: Mapping[str, Mapping[str, str]],
    measures: Sequence[Measure],
    changed: Changed,
    effects: Sequence[Effect],
    frontiers: Sequence[Frontier],
) -> Iterator[str]:
    """The sentences.

    Args:
        texts: what tables call the values of each field, by `canonical`.
    """
    for frontier in frontiers:
        yield _frontier(crossed, frontier)
    by_name = {measure.name: measure for measure in measures}
    for name in BEST:
        if name in by_name:
            yield from _best(crossed, by_name[name], changed)
    for effect in effects:
        if isinstance(effect.new, int | float) and not isinstance(effect.new, bool):
            yield from _costs(crossed, texts[effect.field], effect, by_name)


def _frontier(crossed: CrossedJob, frontier: Frontier) -> str:
    order = sorted(range(len(frontier.results)), key=lambda place: -frontier.shares[place])
    on = [place for place in order if frontier.is_on[place]]
    named = "; ".join(
        f"{_label(crossed, frontier.results[place])} ({frontier.shares[place]:.0%})" for place in on[:MAX_NAMED]
    )
    more = f"; and {len(on) - MAX_NAMED} more" if len(on) > MAX_NAMED else ""
    steady = int(sum(frontier.shares[place] >= STEADY for place in on))
    axes, asked = frontier.axes, frontier.results[0].cell.asked_names(" and ")
    return (
        f"{axes.up.title} against {axes.across.title}, {asked}: {len(on)} of {len(order)} cells are on the frontier,"
        f" {steady} of them in {STEADY:.0%} of the resamples or more: {named}{more}"
    )


def _label(crossed: CrossedJob, result: CellResult) -> str:
    """A cell in words, without its classes, which the sentence names."""
    return crossed.label_without(result.cell, CLASS_FIELDS)


def _best(crossed: CrossedJob, measure: Measure, changed: Changed) -> Iterator[str]:
    """The best cell of each set of classes, and how far it is from its baseline."""
    for asked in dict.fromkeys(one.cell.asked for one, _, _ in changed):
        own = [row for row in changed if row[0].cell.asked == asked and measure.name in row[2]]
        if own:
            one, baseline, change = max(own, key=lambda row: measure.better * row[0].figures[measure.name].shown.value)
            value = one.figures[measure.name].shown.value
            luck = f" (chosen as the best of {len(own)}, which flatters it)" * (len(own) > 1)
            yield (
                f"{measure.title}, {one.cell.asked_names(' and ')}: {'most' if measure.better > 0 else 'least'} with"
                f" {_label(crossed, one)}, {value:.{measure.digits}f}; the difference to {_label(crossed, baseline)} is"
                f" {signed(change[measure.name], measure)}{luck}"
            )


def _costs(
    crossed: CrossedJob, texts: Mapping[str, str], effect: Effect, measures: Mapping[str, Measure]
) -> Iterator[str]:
    """What a field of numbers changes, where the interval excludes zero, and where it does not."""
    shown: list[str] = []
    unclear: list[str] = []
    for name in COSTS:
        if name in effect.changes and name in measures:
            change, measure = effect.changes[name], measures[name]
            text = f"{measure.title} {signed(change, measure)}"
            (shown if change.low > 0 or change.high < 0 else unclear).append(text)
    title = crossed.titles[effect.field]
    request = f" ({effect.request})" if len({cell.request for cell in crossed.cells}) > 1 else ""
    old, new = texts[canonical(effect.old)], texts[canonical(effect.new)]
    where = f"{title} from {old} to {new}{request}, mean of"
    pairs = f"{effect.num_pairs} pair{'s' * (effect.num_pairs != 1)} of cells"
    parts = [f"changes {', '.join(shown)}"] * bool(shown)
    parts += [f"no change is shown in {', '.join(unclear)}"] * bool(unclear)
    yield f"{where} {pairs}: {'; '.join(parts)}"


def signed(estimate: Estimate, measure: Measure) -> str:
    """A difference with its interval."""
    value, low, high = (f"{part:+.{measure.digits}f}" for part in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"
