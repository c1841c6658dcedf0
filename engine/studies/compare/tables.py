"""A comparison of two runs for a terminal, as Markdown and as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from engine.data.run.card import code
from engine.data.run.comparison import sentence
from engine.data.run.curated import KEY
from engine.data.run.curation_text import curation_facts
from engine.driver.progress import ABSENT, MAX_GROUP_ROWS
from engine.studies.compare.limits import Crossing, Limits
from engine.studies.compare.nights import night_names
from engine.studies.compare.people import human_shares, people_document, people_lines
from engine.studies.compare.program import Change, GroupComparison, RunComparison, UnpairedFailure
from engine.studies.compare.scored_run import METRICS, SHARES, ScoredRun, metric_name
from engine.studies.compare.significance import Difference

MAX_MARKDOWN_ROWS = 200
MAX_CHANGES = 50
TERMINAL_WIDTH = 100
# Of a table for the terminal: medians, and characters of a name or heading before it is wrapped.
MAX_METRICS = 3
MAX_GROUP_CHARS = 22
MAX_HEADING_CHARS = 16
STAR = "*"
# How the Markdown begins.
PAGE_BEGINNING = "# `"
CORRECTION = "Holm"


def comparison_title(comparison: RunComparison) -> str:
    """What the tables for the terminal are of."""
    title = f"{' -> '.join(night_names(comparison.old, comparison.new))}. {_heading(comparison)}"
    if len(comparison.rows) > MAX_GROUP_ROWS:
        title += f"; {MAX_GROUP_ROWS} of {len(comparison.rows)} rows, --json has all"
    if equal := equal_medians(comparison):
        title += f"; equal in every row: {', '.join(map(metric_name, equal))}"
    return title


def comparison_tables(comparison: RunComparison) -> list[Table]:
    """The requests, and under them the classes and contexts that differ most: shares of failures, then medians.

    None is wider than `TERMINAL_WIDTH`: metrics go into as many tables as that takes. Medians that are equal in every
    row are left out (`equal_medians`).
    """
    rows, metrics, equal = _chosen(comparison, MAX_GROUP_ROWS), _metrics(comparison), equal_medians(comparison)
    shares = [name for name in metrics if name in SHARES]
    medians = [name for name in metrics if name not in SHARES and name not in equal]
    parts = [shares, *(medians[first : first + MAX_METRICS] for first in range(0, len(medians), MAX_METRICS))]
    return [
        _table(comparison, rows, part, has_counts=number == 0)
        for number, part in enumerate(part for part in parts if part)
    ]


def equal_medians(comparison: RunComparison) -> list[str]:
    """Scores whose median is the same in both runs in every row, as those of an image are after a rescoring."""
    medians = [name for name in _metrics(comparison) if name not in SHARES]
    found = {name: [row.differences[name] for row in comparison.rows if name in row.differences] for name in medians}
    return [name for name, differences in found.items() if all(one.old == one.new for one in differences)]


def _table(
    comparison: RunComparison, rows: list[GroupComparison], metrics: Sequence[str], *, has_counts: bool
) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", max_width=MAX_GROUP_CHARS)
    for name in ("samples", *map(metric_name, metrics), *(("new", "fixed") if has_counts else ())):
        table.add_column(textwrap.fill(name, MAX_HEADING_CHARS, break_long_words=False), justify="right")
    for row in rows:
        cells = [_cell(comparison, row, metric).replace(" (", "\n(") for metric in metrics]
        name = row.request if row.level == "request" else f"  {_group(row)}"
        table.add_row(Text(name), _samples(row), *cells, *(_counts(row) if has_counts else ()))
    return table


def comparison_markdown(comparison: RunComparison, crossings: Sequence[Crossing] = ()) -> str:
    """All of it as Markdown: tables, limits that were crossed, notes, failures that are new."""
    metrics, rows = _metrics(comparison), _chosen(comparison, MAX_MARKDOWN_ROWS)
    nights = night_names(comparison.old, comparison.new)
    heads = ["request", "class or context", "samples", *map(metric_name, metrics), "new", "fixed"]
    crossed = {(crossing.place, crossing.metric) for crossing in crossings}
    lines = [
        f"# {code(nights[1], table=False)} against {code(nights[0], table=False)}",
        "",
        *(_description(night, run) for night, run in zip(nights, (comparison.old, comparison.new), strict=True)),
        "",
        f"{_heading(comparison)}. In bold: a limit is crossed.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for row in rows:
        cells = [_cell(comparison, row, metric).replace(STAR, "\\*") for metric in metrics]
        marked = [
            f"**{cell}**" if (row.place, metric) in crossed else cell
            for metric, cell in zip(metrics, cells, strict=True)
        ]
        group = code(_group(row)) if _group(row) else ""
        lines.append(f"| {' | '.join([code(row.request), group, _samples(row), *marked, *_counts(row)])} |")
    if len(rows) < len(comparison.rows):
        lines += ["", f"{len(comparison.rows) - len(rows)} more rows are left out."]
    lines += _section("Past a limit", [code(crossing.text, table=False) for crossing in crossings])
    for title, texts in failure_lists(comparison):
        shown = [_in_code(words) for words in texts[:MAX_CHANGES]]
        left_out = [f"{len(texts) - MAX_CHANGES} more; `riskforge compare --json` has all"] * (len(texts) > MAX_CHANGES)
        lines += _section(f"{title}: {len(texts)}" if texts else "", shown + left_out)
    lines += _section("Curation", [code(line, table=False) for line in curation_lines(comparison)])
    lines += _section("What people say", [code(line, table=False) for line in human_lines(comparison)])
    lines += _section("Not compared", [code(line, table=False) for line in comparison.notes])
    return "\n".join(lines) + "\n"


def failure_lists(comparison: RunComparison) -> list[tuple[str, list[list[str]]]]:
    """Titles and samples of the new failures, of the fixed ones and of those without a pair; a sample is its key, what
    became of it, its context and its risk.
    """
    return [
        ("New failures", [_change(change, "now") for change in comparison.new_failures]),
        ("Fixed", [_change(change, "no longer") for change in comparison.fixed]),
        ("Failures without a pair", [_unpaired(failure) for failure in comparison.unpaired_failures]),
    ]


def comparison_document(
    comparison: RunComparison, limits: Limits, crossings: Sequence[Crossing], baseline: str = ""
) -> dict[str, Any]:
    """All of it as plain data, which `engine.data.run.comparison.Comparison` reads.

    Args:
        baseline: the file of the older run; empty where it is a run.
    """
    nights = night_names(comparison.old, comparison.new)
    crossed = {(crossing.place, crossing.metric) for crossing in crossings}
    return {
        "old": _identity(comparison.old) | {"night": nights[0]},
        "new": _identity(comparison.new) | {"night": nights[1]},
        "baseline": baseline,
        "confidence": comparison.confidence,
        "correction": CORRECTION,
        "metric_names": {metric: metric_name(metric) for metric in _metrics(comparison)},
        "rows": [_row(comparison, row, crossed) for row in comparison.rows],
        "num_new_failures": len(comparison.new_failures),
        "num_mended": len(comparison.fixed),
        "num_unpaired_failures": len(comparison.unpaired_failures),
        "new_failures": [asdict(change) for change in comparison.new_failures],
        "mended": [asdict(change) for change in comparison.fixed],
        "unpaired_failures": [asdict(failure) for failure in comparison.unpaired_failures],
        "people": people_document(human_shares(comparison.old, comparison.new)),
        "too_few": [asdict(group) for group in comparison.too_few],
        "notes": list(comparison.notes),
        "limits": asdict(limits),
        "crossed": [crossing.text for crossing in crossings],
    }


def summary_document(comparison: RunComparison) -> dict[str, Any]:
    """What fits into a manifest: the rows of the requests, and how many failures are new and fixed."""
    return {
        "confidence": comparison.confidence,
        "correction": CORRECTION,
        "requests": [_row(comparison, row, frozenset()) for row in comparison.rows if row.level == "request"],
        "num_new_failures": len(comparison.new_failures),
        "num_mended": len(comparison.fixed),
    }


def _row(
    comparison: RunComparison, row: GroupComparison, crossed: Collection[tuple[tuple[str, str, str], str]]
) -> dict[str, Any]:
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
                "crossed": (row.place, metric) in crossed,
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
    identity = {"address": run.address, "name": run.name, "target": run.target, "num_samples": run.num_samples}
    identity["is_baseline"] = run.is_baseline
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
        f"In brackets {comparison.confidence:.0%} intervals of the difference; {STAR} differs at {alpha:.2g} over all"
        f" tests ({CORRECTION})"
    )


def _description(night: str, run: ScoredRun) -> str:
    target = f"{code(run.target['address'], table=False)} `{run.target['digest'][:8]}`"
    kind = "baseline of " if run.is_baseline else ""
    address = code(run.address, table=False)
    return f"- {code(night, table=False)}: {kind}{address}, {run.num_samples} scored samples, target {target}"


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


def _change(change: Change, how: str) -> list[str]:
    predicted = change.predicted_class_name if how == "now" else change.old_predicted_class_name
    risk = f"risk {change.old_risk:.3g} -> {change.new_risk:.3g}"
    return [change.key, sentence(change.class_name, predicted, how), change.context, risk]


def _unpaired(failure: UnpairedFailure) -> list[str]:
    risk = f"risk {failure.new_risk:.3g}"
    return [failure.key, sentence(failure.class_name, failure.predicted_class_name, ""), failure.context, risk]


def _in_code(words: list[str]) -> str:
    *texts, risk = words
    return ", ".join([code(text, table=False) for text in texts if text] + [risk])
