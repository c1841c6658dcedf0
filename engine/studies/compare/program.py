"""Two runs compared: what a target fails on now and did not before, by request, class and context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.errors import JobError
from engine.methods.intervals import LEVEL
from engine.studies.compare.matching import MIN_SAMPLES, Match, match_rows
from engine.studies.compare.scored_run import METRICS, SHARES, Rows, ScoredRun
from engine.studies.compare.significance import Difference, holm, median_difference, share_difference

LEVELS = ("request", "class", "context")
MAX_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupComparison:
    """A request, or a class or context of it, in both runs.

    Attributes:
        level: `request`, `class` or `context`.
        group: name of the class, or the context; empty for a request.
        num_pairs: pairs compared; 0 where two groups are.
        differences: by metric.
        adjusted: p by metric after Holm, over the whole comparison; of the tests that could reject.
        num_new_failures, num_fixed: pairs that fail now and did not before, and the reverse.
    """

    request: str
    level: str
    group: str
    num_old: int
    num_new: int
    num_pairs: int
    num_new_failures: int
    num_fixed: int
    differences: dict[str, Difference]
    adjusted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A sample whose failure is new or fixed; `key` is that of the newer run."""

    key: str
    old_key: str
    request: str
    class_name: str
    context: str
    old_risk: float
    new_risk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """What has changed between two runs.

    Attributes:
        notes: what was not compared, and why.
    """

    old: ScoredRun
    new: ScoredRun
    confidence: float
    rows: tuple[GroupComparison, ...]
    new_failures: tuple[Change, ...]
    fixed: tuple[Change, ...]
    notes: tuple[str, ...]

    def significant(self, row: GroupComparison) -> list[str]:
        """Metrics of a row that differ after the correction."""
        return [name for name, p_value in row.adjusted.items() if p_value < 1 - self.confidence]


def compare_runs(
    old: ScoredRun,
    new: ScoredRun,
    *,
    confidence: float = LEVEL,
    levels: Sequence[str] = LEVELS,
    advance: Callable[[str], None] = lambda text: None,
) -> RunComparison:
    """Compare two runs, request by request, each also by class and by context.

    Args:
        confidence: level of the intervals; the family-wise level of all tests is 1 - `confidence`.
        levels: which of `LEVELS` to compare at.

    Raises:
        JobError: the runs share nothing that could be compared.
    """
    _check_comparable(old, new)
    notes = list(_differing(old, new))
    rows: list[GroupComparison] = []
    changes: dict[bool, list[Change]] = {True: [], False: []}
    for request in dict.fromkeys(old.requests):
        if request not in new.methods:
            continue
        advance(f"comparing request {request}")
        match = match_rows(old, new, request)
        notes += match.notes
        if not match.is_enough:
            continue
        rows += _compare_request(old, new, request, match, confidence, levels)
        if match.is_paired and request not in old.unknown | new.unknown:
            for is_new in changes:
                changes[is_new] += _changes(old, new, match, is_new)
    if not rows:
        places = " or ".join(levels)
        raise JobError(
            [
                f"{old.address} and {new.address}: have nothing to compare: no {places} has {MIN_SAMPLES} samples"
                " in both; compare larger runs, or at other levels (--by)",
                *notes,
            ]
        )
    return RunComparison(
        old=old,
        new=new,
        confidence=confidence,
        rows=tuple(_adjusted(rows)),
        new_failures=tuple(changes[True]),
        fixed=tuple(changes[False]),
        notes=tuple(notes),
    )


def _check_comparable(old: ScoredRun, new: ScoredRun) -> None:
    if lines := label_differences(old.labels, new.labels):
        raise JobError([f"{old.address} and {new.address}: their targets have other classes", *lines])
    if not set(old.methods) & set(new.methods):
        raise JobError(
            f"{old.address} and {new.address}: share no request; the first has {_listed(old.methods)}, the second"
            f" {_listed(new.methods)}"
        )


def label_differences(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Lines for the classes that two lists do not have in common, or in another order."""
    lines = [f"class {index}: {a!r} -> {b!r}" for index, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"and {len(lines) - MAX_LISTED} more"]
    return lines + ([f"number of classes: {len(old)} -> {len(new)}"] if len(old) != len(new) else [])


def _listed(names: Sequence[str] | dict[str, str]) -> str:
    some = list(names)
    more = f" and {len(some) - MAX_LISTED} more" if len(some) > MAX_LISTED else ""
    return (", ".join(map(repr, some[:MAX_LISTED])) or "none") + more


def _differing(old: ScoredRun, new: ScoredRun) -> Iterator[str]:
    """Notes on what the two runs do not share."""
    for first, second in ((old, new), (new, old)):
        if missing := [name for name in first.methods if name not in second.methods]:
            yield f"only in {first.address}: {_listed(missing)}"
    for run in (old, new):
        if run.unknown:
            yield (
                f"{run.address}: is a baseline from before errors of joint prompts were counted outside their classes,"
                f" so those of {_listed(sorted(run.unknown))} are not compared; pin it again"
            )
    for name in old.methods:
        if old.methods[name] != new.methods.get(name, old.methods[name]):
            yield f"request {name!r}: method {old.methods[name]} -> {new.methods[name]}"


def _compare_request(
    old: ScoredRun,
    new: ScoredRun,
    request: str,
    match: Match,
    confidence: float,
    levels: Sequence[str],
) -> Iterator[GroupComparison]:
    a, b, is_paired = match.old, match.new, match.is_paired
    groups: list[tuple[str, str, Rows, Rows]] = [("request", "", a, b)]
    for level, first, second in (("class", old.classes, new.classes), ("context", old.contexts, new.contexts)):
        names = list(dict.fromkeys(first[a]))
        if len(names) > 1:
            # Pairs have one prompt, so their class and context are those of the first.
            chosen = ((name, first[a] == name, (first[a] if is_paired else second[b]) == name) for name in names)
            groups += [(level, name, a[of_a], b[of_b]) for name, of_a, of_b in chosen]
    for level, name, first_rows, second_rows in groups:
        if level in levels and min(len(first_rows), len(second_rows)) >= MIN_SAMPLES:
            yield _compare_rows(old, new, (request, level, name), first_rows, second_rows, is_paired, confidence)


def _compare_rows(
    old: ScoredRun, new: ScoredRun, name: tuple[str, str, str], a: Rows, b: Rows, is_paired: bool, confidence: float
) -> GroupComparison:
    differences = {}
    for metric in METRICS:
        first, second = old.metric(metric, a), new.metric(metric, b)
        if first is None or second is None:
            continue
        first, second = _measured(first, second, is_paired)
        if min(len(first), len(second)) >= MIN_SAMPLES:
            measure = share_difference if metric in SHARES else median_difference
            differences[metric] = measure(first, second, is_paired=is_paired, level=confidence)
    num_new_failures = num_fixed = 0
    if is_paired and "error_rate" in differences:
        num_new_failures = int((new.is_error[b] & ~old.is_error[a]).sum())
        num_fixed = int((old.is_error[a] & ~new.is_error[b]).sum())
    return GroupComparison(
        request=name[0],
        level=name[1],
        group=name[2],
        num_old=len(a),
        num_new=len(b),
        num_pairs=len(a) if is_paired else 0,
        num_new_failures=num_new_failures,
        num_fixed=num_fixed,
        differences=differences,
    )


def _measured(first: Any, second: Any, is_paired: bool) -> tuple[Any, Any]:
    """A metric of both runs without NaN; of pairs those that both runs have a value of."""
    known, also = ~np.isnan(first), ~np.isnan(second)
    if is_paired:
        known = also = known & also
    return first[known], second[also]


def _changes(old: ScoredRun, new: ScoredRun, match: Match, is_new: bool) -> Iterator[Change]:
    """The pairs that fail now and did not before, or the reverse, by key."""
    change = (not is_new, is_new)
    rows = zip(match.old, match.new, strict=True)
    pairs = [(a, b) for a, b in rows if (old.is_error[a], new.is_error[b]) == change]
    for a, b in sorted(pairs, key=lambda pair: str(new.keys[pair[1]])):
        yield Change(
            key=new.keys[b],
            old_key=old.keys[a],
            request=new.requests[b],
            class_name=new.classes[b],
            context=new.contexts[b],
            old_risk=float(old.scores["risk"][a]),
            new_risk=float(new.scores["risk"][b]),
        )


def _adjusted(rows: list[GroupComparison]) -> Iterator[GroupComparison]:
    """The rows with p values adjusted over all tests of all rows that could reject."""
    places = [
        (place, metric)
        for place, row in enumerate(rows)
        for metric, difference in row.differences.items()
        if difference.can_reject
    ]
    values = holm([rows[place].differences[metric].p_value for place, metric in places])
    adjusted: list[dict[str, float]] = [{} for _ in rows]
    for (place, metric), value in zip(places, values, strict=True):
        adjusted[place][metric] = value
    return (replace(row, adjusted=p_values) for row, p_values in zip(rows, adjusted, strict=True))


def row_name(row: GroupComparison) -> str:
    """A row in words."""
    return row.request if row.level == "request" else f"{row.request}, {row.level} {row.group or 'none'}"
