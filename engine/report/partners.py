"""Samples beside their prompt-only partners: the same noise, class and context, without guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.methods.registry import find_method
from engine.report.data import Rows
from engine.report.headline import Column, Line, Table
from engine.report.text import clip, percent, signed

_SCORES = {"risk": "Risk", "kldb": "KLDB", "conformity": "Conformity", "entropy": "Entropy"}


def partner_table(rows: Rows, requests: Sequence[dict[str, Any]]) -> Table | None:
    """How often the samples of a request lie above their partner, and by how much; None where none has a partner.

    Args:
        requests: the job's requests as plain data.
    """
    lines = []
    for guided, plain in _partners(requests):
        if guided in rows.request.names and plain in rows.request.names:
            line = _line(rows, guided, plain)
            lines += [line] if line else []
    if not lines:
        return None
    columns = [Column("Request", "partner"), Column("Pairs")]
    columns += [Column(title, "above partner; median change") for title in _SCORES.values()]
    return Table(columns, lines, 0)


def _partners(requests: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each request that is not plain itself, with the first plain one of its seed group."""
    plain: dict[str, str] = {}
    for one in requests:
        if _is_plain(one):
            plain.setdefault(_group(one), one["name"])
    return [(one["name"], plain[_group(one)]) for one in requests if not _is_plain(one) and _group(one) in plain]


def _group(request: dict[str, Any]) -> str:
    return str(request.get("seed_group") or request["name"])


def _is_plain(request: dict[str, Any]) -> bool:
    method = find_method(request.get("method"))
    return method is not None and not method.is_guided and not request.get("conditioning")


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
    for score in _SCORES:
        change = rows.numbers[score][first] - rows.numbers[score][second]
        cells.append((percent(float((change > 0).mean())), signed(float(np.median(change)))))
    return Line(clip(guided, 120), clip(plain, 120), False, cells)
