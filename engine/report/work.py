"""Tables of how the samples were made: by class, acceptance, gradients, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from engine.data.run.summary import GroupSummary
from engine.job.plan import JOINT_CODE
from engine.job.records import STATUS_FAILED, STATUS_REJECTED
from engine.report.data import KnownTexts, Rows, name_of, subset_name
from engine.report.headline import Heading, Line, Table, summary_cells, summary_figures
from engine.report.row_sums import Speeds
from engine.report.text import ABSENT, clip, number, percent

MAX_LINES = 150
MAX_WORKERS = 40


def class_table(
    classes: Mapping[tuple[str, str], GroupSummary], rows: Rows, totals: list[GroupSummary], names: dict[int, str]
) -> Table | None:
    """The summary of every class, request by request, prompt-only ones first; None where no request has several.

    A joint prompt is a class of its own.

    Args:
        classes: by request and the number of the class or `JOINT_CODE`.
        rows: the same rows.
        totals: per request.
        names: of the classes by index.
    """
    codes_of = _class_codes(rows)
    if all(len(some) < 2 for some in codes_of.values()):
        return None
    order = [rows.request.names[code] for code in rows.plain_first()]
    texts = {name: subset_name(rows.subsets[code], names) for code, name in enumerate(rows.request.names)}
    listed = {name: [_named(classes[name, code], texts[name], names) for code in codes_of[name]] for name in order}
    parts = [group for some in listed.values() if len(some) > 1 for group in some]
    worst = sorted(parts, key=lambda group: -(group.error_rate or 0.0))[: max(MAX_LINES - len(order), 0)]
    kept, figures, lines = {id(group) for group in worst}, summary_figures(totals), list[Line]()
    by_request = {total.request: total for total in totals}
    for name in order[:MAX_LINES]:
        shown = [group for group in listed[name] if id(group) in kept]
        only = listed[name][0].context if len(listed[name]) == 1 else ""
        note = ", ".join(filter(None, [by_request[name].method, only]))
        lines.append(Line(clip(name, 120), clip(note, 120), True, summary_cells(by_request[name], figures)))
        lines += [Line(clip(group.context, 120), "", False, summary_cells(group, figures)) for group in shown]
    headings = [Heading("Request", "class"), *(figure.heading for figure in figures)]
    return Table(headings, lines, len(order) + len(parts) - len(lines))


def _class_codes(rows: Rows) -> dict[str, list[str]]:
    """By request the codes of its classes in the order of labels; a joint prompt is one class."""
    codes: dict[str, list[str]] = {}
    for code, request in enumerate(rows.request.names):
        indices = np.unique(rows.numbers["class_index"][rows.request.codes == code]).tolist()
        codes[request] = [JOINT_CODE] if rows.subsets[code] else [str(index) for index in indices]
    return codes


def _named(group: GroupSummary, joint: str, names: dict[int, str]) -> GroupSummary:
    """A class with its name in place of its code."""
    name = joint if group.context == JOINT_CODE else name_of(int(group.context), names)
    return replace(group, context=name)


def acceptance_table(rows: Rows, quotas: dict[str, list[dict[str, Any]]]) -> Table | None:
    """The outcome of the attempts, by request, and by class where a request has a quota; None without any rule.

    Args:
        quotas: of the manifest: by request and class what was wanted and is missing.
    """
    rejected = rows.status.is_one_of(np.arange(len(rows)), STATUS_REJECTED)
    if not quotas and not rejected.any():
        return None
    lines = []
    for code, name in enumerate(rows.request.names):
        here = rows.request.codes == code
        # In the order of labels, as their codes are.
        classes = sorted(quotas.get(name, []), key=lambda quota: str(quota["code"]))
        wanted, missing = (sum(int(quota[field]) for quota in classes) for field in ("wanted", "missing"))
        lines.append(Line(clip(name, 120), "", True, _acceptance(rows, here, wanted, missing, bool(classes))))
        for quota in classes:
            own = here & _is_class(rows, str(quota["code"]))
            cells = _acceptance(rows, own, int(quota["wanted"]), int(quota["missing"]), True)
            lines.append(Line(clip(str(quota["class"]), 120), "", False, cells))
    names = ("Attempted", "Accepted", "Rejected", "Failed", "Surplus", "Wanted", "Missing")
    return Table([Heading("Request", "class"), *map(Heading, names)], lines[:MAX_LINES], max(0, len(lines) - MAX_LINES))


def _is_class(rows: Rows, code: str) -> np.ndarray:
    """Which rows have a class code in their key; all where it is that of a joint prompt."""
    return rows.numbers["class_index"] == int(code) if code.isdigit() else np.ones(len(rows), dtype=bool)


def _acceptance(rows: Rows, here: np.ndarray, wanted: int, missing: int, has_quota: bool) -> list[tuple[str, str]]:
    every = np.arange(len(rows))
    status = {name: rows.count(here & rows.status.is_one_of(every, name)) for name in (STATUS_REJECTED, STATUS_FAILED)}
    accepted, surplus = (rows.count(here & rows.numbers[name].astype(bool)) for name in ("accepted", "surplus"))
    total = rows.count(here)
    cells = [
        (f"{total:,}", ""),
        (f"{accepted:,}", percent(accepted / total) if total else ABSENT),
        (f"{status[STATUS_REJECTED]:,}", ""),
        (f"{status[STATUS_FAILED]:,}", ""),
        (f"{surplus:,}", ""),
    ]
    return cells + ([(f"{wanted:,}", ""), (f"{missing:,}", "")] if has_quota else [("", ""), ("", "")])


def gradient_table(rows: Rows) -> Table | None:
    """Guided steps and what was wrong with their gradients, by request; None where nothing was guided."""
    lines = []
    for code, name in enumerate(rows.request.names):
        here = rows.scored & (rows.request.codes == code)
        if rows.numbers["guided_steps"][here].sum():
            lines.append(Line(clip(name, 120), "", False, _gradients(rows, here)))
    headings = [
        Heading("Request"),
        Heading("Samples"),
        Heading("Guided steps", "mean, range"),
        Heading("Zero gradients", "of the guided steps"),
        Heading("Not finite", "dropped"),
    ]
    return Table(headings, lines[:MAX_LINES], max(0, len(lines) - MAX_LINES)) if lines else None


def _gradients(rows: Rows, here: np.ndarray) -> list[tuple[str, str]]:
    steps, zero, bad = (
        rows.numbers[field][here] for field in ("guided_steps", "zero_gradients", "nonfinite_gradients")
    )
    weights = rows.weights[here]
    total = int((weights * steps).sum())
    return [
        (f"{int(weights.sum()):,}", ""),
        (number(total / int(weights.sum())), f"{steps.min()} to {steps.max()}"),
        (percent(int((weights * zero).sum()) / total), f"{int(weights[zero == steps].sum()):,} samples at every step"),
        (percent(int((weights * bad).sum()) / total), f"{int(weights[bad > 0].sum()):,} samples"),
    ]


def throughput_table(speeds: Speeds, texts: KnownTexts) -> Table | None:
    """Time of sampling by request, and by worker where there are several; None where it was not measured."""
    if not speeds.is_measured:
        return None
    lines = []
    for code, name in enumerate(texts.names["request"]):
        lines.append(Line(clip(name, 120), "", False, _speed(speeds, "request", code)))
    workers = texts.names["worker"]
    if len(workers) > 1:
        lines.append(Line("all workers", "", True, _speed(speeds, "all", 0)))
        for place, name in enumerate(workers[:MAX_WORKERS]):
            lines.append(Line(clip(f"worker {name}", 120), "", False, _speed(speeds, "worker", place)))
    columns = [Heading("Request", "worker"), Heading("Attempts"), Heading("Batch size", "median"),
               Heading("Sampling", "seconds together"), Heading("Per sample", "median, seconds"),
               Heading("Samples a second", "of one worker")]  # fmt: skip
    return Table(columns, lines, max(0, len(workers) - MAX_WORKERS))


def _speed(speeds: Speeds, level: str, code: int) -> list[tuple[str, str]]:
    attempts, measured, seconds = speeds.sums[level, code].tolist()
    if not measured:
        return [(f"{int(attempts):,}", ""), *[(ABSENT, "")] * 4]
    return [
        (f"{int(attempts):,}", ""),
        (f"{speeds.median_size(level, code):,.0f}", ""),
        (f"{seconds:,.1f}", ""),
        (number(speeds.median_seconds(level, code)), ""),
        (f"{measured / seconds:,.2f}", ""),
    ]
