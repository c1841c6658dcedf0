"""Progress of a run: samples done, rate and remaining time of each request.

`Tally` counts. A display shows it: a live table on a terminal, plain lines every few seconds without one.
"""

from __future__ import annotations

import functools
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from engine.data.run.counts import ShardCounts
from engine.job.plan import Plan
from engine.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from engine.data.run.summary import GroupSummary

PLAIN_SECONDS = 5.0
MAX_LIVE_ROWS = 12
TABLE_WIDTH = 160
MAX_GROUP_ROWS = 60
# Of a line of a heading.
MAX_HEADING_CHARS = 12
ABSENT = "-"


@dataclass(slots=True)
class RequestTally:
    """Progress of a request.

    Attributes:
        total: samples in planned shards; grows with the rounds of a quota.
        committed: samples in committed shards, of any status.
        accepted, rejected, failed: of those.
        wanted: accepted samples that its quotas ask for; 0 without quotas.
        counted: accepted samples that count towards them, without those beyond the quota of their class.
        in_flight: samples done so far in shards in flight, by shard.
        started_at: time when its first samples in this session were started, None before any is done.
        done_before: samples that were done by then.
    """

    name: str
    total: int
    committed: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0
    wanted: int = 0
    counted: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)
    started_at: float | None = None
    done_before: int = 0

    @property
    def num_done(self) -> int:
        """Samples done, committed or not."""
        return self.committed + sum(self.in_flight.values())

    def rate(self, now: float) -> float:
        """Samples per second in this session; 0 if unknown."""
        if self.started_at is None or now <= self.started_at:
            return 0.0
        return max(0, self.num_done - self.done_before) / (now - self.started_at)

    def eta_seconds(self, now: float) -> float | None:
        """Remaining time at the rate so far; None if unknown."""
        rate = self.rate(now)
        return (self.total - self.num_done) / rate if rate else None


class Tally:
    """Samples per request, and their rates.

    Args:
        plan: the plan of the run.
        committed: counts of the committed shards, by number.
    """

    def __init__(self, plan: Plan, committed: dict[int, ShardCounts]) -> None:
        self._plan = plan
        self._is_committed = bytearray(plan.num_shards)
        planned = _planned(plan)
        wanted = [request.total if request.spec.has_quota else 0 for request in plan.requests]
        self.requests = [
            RequestTally(request.spec.name, planned[request.number], wanted=wanted[request.number])
            for request in plan.requests
        ]
        self.total = RequestTally("all", plan.num_samples, wanted=sum(wanted) if all(wanted) else 0)
        self._accepted: Counter[tuple[int, int]] = Counter()
        self._last_seen: dict[int, float] = {}
        for shard, counts in committed.items():
            self._add(shard, counts)

    def grow(self, plan: Plan) -> None:
        """Extend the plan by rounds of quotas."""
        self._plan = plan
        self._is_committed += bytes(plan.num_shards - len(self._is_committed))
        planned = _planned(plan)
        for number, row in enumerate(self.requests):
            row.total = planned[number]
        self.total.total = plan.num_samples

    def ready(self, worker: int, now: float) -> None:
        """Record that a worker became ready."""
        self._last_seen[worker] = now

    def progress(self, worker: int, shard: int, num_done: int, now: float) -> None:
        """Record progress of a shard in flight; late progress of a committed shard is ignored."""
        if self._is_committed[shard]:
            return
        self._start_clocks(worker, shard, now)
        for row in self._rows(shard):
            row.in_flight[shard] = num_done

    def commit(self, worker: int, shard: int, counts: ShardCounts, now: float) -> None:
        """Record that a shard was committed."""
        self._start_clocks(worker, shard, now)
        self.drop(shard)
        self._add(shard, counts)

    def drop(self, shard: int) -> None:
        """Drop the progress of a shard that failed."""
        for row in self._rows(shard):
            row.in_flight.pop(shard, None)

    def missing(self) -> Iterator[tuple[int, int, int]]:
        """Request, class or subset within it, and accepted samples that its quota lacks, of each quota."""
        for request in self._plan.requests:
            if request.spec.has_quota:
                for cell in range(len(request.cells)):
                    accepted = self._accepted[request.number, cell]
                    yield request.number, cell, max(0, request.spec.num_wanted - accepted)

    def _add(self, shard: int, counts: ShardCounts) -> None:
        """Count the samples of a committed shard."""
        self._is_committed[shard] = 1
        place, gained = self._plan.shard(shard), 0
        request = self._plan.requests[place.request].spec
        if request.has_quota:
            # Surplus of one class makes up for nothing that another lacks.
            before = self._accepted[place.request, place.cell]
            self._accepted[place.request, place.cell] = after = before + counts.accepted
            gained = min(after, request.num_wanted) - min(before, request.num_wanted)
        for row in self._rows(shard):
            row.committed += counts.attempted
            row.accepted += counts.accepted
            row.rejected += counts.rejected
            row.failed += counts.failed
            row.counted += gained

    def _rows(self, shard: int) -> tuple[RequestTally, RequestTally]:
        return self.requests[self._plan.shard(shard).request], self.total

    def _start_clocks(self, worker: int, shard: int, now: float) -> None:
        """Start the clock of a request when its first samples were started: at the worker's previous event."""
        for row in self._rows(shard):
            if row.started_at is None:
                row.started_at, row.done_before = self._last_seen.get(worker, now), row.num_done
        self._last_seen[worker] = now


def _planned(plan: Plan) -> Counter[int]:
    """Samples of each request in all shards that are planned."""
    planned: Counter[int] = Counter()
    for extent in plan.extents:
        planned[extent.request] += extent.stop - extent.start
    return planned


class Display(Protocol):
    """Shows progress."""

    def phase(self, text: str) -> None:
        """Show what the run is waiting for; empty while samples are made."""
        ...

    def notice(self, text: str) -> None:
        """Show a permanent message."""
        ...

    def advance(self, text: str) -> None:
        """Show the progress of a phase. Called often."""
        ...

    def show(self, tally: Tally) -> None:
        """Show the progress of the run. Called often."""
        ...

    def close(self) -> None:
        """Restore the terminal."""
        ...


class PlainDisplay:
    """Lines for logs: what changed, every few seconds.

    Args:
        stream: the lines are written to it.
        every_seconds: time between two lines of one request.
        clock: the clock of the tally, in seconds.
    """

    def __init__(
        self, stream: TextIO, every_seconds: float = PLAIN_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._every = every_seconds
        self._next = 0.0
        self._shown: dict[str, int] = {}

    def phase(self, text: str) -> None:
        """Print the line."""
        if text:
            self.notice(text)

    def notice(self, text: str) -> None:
        """Print the line."""
        print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=self._stream, flush=True)

    def advance(self, text: str) -> None:
        """Print the line, at most once per interval."""
        if self._is_time(self._clock()):
            self.notice(text)

    def show(self, tally: Tally) -> None:
        """Print a line for each request with progress, at most once per interval."""
        now = self._clock()
        if not self._is_time(now):
            return
        for row in [*tally.requests, tally.total] if len(tally.requests) > 1 else tally.requests:
            if row.num_done != self._shown.setdefault(row.name, row.committed):
                self._shown[row.name] = row.num_done
                self.notice(_line(row, now))

    def close(self) -> None:
        """Nothing to restore."""

    def _is_time(self, now: float) -> bool:
        if now < self._next:
            return False
        self._next = now + self._every
        return True


class LiveDisplay:
    """A live table, for terminals."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._phase = ""
        self._tally: Tally | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._live.start()

    def phase(self, text: str) -> None:
        """Show it with a spinner."""
        self._phase = text

    def notice(self, text: str) -> None:
        """Print it above the table."""
        self._console.print(text, markup=False, highlight=False)

    def advance(self, text: str) -> None:
        """Show it with the spinner."""
        self._phase = text

    def show(self, tally: Tally) -> None:
        """Show it at the next refresh."""
        self._tally = tally

    def close(self) -> None:
        """Remove the table."""
        self._live.stop()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        parts: list[Any] = [_live_table(self._tally)] if self._tally else []
        if self._phase:
            self._spinner = getattr(self, "_spinner", None) or Spinner("dots")
            self._spinner.update(text=Text(self._phase))
            parts.append(self._spinner)
        return Group(*parts)


def _live_table(tally: Tally) -> Table:
    from rich import box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    now = time.monotonic()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("request", "", "done", "accepted", "rate", "ETA"):
        table.add_column(name, justify="left" if name in ("request", "") else "right", no_wrap=True)
    for row in [*_live_rows(tally), tally.total] if len(tally.requests) > 1 else tally.requests:
        rate, eta = row.rate(now), row.eta_seconds(now)
        table.add_row(
            Text(row.name),
            ProgressBar(total=row.total, completed=row.num_done, width=24),
            f"{row.num_done}/{row.total}",
            f"{row.counted} of {row.wanted} wanted" if row.wanted else f"{row.accepted} of {row.committed}",
            f"{rate:.1f}/s" if rate else "",
            duration(eta) if eta is not None else "",
        )
    return table


def _live_rows(tally: Tally) -> Iterator[RequestTally]:
    """The requests that fit on a screen: those in flight, then the next ones, in order."""
    kept = {row.name for row in tally.requests if row.in_flight}
    for row in tally.requests:
        if len(kept) < MAX_LIVE_ROWS and (len(tally.requests) <= MAX_LIVE_ROWS or row.num_done < row.total):
            kept.add(row.name)
    return (row for row in tally.requests if row.name in kept)


def _line(row: RequestTally, now: float) -> str:
    parts = [f"{row.name} {row.num_done}/{row.total} samples"]
    if row.wanted:
        parts.append(f"accepted {row.counted} of {row.wanted} wanted")
    elif row.accepted < row.committed:
        parts.append(f"{row.accepted} of {row.committed} accepted")
    if rate := row.rate(now):
        parts.append(f"{rate:.1f}/s")
    if row.num_done < row.total and (eta := row.eta_seconds(now)) is not None:
        parts.append(f"ETA {duration(eta)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration for human readers: 8 s, 3 min, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def byte_size(num_bytes: int | None) -> str:
    """A size for human readers: 820 kB, 1.2 GB."""
    if num_bytes is None:
        return "unknown"
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def medians_table(groups: list[GroupSummary]) -> Table:
    """Medians of the scores per request and context, prompt-only ones first; of many the first groups."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.data.run.summary import plain_first

    title = "Medians per request and context"
    if len(groups) > MAX_GROUP_ROWS:
        title += f" ({MAX_GROUP_ROWS} of {len(groups)} rows; all are in the manifest)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    figures = _figures(groups)
    has_context = any(group.context for group in groups)
    for name in ("request", "context") if has_context else ("request",):
        table.add_column(Text(name), justify="left")
    for heading, _ in figures:
        # Broken by hand: rich takes the room that a long heading lacks from the words of all columns.
        table.add_column(Text(textwrap.fill(heading, MAX_HEADING_CHARS, break_long_words=False)), justify="right")
    for group in plain_first(groups)[:MAX_GROUP_ROWS]:
        names = [Text(group.request), *([Text(group.context)] if has_context else [])]
        table.add_row(*names, *(text_of(group) for _, text_of in figures))
    return table


def _figures(groups: list[GroupSummary]) -> list[tuple[str, Callable[[GroupSummary], str]]]:
    """The headings of the table of medians, each with what gives the text of a group."""
    from engine.data.run.summary import shown_entry_scores, shown_scores
    from engine.job.columns import target_first

    scores, entries = target_first(shown_scores(groups)), shown_entry_scores(groups)
    models = dict.fromkeys(summary.model for group in groups for summary in group.transfer)
    return [
        ("images", lambda group: f"{group.ok}/{group.attempted}"),
        *((column.label, functools.partial(_median, column.name)) for column in scores),
        ("errors", lambda group: _percent(group.error_rate)),
        *((f"errors of {model.removeprefix('zoo:')}", functools.partial(_transfer_errors, model)) for model in models),
        ("oracle agrees", lambda group: _percent(group.oracle_agreement)),
        _valid_failures(groups),
        *((entry.heading, functools.partial(_mean, name)) for name, entry in entries.items()),
    ]


def _valid_failures(groups: list[GroupSummary]) -> tuple[str, Callable[[GroupSummary], str]]:
    """Heading and text of valid failures; those with a label that is valid by `label_is_valid` in brackets."""
    if all(group.strict_failure_rate is None for group in groups):
        return "valid failures", lambda group: _percent(group.valid_failure_rate)
    return (
        "valid failures (strictly)",
        lambda group: f"{_percent(group.valid_failure_rate)} ({_percent(group.strict_failure_rate)})",
    )


def _median(score: str, group: GroupSummary) -> str:
    spread = group.scores.get(score)
    return f"{spread.median:.3g}" if spread else ABSENT


def _mean(name: str, group: GroupSummary) -> str:
    mean = group.entry_means.get(name)
    return ABSENT if mean is None else f"{mean:.3g}"


def _transfer_errors(model: str, group: GroupSummary) -> str:
    rates = {summary.model: summary.error_rate for summary in group.transfer}
    return _percent(rates.get(model))


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.0%}"
