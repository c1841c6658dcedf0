"""Shares that people would find, of two runs side by side with the machines'."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.data.reading.people.results import REQUEST, WHOLE, GroupShares, Shares
from engine.data.reading.people.tables import with_interval
from engine.methods.intervals import Estimate
from engine.studies.compare.scored_run import ScoredRun

METRICS = {"valid": "valid labels", "failures": "valid failures"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanShares:
    """A share of a request's images in both runs, by machine and people.

    Attributes:
        request: its name; empty for all that was reviewed.
        metric: of `METRICS`.
        old, new: None where nobody looked at images of it.
        change: new less old of what people would find, with its interval (Newcombe 1998, method 10); None without both.
    """

    request: str
    metric: str
    old: Shares | None
    new: Shares | None
    change: Estimate | None


def human_shares(old: ScoredRun, new: ScoredRun) -> list[HumanShares]:
    """Shares of requests that people looked at in either run; of runs with other requests, those over all."""
    groups = [_groups(run) for run in (old, new)]
    names = [name for name in dict.fromkeys([*groups[0], *groups[1]]) if name in old.methods and name in new.methods]
    return [
        _human_shares(name, metric, *(getattr(some[name], metric) if name in some else None for some in groups))
        for name in names
        for metric in METRICS
    ]


def _groups(run: ScoredRun) -> dict[str, GroupShares]:
    """The reviewed requests by name; a single request is all that was reviewed."""
    results = run.people.results
    if results is None:
        return {}
    requests = {group.name: group for group in results.groups if group.level == REQUEST}
    if not requests and results.requests:
        requests = {results.requests[0]: next(group for group in results.groups if group.level == WHOLE)}
    return {name: group for name, group in requests.items() if group.num_reviewed}


def _human_shares(request: str, metric: str, old: Shares | None, new: Shares | None) -> HumanShares:
    first, second = (_by_people(shares) for shares in (old, new))
    change = None
    if first is not None and second is not None:
        difference = second.value - first.value
        low = difference - math.hypot(second.value - second.low, first.high - first.value)
        high = difference + math.hypot(second.high - second.value, first.value - first.low)
        change = Estimate(difference, max(-1.0, low), min(1.0, high))
    return HumanShares(request=request, metric=metric, old=old, new=new, change=change)


def _by_people(shares: Shares | None) -> Estimate | None:
    return None if shares is None else shares.corrected or shares.human


def people_lines(shares: list[HumanShares]) -> list[str]:
    """The shares in words, a line each."""
    return [_line(one) for one in shares]


def _line(one: HumanShares) -> str:
    text = f"{one.request}: {METRICS[one.metric]}: old {_text(one.old)}; new {_text(one.new)}"
    if one.change is None:
        return text
    low, high = (round(100 * bound) + 0 for bound in (one.change.low, one.change.high))
    return f"{text}; change {100 * one.change.value:+.1f} points ({low:+d} to {high:+d})"


def _text(shares: Shares | None) -> str:
    estimate = _by_people(shares)
    if shares is None or estimate is None:
        return "not looked at"
    if shares.machine is None:
        return f"{with_interval(estimate)} by people"
    how = "corrected by people" if shares.corrected else "by people alone"
    return f"{shares.machine:.1%} by machine, {with_interval(estimate)} {how}"


def people_document(shares: list[HumanShares]) -> list[dict[str, Any]]:
    """The shares as plain data."""
    return [asdict(one) for one in shares]
