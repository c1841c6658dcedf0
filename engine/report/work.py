"""Tables of how the samples were made: by class, acceptance, gradients, and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.run.summary import GroupSummary, summarise_table
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED
from engine.report.data import Rows, name_of, subset_name
from engine.report.headline import Heading, Line, Table, summary_cells, summary_figures
from engine.report.text import ABSENT, clip, number, percent

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LINES = 150
MAX_WORKERS = 40


def class_table(table: pa.Table, rows: Rows, totals: list[GroupSummary], names: dict[int, str]) -> Table | None:
    """The summary of every class, request by request, prompt-only ones first; None where no request has several.

    A joint prompt is a class of its own.

    Args:
        table: of the metadata.
        rows: the same rows.
        totals: per request (`request_totals`).
        names: of the classes by index.
    """
    import pyarrow as pa

    names_of, texts = _class_texts(rows, names)
    if all(len(some) < 2 for some in names_of.values()):
        return None
    table = _with(_with(table, "context", texts), "method", pa.array([""] * len(rows), pa.string()))
    groups = {(group.request, group.context): group for group in summarise_table(table)}
    order = [rows.request.names[code] for code in rows.plain_first()]
    listed = {name: [groups[name, text] for text in names_of[name]] for name in order}
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


def _class_texts(rows: Rows, names: dict[int, str]) -> tuple[dict[str, list[str]], pa.Array]:
    """By request the names of its classes in the order of labels, and for each row that of its own.

    The record of a joint sample names the class that it came closest to: its class is all of the subset.
    """
    import pyarrow as pa

    names_of, texts = {}, np.empty(len(rows), dtype=object)
    for code, request in enumerate(rows.request.names):
        here = rows.request.codes == code
        if subset := rows.subsets[code]:
            names_of[request] = [subset_name(subset, names)]
            texts[here] = names_of[request][0]
        else:
            indices, places = np.unique(rows.numbers["class_index"][here], return_inverse=True)
            names_of[request] = [name_of(index, names) for index in indices.tolist()]
            texts[here] = np.array(names_of[request], dtype=object)[places]
    return names_of, pa.array(texts, pa.string())


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


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
    status = {
        name: int(rows.status.is_one_of(np.flatnonzero(here), name).sum())
        for name in (STATUS_OK, STATUS_REJECTED, STATUS_FAILED)
    }
    total, accepted = int(here.sum()), int(rows.numbers["accepted"][here].sum())
    surplus = int(rows.numbers["surplus"][here].sum())
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
    return [
        (f"{len(steps):,}", ""),
        (number(float(steps.mean())), f"{steps.min()} to {steps.max()}"),
        (percent(float(zero.sum() / steps.sum())), f"{int((zero == steps).sum()):,} samples at every step"),
        (percent(float(bad.sum() / steps.sum())), f"{int((bad > 0).sum()):,} samples"),
    ]


def throughput_table(rows: Rows) -> Table | None:
    """Time of sampling by request, and by worker where there are several; None where it was not measured."""
    seconds = rows.numbers["duration_seconds"]
    if not seconds.sum():
        return None
    lines = []
    for code, name in enumerate(rows.request.names):
        lines.append(Line(clip(name, 120), "", False, _speed(rows, rows.request.codes == code)))
    workers = rows.worker.names
    if len(workers) > 1:
        lines.append(Line("all workers", "", True, _speed(rows, np.ones(len(rows), dtype=bool))))
        for place, name in enumerate(workers[:MAX_WORKERS]):
            lines.append(Line(clip(f"worker {name}", 120), "", False, _speed(rows, rows.worker.codes == place)))
    columns = [Heading("Request", "worker"), Heading("Attempts"), Heading("Batch size", "median"),
               Heading("Sampling", "seconds together"), Heading("Per sample", "median, seconds"),
               Heading("Samples a second", "of one worker")]  # fmt: skip
    return Table(columns, lines, max(0, len(workers) - MAX_WORKERS))


def _speed(rows: Rows, here: np.ndarray) -> list[tuple[str, str]]:
    seconds = rows.numbers["duration_seconds"][here]
    measured = seconds[seconds > 0]
    if not len(measured):
        return [(f"{int(here.sum()):,}", ""), *[(ABSENT, "")] * 4]
    return [
        (f"{len(seconds):,}", ""),
        (f"{np.median(rows.numbers['batch_size'][here]):,.0f}", ""),
        (f"{measured.sum():,.1f}", ""),
        (number(float(np.median(measured))), ""),
        (f"{len(measured) / measured.sum():,.2f}", ""),
    ]
