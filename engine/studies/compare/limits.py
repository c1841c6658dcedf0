"""The limits of a comparison: what may change before it fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.errors import JobError
from engine.studies.compare.program import LEVELS, GroupComparison, RunComparison, row_name
from engine.studies.compare.scored_run import metric_name
from engine.studies.compare.significance import Difference

# Of these more is worse.
FAILURES = ("error_rate", "valid_failures", "strictly_valid_failures", "risk")
# The limit of valid failures applies to the strict ones where both runs know them.
STRICTER = {"valid_failures": "strictly_valid_failures"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may change before a comparison fails.

    Attributes:
        increases: by metric, how much it may grow in a request; crossed where the whole interval lies beyond.
        fail_on: `never`; `significant-increase`, of `FAILURES`; or `any-significant` difference, after Holm.
    """

    increases: dict[str, float] = field(default_factory=dict)
    fail_on: str = "never"


def check_limits(limits: Limits, confidence: float, levels: Sequence[str] = ()) -> None:
    """Check limits, confidence and levels.

    Raises:
        JobError: all problems, a line each.
    """
    problems = [
        f"--max-{option}-increase: {limits.increases[metric]} is not a number of 0 or more"
        for metric, option in (("error_rate", "error"), ("valid_failures", "valid-failure"), ("risk", "risk"))
        if metric in limits.increases and not 0 <= limits.increases[metric] < math.inf
    ]
    if not 0.5 <= confidence < 1:
        problems.append(f"--confidence: {confidence} is not between 0.5 and 1, such as 0.95")
    problems += [f"--by: {level!r} is not one of {', '.join(LEVELS)}" for level in levels if level not in LEVELS]
    if problems:
        raise JobError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A limit that was crossed.

    Attributes:
        place: request, level and group of the row.
        metric: where in the row.
        text: in words.
    """

    place: tuple[str, str, str]
    metric: str
    text: str


def crossed_limits(comparison: RunComparison, limits: Limits) -> list[Crossing]:
    """The limits that are crossed.

    Raises:
        JobError: no request has the metric of a limit in both runs.
    """
    known = {metric for row in comparison.rows if row.level == "request" for metric in row.differences}
    if unknown := [metric for metric in limits.increases if metric not in known]:
        raise JobError([f"the limit of {metric_name(metric)}: no request has it in both runs" for metric in unknown])
    crossings: list[Crossing] = []
    for row in comparison.rows:
        if row.level == "request":
            crossings += _increases(row, limits, comparison.confidence)
        if limits.fail_on != "never":
            crossings += _significant(comparison, row, limits.fail_on)
    return crossings


def _increases(row: GroupComparison, limits: Limits, confidence: float) -> Iterator[Crossing]:
    """Metrics of a request that grew by more than is allowed."""
    for name, allowed in limits.increases.items():
        metric = STRICTER.get(name, name)
        metric = metric if metric in row.differences else name
        difference = row.differences.get(metric)
        if difference is not None and difference.change.low > allowed:
            text = (
                f"{row_name(row)}: {metric_name(metric)} grew by {difference.change.value:.3g} (at least"
                f" {difference.change.low:.3g} at {confidence:.0%}); {allowed:g} is allowed"
            )
            yield Crossing(place=row.place, metric=metric, text=text)


def _significant(comparison: RunComparison, row: GroupComparison, fail_on: str) -> Iterator[Crossing]:
    """Metrics of a row that differ significantly, for the worse where only that fails."""
    for metric in comparison.significant(row):
        difference = row.differences[metric]
        is_worse = metric in FAILURES and _is_up(difference)
        if is_worse or fail_on == "any-significant":
            text = (
                f"{row_name(row)}: {metric_name(metric)} {difference.old:.3g} -> {difference.new:.3g} is"
                f" significant (p {row.adjusted[metric]:.2g} after Holm)"
            )
            yield Crossing(place=row.place, metric=metric, text=text)


def _is_up(difference: Difference) -> bool:
    """Whether a difference is an increase; where both medians are equal, by the longer side of the interval."""
    change = difference.change
    return change.value > 0 or (change.value == 0 and change.high > -change.low)
