"""The limits of a comparison: what may change before it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.errors import JobError
from engine.studies.compare.program import LEVELS, RunComparison, row_name
from engine.studies.compare.scored_run import metric_name
from engine.studies.compare.significance import Difference

if TYPE_CHECKING:
    pass

# Of these more is worse.
FAILURES = ("error_rate", "valid_failures", "risk")


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
    """Refuse numbers and levels that mean nothing.

    Raises:
        JobError: with all of them.
    """
    problems = [
        f"--max-{option}-increase: {limits.increases[metric]} is not a number of 0 or more"
        for metric, option in (("error_rate", "error"), ("valid_failures", "valid-failure"), ("risk", "risk"))
        if metric in limits.increases and not 0 <= limits.increases[metric] < math.inf
    ]
    if not 0.5 <= confidence < 1:
        problems.append(f"--confidence: {confidence} is not between 0.5 and 1, such as 0.95")
    problems += [f"--by: {one!r} is not one of {', '.join(LEVELS)}" for one in levels if one not in LEVELS]
    if problems:
        raise JobError(problems)


def crossed_limits(comparison: RunComparison, limits: Limits) -> list[str]:
    """The limits that are crossed, in words, a line each.

    Raises:
        JobError: a limit could not be held against any request.
    """
    known = {metric for row in comparison.rows if row.level == "request" for metric in row.differences}
    if unknown := [metric for metric in limits.increases if metric not in known]:
        raise JobError([f"the limit of {metric_name(one)}: no request has it in both runs" for one in unknown])
    lines = []
    for row in comparison.rows:
        for metric, allowed in limits.increases.items():
            found = row.differences.get(metric) if row.level == "request" else None
            if found is not None and found.change.low > allowed:
                lines.append(
                    f"{row_name(row)}: {metric_name(metric)} grew by {found.change.value:.3g} (at least"
                    f" {found.change.low:.3g} at {comparison.confidence:.0%}); {allowed:g} is allowed"
                )
        for metric in comparison.significant(row) if limits.fail_on != "never" else ():
            found = row.differences[metric]
            is_worse = metric in FAILURES and _is_up(found)
            if is_worse or limits.fail_on == "any-significant":
                lines.append(
                    f"{row_name(row)}: {metric_name(metric)} {found.old:.3g} -> {found.new:.3g} is significant"
                    f" (p {row.adjusted[metric]:.2g} after Holm)"
                )
    return lines


def _is_up(found: Difference) -> bool:
    """Whether a difference is a growth; where both medians are one, the interval's side tells."""
    return found.change.value > 0 or (found.change.value == 0 and found.change.high > -found.change.low)
