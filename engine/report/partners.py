"""Samples compared with their prompt-only partners: the same noise, start, class and context, without guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.job.partners import prompt_partners
from engine.report.data import Rows
from engine.report.headline import Heading, Line, Table
from engine.report.text import clip, percent, signed


def partner_table(rows: Rows, requests: Sequence[dict[str, Any]]) -> Table | None:
    """How often the samples of a request lie above their partner, and by how much; None where none has a partner.

    Args:
        requests: the job's requests as plain data.
    """
    lines = []
    for guided, plain in prompt_partners(requests):
        if guided in rows.request.names and plain in rows.request.names:
            line = _line(rows, guided, plain)
            lines += [line] if line else []
    if not lines:
        return None
    columns = [Heading("Request", "partner"), Heading("Pairs")]
    columns += [Heading(column.title, "above partner; median change") for column in rows.drawn_scores()]
    return Table(columns, lines, 0)


def _line(rows: Rows, guided: str, plain: str) -> Line | None:
    """A seed is of one group, class and index; the context is compared, as requests may have others."""
    first, second = (
        np.flatnonzero(rows.scored & (rows.request.codes == rows.request.names.index(name))) for name in (guided, plain)
    )
    seeds = rows.numbers["seed"]
    _, own, theirs = np.intersect1d(seeds[first], seeds[second], return_indices=True)
    first, second = first[own], second[theirs]
    is_equal = rows.context.codes[first] == rows.context.codes[second]
    first, second = first[is_equal], second[is_equal]
    if not len(first):
        return None
    cells = [(f"{len(first):,}", "")]
    for column in rows.drawn_scores():
        change = rows.numbers[column.name][first] - rows.numbers[column.name][second]
        cells.append((percent(float((change > 0).mean())), signed(float(np.median(change)))))
    return Line(clip(guided, 120), clip(plain, 120), False, cells)
