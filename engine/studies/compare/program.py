"""Two runs compared: what a target fails on now and did not before, by request, class and context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.errors import JobError
from engine.job.columns import NO_CLASS
from engine.methods.intervals import LEVEL
from engine.studies.compare.matching import MIN_SAMPLES, Match, match_rows, pairs_among
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

    @property
    def place(self) -> tuple[str, str, str]:
        """Request, level and group."""
        return self.request, self.level, self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A sample whose failure is new or fixed; `key` is that of the newer run.

    Attributes:
        predicted_class: in the newer run; -1 where a baseline does not know it, and its name is empty then.
    """

    key: str
    old_key: str
    request: str
    class_name: str
    context: str
    old_predicted_class: int
    old_predicted_class_name: str
    predicted_class: int
    predicted_class_name: str
    old_risk: float
    new_risk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedFailure:
    """A failure of the newer run among samples that have no pair in the older one, such as fresh ones."""

    key: str
    request: str
    class_name: str
    context: str
    predicted_class: int
    predicted_class_name: str
    new_risk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TooFew:
    """A class or context that is not compared, because a night has fewer samples of it than that takes."""

    request: str
    level: str
    group: str
    num_old: int
    num_new: int
    num_needed: int = MIN_SAMPLES


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """What has changed between two runs.

    Attributes:
        new_failures, fixed, unpaired_failures: largest risk first.
        too_few: classes and contexts that are not compared; in words they are among the notes.
        notes: what was not compared, and why.
    """

    old: ScoredRun
    new: ScoredRun
    confidence: float
    rows: tuple[GroupComparison, ...]
    new_failures: tuple[Change, ...]
    fixed: tuple[Change, ...]
    notes: tuple[str, ...]
    unpaired_failures: tuple[UnpairedFailure, ...] = ()
    too_few: tuple[TooFew, ...] = ()

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
    too_few: list[TooFew] = []
    changed = _Changes(old, new)
    for request in dict.fromkeys(old.requests):
        if request not in new.methods:
            continue
        advance(f"comparing request {request}")
        changed.add(request)
        match = match_rows(old, new, request)
        notes += match.notes
        if not match.is_enough:
            continue
        groups = [group for group in _groups(old, new, match) if group[0] in levels]
        rows += [
            _compare_rows(old, new, (request, level, name), a, b, match.is_paired, confidence)
            for level, name, a, b in groups
            if _is_enough(a, b)
        ]
        missed = [
            TooFew(request=request, level=level, group=name, num_old=len(a), num_new=len(b))
            for level, name, a, b in groups
            if not _is_enough(a, b)
        ]
        notes += _too_few_notes(request, missed)
        too_few += missed
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
        new_failures=tuple(sorted(changed.new_failures, key=lambda change: (-change.new_risk, change.key))),
        fixed=tuple(sorted(changed.fixed, key=lambda change: (-change.old_risk, change.key))),
        notes=tuple(notes),
        unpaired_failures=tuple(changed.unpaired()),
        too_few=tuple(too_few),
    )


def _is_enough(a: Rows, b: Rows) -> bool:
    return min(len(a), len(b)) >= MIN_SAMPLES


def _too_few_notes(request: str, missed: Sequence[TooFew]) -> Iterator[str]:
    """Which classes and which contexts of a request are not compared, with their numbers of samples."""
    for level, plural in (("class", "classes"), ("context", "contexts")):
        some = [one for one in missed if one.level == level]
        if not some:
            continue
        names = [f"{one.group or 'none'} ({one.num_old} and {one.num_new})" for one in some[:MAX_LISTED]]
        more = f" and {len(some) - MAX_LISTED} more" if len(some) > MAX_LISTED else ""
        yield (
            f"request {request!r}: {len(some)} {level if len(some) == 1 else plural} not compared, with fewer than the"
            f" {MIN_SAMPLES} samples in both nights that this takes: {', '.join(names)}{more}"
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
        if run.num_samples > len(run.keys):
            yield (
                f"{run.address}: {len(run.keys)} of {run.num_samples} scored samples are compared, chosen evenly by"
                " their seeds; new and fixed failures are those among them"
            )
    for run in (old, new):
        if run.unknown:
            yield (
                f"{run.address}: is a baseline from before errors of joint prompts were counted outside their classes,"
                f" so those of {_listed(sorted(run.unknown))} are not compared; pin it again"
            )
    if old.target["digest"] == new.target["digest"] and old.temperature != new.temperature:
        was, now = (f"{run.temperature:.4g}" if run.temperature else "its own" for run in (old, new))
        yield f"temperature of the target: {was} -> {now}; risk, KLDB and entropy are not of one scale"
    for name in old.methods:
        if old.methods[name] != new.methods.get(name, old.methods[name]):
            yield f"request {name!r}: method {old.methods[name]} -> {new.methods[name]}"


def _groups(old: ScoredRun, new: ScoredRun, match: Match) -> Iterator[tuple[str, str, Rows, Rows]]:
    """Level, name and rows in both runs of a request, its classes and its contexts, where it has several."""
    a, b, is_paired = match.old, match.new, match.is_paired
    yield "request", "", a, b
    for level, first, second in (("class", old.classes, new.classes), ("context", old.contexts, new.contexts)):
        names = list(dict.fromkeys(first[a]))
        if len(names) > 1:
            for name in names:
                # Pairs have one prompt, so their class and context are those of the first.
                yield level, name, a[first[a] == name], b[(first[a] if is_paired else second[b]) == name]


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


class _Changes:
    """Failures that are new, fixed or without a pair, collected request by request."""

    def __init__(self, old: ScoredRun, new: ScoredRun) -> None:
        self.new_failures: list[Change] = []
        self.fixed: list[Change] = []
        self._old, self._new = old, new
        self._names = old.class_names(), new.class_names()
        self._has_pair = np.zeros(len(new.keys), dtype=bool)

    def add(self, request: str) -> None:
        """Take the pairs of a request, however few: a failure is new whatever else can be said of its request."""
        old, new = self._old, self._new
        a, b = (np.flatnonzero(run.requests == request) for run in (old, new))
        first, second = pairs_among(old, new, a, b)
        self._has_pair[second] = True
        if request in old.unknown | new.unknown:
            return
        for some, was in ((self.new_failures, False), (self.fixed, True)):
            differ = (old.is_error[first] == was) & (new.is_error[second] != was)
            some += [self._change(int(x), int(y)) for x, y in zip(first[differ], second[differ], strict=True)]

    def _change(self, a: int, b: int) -> Change:
        old, new = self._old, self._new
        was, now = _prediction(old, a, self._names[0]), _prediction(new, b, self._names[1])
        return Change(
            key=new.keys[b],
            old_key=old.keys[a],
            request=new.requests[b],
            class_name=new.classes[b],
            context=new.contexts[b],
            old_predicted_class=was[0],
            old_predicted_class_name=was[1],
            predicted_class=now[0],
            predicted_class_name=now[1],
            old_risk=float(old.scores["risk"][a]),
            new_risk=float(new.scores["risk"][b]),
        )

    def unpaired(self) -> list[UnpairedFailure]:
        """Failures of the newer run among samples without a pair, the largest risk first."""
        new = self._new
        rows = np.flatnonzero(new.is_error & ~self._has_pair).tolist()
        failures = []
        for row in sorted(rows, key=lambda row: (-new.scores["risk"][row], str(new.keys[row]))):
            index, name = _prediction(new, row, self._names[1])
            failures.append(
                UnpairedFailure(
                    key=new.keys[row],
                    request=new.requests[row],
                    class_name=new.classes[row],
                    context=new.contexts[row],
                    predicted_class=index,
                    predicted_class_name=name,
                    new_risk=float(new.scores["risk"][row]),
                )
            )
        return failures


def _prediction(run: ScoredRun, row: int, names: dict[int, str]) -> tuple[int, str]:
    """Index and name of the class that the target predicts; -1 and no name where a baseline does not know it."""
    if run.predicted is None:
        return NO_CLASS, ""
    index = int(run.predicted[row])
    return index, names.get(index, str(index))


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
