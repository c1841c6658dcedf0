"""A comparison of two runs for a terminal, as Markdown and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from engine.data.run.card import code
from engine.data.run.curated import KEY
from engine.data.run.curation_text import curation_facts
from engine.driver.progress import ABSENT, MAX_GROUP_ROWS
from engine.studies.compare.limits import Limits
from engine.studies.compare.people import human_shares, people_document, people_lines
from engine.studies.compare.program import Change, GroupComparison, RunComparison
from engine.studies.compare.scored_run import METRICS, SHARES, ScoredRun, metric_name
from engine.studies.compare.significance import Difference

MAX_MARKDOWN_ROWS = 200
MAX_CHANGES = 50
STAR = "*"
# How the Markdown begins.
PAGE_BEGINNING = "# `"
CORRECTION = "Holm"


def comparison_table(comparison: RunComparison) -> Table:
    """The requests, and under them the classes and contexts that differ most."""
    rows = _chosen(comparison, MAX_GROUP_ROWS)
    title = f"{_heading(comparison)}; old -> new, interval of the difference"
    if len(rows) < len(comparison.rows):
        title += f" ({len(rows)} of {len(comparison.rows)} rows; --json has all)"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    metrics = _metrics(comparison)
    for name in ("request", "class or context", "samples", *map(metric_name, metrics), "new", "mended"):
        table.add_column(name, justify="left" if name in ("request", "class or context") else "right")
    for row in rows:
        cells = [_cell(comparison, row, metric).replace(" (", "\n(") for metric in metrics]
        table.add_row(Text(row.request), Text(_group(row)), _samples(row), *cells, *_counts(row))
    return table


def comparison_markdown(comparison: RunComparison, crossed: Iterable[str] = ()) -> str:
    """All of it as Markdown: notes, table, limits that were crossed, failures that are new."""
    metrics, rows = _metrics(comparison), _chosen(comparison, MAX_MARKDOWN_ROWS)
    heads = ["request", "class or context", "samples", *map(metric_name, metrics), "new", "mended"]
    lines = [
        f"# {code(comparison.new.name, table=False)} against {code(comparison.old.name, table=False)}",
        "",
        *(f"- {label}: {_description(run)}" for label, run in (("old", comparison.old), ("new", comparison.new))),
        "",
        f"{_heading(comparison)}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in rows:
        cells = [_cell(comparison, row, metric).replace(STAR, "\\*") for metric in metrics]
        group = code(_group(row)) if _group(row) else ""
        lines.append(f"| {' | '.join([code(row.request), group, _samples(row), *cells, *_counts(row)])} |")
    if len(rows) < len(comparison.rows):
        lines += ["", f"{len(comparison.rows) - len(rows)} more rows are left out."]
    lines += _section("Curation", [code(line, table=False) for line in curation_lines(comparison)])
    lines += _section("What people say", [code(line, table=False) for line in human_lines(comparison)])
    lines += _section("Past a limit", [code(line, table=False) for line in crossed])
    lines += _section("Not compared", [code(line, table=False) for line in comparison.notes])
    for title, changes in (("New failures", comparison.new_failures), ("Mended", comparison.fixed)):
        lines += _section(
            f"{title}: {len(changes)}" if changes else "", [_change(change) for change in changes[:MAX_CHANGES]]
        )
    return "\n".join(lines) + "\n"


def comparison_document(comparison: RunComparison, limits: Limits, crossed: list[str]) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "old": _identity(comparison.old),
        "new": _identity(comparison.new),
        "confidence": comparison.confidence,
        "correction": CORRECTION,
        "rows": [_row(comparison, row) for row in comparison.rows],
        "new_failures": [asdict(change) for change in comparison.new_failures],
        "mended": [asdict(change) for change in comparison.fixed],
        "people": people_document(human_shares(comparison.old, comparison.new)),
        "notes": list(comparison.notes),
        "limits": asdict(limits),
        "crossed": crossed,
    }


def summary_document(comparison: RunComparison) -> dict[str, Any]:
    """What fits into a manifest: the rows of the requests, and how many failures are new and fixed."""
    return {
        "confidence": comparison.confidence,
        "correction": CORRECTION,
        "requests": [_row(comparison, row) for row in comparison.rows if row.level == "request"],
        "num_new_failures": len(comparison.new_failures),
        "num_mended": len(comparison.fixed),
    }


def _row(comparison: RunComparison, row: GroupComparison) -> dict[str, Any]:
    fields = {name: getattr(row, name) for name in ("request", "level", "group", "num_old", "num_new", "num_pairs")}
    counts = {"num_new_failures": row.num_new_failures, "num_mended": row.num_fixed} if row.num_pairs else {}
    return fields | counts | {
        "metrics": {
            metric: {
                "old": difference.old,
                "new": difference.new,
                "change": difference.change.value,
                "low": difference.change.low,
                "high": difference.change.high,
                "test": difference.test,
                "p": difference.p_value,
                "p_adjusted": row.adjusted.get(metric, 1.0),
                "significant": metric in comparison.significant(row),
            }
            for metric, difference in row.differences.items()
        }
    }  # fmt: skip


def curation_lines(comparison: RunComparison) -> list[str]:
    """What is known of the curation of the runs, a line each; none where neither was curated."""
    return [
        f"{label}: curated, {name.lower()}: {text}"
        for label, run in (("old", comparison.old), ("new", comparison.new))
        if run.curation
        for name, text in curation_facts(run.curation)
    ]


def human_lines(comparison: RunComparison) -> list[str]:
    """What people say of the requests of both runs, a line each; none where nobody looked at their images."""
    problems = [
        f"{label}: {problem}"
        for label, run in (("old", comparison.old), ("new", comparison.new))
        for problem in run.people.problems
    ]
    return people_lines(human_shares(comparison.old, comparison.new)) + problems


def _identity(run: ScoredRun) -> dict[str, Any]:
    identity = {"address": run.address, "name": run.name, "target": run.target, "num_samples": len(run.keys)}
    return identity | ({KEY: run.curation.to_document()} if run.curation else {})


def _chosen(comparison: RunComparison, limit: int) -> list[GroupComparison]:
    """All rows where they fit; else the requests and the rows with the smallest p, in their order."""
    if len(comparison.rows) <= limit:
        return list(comparison.rows)
    rank = sorted(comparison.rows, key=lambda row: (row.level != "request", min(row.adjusted.values(), default=1.0)))
    kept = set(map(id, rank[:limit]))
    return [row for row in comparison.rows if id(row) in kept]


def _metrics(comparison: RunComparison) -> list[str]:
    return [name for name in METRICS if any(name in row.differences for row in comparison.rows)]


def _heading(comparison: RunComparison) -> str:
    alpha = 1 - comparison.confidence
    return (
        f"{comparison.confidence:.0%} intervals; {STAR} differs at {alpha:.2g} over all tests together ({CORRECTION})"
    )


def _description(run: ScoredRun) -> str:
    target = f"{code(run.target['address'], table=False)} `{run.target['digest'][:8]}`"
    return f"{code(run.address, table=False)}, {len(run.keys)} scored samples, target {target}"


def _group(row: GroupComparison) -> str:
    return "" if row.level == "request" else f"{row.level} {row.group or 'none'}"


def _samples(row: GroupComparison) -> str:
    return f"{row.num_pairs} pairs" if row.num_pairs else f"{row.num_old} and {row.num_new}"


def _counts(row: GroupComparison) -> tuple[str, str]:
    return (str(row.num_new_failures), str(row.num_fixed)) if row.num_pairs else (ABSENT, ABSENT)


def _cell(comparison: RunComparison, row: GroupComparison, metric: str) -> str:
    difference = row.differences.get(metric)
    if difference is None:
        return ABSENT
    star = STAR if metric in comparison.significant(row) else ""
    return f"{_difference(metric, difference)}{star}"


def _difference(metric: str, difference: Difference) -> str:
    change = difference.change
    if change.is_degenerate:
        return f"{difference.old:.3g} -> {difference.new:.3g}"
    if metric in SHARES:
        low, high = (round(100 * bound) + 0 for bound in (change.low, change.high))
        return f"{difference.old:.1%} -> {difference.new:.1%} ({low:+d} to {high:+d})"
    return f"{difference.old:.3g} -> {difference.new:.3g} ({change.low:+.2g} to {change.high:+.2g})"


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {line}" for line in lines)] if lines else []


def _change(change: Change) -> str:
    words = [code(change.key, table=False), code(change.class_name, table=False)]
    words += [code(change.context, table=False)] if change.context else []
    return f"{', '.join(words)}: risk {change.old_risk:.3g} -> {change.new_risk:.3g}"
