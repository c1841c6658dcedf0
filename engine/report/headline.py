"""The summary table: each request, then its contexts where it has several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.run.summary import GroupSummary, Spread, TransferSummary, summarise_table
from engine.report.text import ABSENT, clip, number, percent

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LINES = 300
MAX_NAME_CHARS = 400


@dataclass(frozen=True, slots=True)
class Column:
    """Heading of a column, and a second line in smaller print."""

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
    """The summary table; `num_left_out` lines of contexts are not shown."""

    columns: list[Column]
    lines: list[Line]
    num_left_out: int


def summary_table(groups: list[GroupSummary], totals: list[GroupSummary], max_lines: int = MAX_LINES) -> Table:
    """The table of a run.

    Args:
        groups: per request and context.
        totals: per request (`request_totals`), in order.
        max_lines: beyond this, the contexts with the highest error rates are kept.
    """
    models = list(dict.fromkeys(one.model for total in totals for one in total.transfer))
    has_judge = any(total.judge_conformity is not None for total in totals)
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
        lines.append(Line(total.request, heading, True, summary_cells(total, models, has_judge)))
        lines += [
            Line(_context(group), "", False, summary_cells(group, models, has_judge))
            for group in some
            if id(group) in kept
        ]
    return Table(summary_columns(models, has_judge), lines, len(totals) + len(parts) - len(lines))


def request_totals(table: pa.Table) -> list[GroupSummary]:
    """The summary per request alone, of a table with the columns of a shard."""
    import pyarrow as pa

    whole = pa.array([""] * table.num_rows, pa.string())
    return summarise_table(table.set_column(table.schema.get_field_index("context"), "context", whole))


def summary_columns(models: list[str], has_judge: bool) -> list[Column]:
    """Headings of a summary, the first one that of its lines."""
    fixed = [
        Column("Request", "context"),
        Column("Attempted"),
        Column("Images"),
        Column("Failed"),
        Column("Errors", "target"),
        Column("Risk", "median"),
        Column("KLDB", "median, quartiles"),
        Column("Conformity", "median"),
        *([Column("Conformity", "judge, mean")] if has_judge else []),
        Column("Entropy", "median"),
        Column("Oracle", "agrees"),
        Column("Valid failures", "oracle agrees"),
    ]
    return fixed + [Column("Transfer errors", clip(model, 60)) for model in models]


def summary_cells(group: GroupSummary, models: list[str], has_judge: bool) -> list[tuple[str, str]]:
    """The figures of a group, in the order of the columns."""
    seen = {one.model: one for one in group.transfer}
    return [
        (f"{group.attempted:,}", ""),
        (f"{group.ok:,}", ""),
        (f"{group.failed:,}", ""),
        _rate(group.error_rate),
        _median(group.risk),
        _quartiles(group.kldb),
        _median(group.conformity),
        *([_mean(group.judge_conformity)] if has_judge else []),
        _median(group.entropy),
        _rate(group.oracle_agreement),
        _rate(group.valid_failure_rate),
        *(_transfer(seen.get(model)) for model in models),
    ]


def _context(group: GroupSummary) -> str:
    return clip(group.context, MAX_NAME_CHARS) or "no context"


def _rate(value: float | None) -> tuple[str, str]:
    return ABSENT if value is None else percent(value), ""


def _mean(value: float | None) -> tuple[str, str]:
    return ABSENT if value is None else number(value), ""


def _median(spread: Spread | None) -> tuple[str, str]:
    return ABSENT if spread is None else number(spread.median), ""


def _quartiles(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return ABSENT, ""
    return number(spread.median), f"{number(spread.q25)} to {number(spread.q75)}"


def _transfer(summary: TransferSummary | None) -> tuple[str, str]:
    if summary is None:
        return ABSENT, ""
    return percent(summary.error_rate), f"risk {number(summary.risk_median)}"
