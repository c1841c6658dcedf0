"""The summary table: each request, then its contexts where it has several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from engine.data.run.summary import GroupSummary, plain_first, shown_entry_scores, shown_scores
from engine.job.columns import GUIDES, Role, by_rank
from engine.report.text import ABSENT, clip, number, percent

MAX_LINES = 300
MAX_NAME_CHARS = 400


@dataclass(frozen=True, slots=True)
class Heading:
    """Heading of a column of a table, and a second line in smaller print."""

    name: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A request (`is_total`) or one of its contexts; each cell has a text and a second line in smaller print."""

    name: str
    note: str
    is_total: bool
    cells: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of figures; `num_left_out` lines, in the summary those of contexts, are not shown."""

    columns: list[Heading]
    lines: list[Line]
    num_left_out: int


@dataclass(frozen=True, slots=True)
class Figure:
    """A column of a summary: its heading, and what gives the cell of a group."""

    heading: Heading
    cell: Callable[[GroupSummary], tuple[str, str]]


def summary_table(groups: list[GroupSummary], totals: list[GroupSummary], max_lines: int = MAX_LINES) -> Table:
    """The table of a run.

    Args:
        groups: per request and context.
        totals: per request; prompt-only ones come first.
        max_lines: beyond this, the contexts with the highest error rates are kept.
    """
    totals = plain_first(totals)
    figures = summary_figures(totals)
    contexts = {total.request: [group for group in groups if group.request == total.request] for total in totals}
    parts = [group for some in contexts.values() if len(some) > 1 for group in some]
    totals_shown = totals[:max_lines]
    worst = sorted(parts, key=lambda group: -(group.error_rate or 0.0))[: max_lines - len(totals_shown)]
    kept = {id(group) for group in worst}
    lines = []
    for total in totals_shown:
        some = contexts[total.request]
        only = _context(some[0]) if len(some) == 1 and some[0].context else ""
        heading = ", ".join(filter(None, [total.method, only]))
        lines.append(Line(total.request, heading, True, summary_cells(total, figures)))
        shown = [group for group in some if id(group) in kept]
        lines += [Line(_context(group), "", False, summary_cells(group, figures)) for group in shown]
    headings = [Heading("Request", "context"), *(figure.heading for figure in figures)]
    return Table(headings, lines, len(totals) + len(parts) - len(lines))


def summary_figures(groups: Sequence[GroupSummary]) -> list[Figure]:
    """The figures of summaries, in their order; models that no group names have none."""
    models = dict.fromkeys(summary.model for group in groups for summary in group.transfer)
    return [
        # First, so that a narrow screen shows it beside the name.
        Figure(Heading("Errors", "of scored"), _errors),
        Figure(Heading("Valid failures", "oracle agrees"), _valid_failures),
        Figure(Heading("Oracle", "agrees"), lambda group: _rate(group.oracle_agreement)),
        Figure(Heading("Images"), lambda group: (f"{group.ok:,}", "")),
        Figure(Heading("Attempted"), lambda group: (f"{group.attempted:,}", "")),
        Figure(Heading("Failed"), lambda group: (f"{group.failed:,}", "")),
        *_score_figures(groups),
        *(Figure(_transfer_heading(model), partial(_transfer, model)) for model in models),
    ]


def _score_figures(groups: Sequence[GroupSummary]) -> Iterator[Figure]:
    """The scores in the order of reports, each followed by its means under models that have entries."""
    entries = shown_entry_scores(groups)
    for column in by_rank(shown_scores(groups)):
        if Role.QUARTILES in column.roles:
            yield Figure(Heading(column.title, "median, quartiles"), partial(_quartiles, column.name))
        else:
            yield Figure(Heading(column.title, "median"), partial(_median, column.name))
        for name, entry in entries.items():
            if entry.score is column:
                yield Figure(Heading(column.title, f"{entry.column.name}, mean"), partial(_mean, name))


def summary_cells(group: GroupSummary, figures: Sequence[Figure]) -> list[tuple[str, str]]:
    """The figures of a group, in their order."""
    return [figure.cell(group) for figure in figures]


def _context(group: GroupSummary) -> str:
    return clip(group.context, MAX_NAME_CHARS) or "no context"


def _errors(group: GroupSummary) -> tuple[str, str]:
    """The share on which the target errs, and below it the numbers that it is of."""
    if group.error_rate is None:
        return ABSENT, ""
    num_scored = group.ok + group.rejected
    return percent(group.error_rate), f"{round(group.error_rate * num_scored):,} of {num_scored:,}"


def _rate(value: float | None) -> tuple[str, str]:
    return ABSENT if value is None else percent(value), ""


def _valid_failures(group: GroupSummary) -> tuple[str, str]:
    """Below it the share with a label that is valid by `label_is_valid`, where that is known."""
    strict = group.strict_failure_rate
    return _rate(group.valid_failure_rate)[0], "" if strict is None else f"strictly {percent(strict)}"


def _mean(name: str, group: GroupSummary) -> tuple[str, str]:
    value = group.entry_means.get(name)
    return ABSENT if value is None else number(value), ""


def _median(score: str, group: GroupSummary) -> tuple[str, str]:
    spread = group.scores.get(score)
    return ABSENT if spread is None else number(spread.median), ""


def _quartiles(score: str, group: GroupSummary) -> tuple[str, str]:
    spread = group.scores.get(score)
    if spread is None:
        return ABSENT, ""
    return number(spread.median), f"{number(spread.q25)} to {number(spread.q75)}"


def _transfer_heading(model: str) -> Heading:
    """Of a model that guidance saw, another: its errors are no transfer."""
    if model.endswith(GUIDES):
        return Heading("Further target errors", clip(model.removesuffix(GUIDES), 50) + GUIDES)
    return Heading("Transfer errors", clip(model, 60))


def _transfer(model: str, group: GroupSummary) -> tuple[str, str]:
    summary = next((summary for summary in group.transfer if summary.model == model), None)
    if summary is None:
        return ABSENT, ""
    return percent(summary.error_rate), f"risk {number(summary.risk_median)}"
