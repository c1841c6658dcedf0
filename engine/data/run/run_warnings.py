"""Warnings at the end of a run: requests that made samples, none of which are what was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.data.run.notices import one_line

# Of a line; the manifest has the counts of all classes.
_MAX_NAMED = 5
# Of a manifest that others may have written.
_MAX_WARNINGS = 1000


def run_warnings(counts: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    """What a run warns of, a line each: draws that never passed a screening, and rules that accepted nothing.

    Args:
        counts: `counts` of its manifest.
        names: of the classes, by index.
    """
    lines = []
    for request, rows in counts.get("screening", {}).items():
        tried = [row for row in rows if row["samples"]]
        if never := [row for row in tried if not row["screened"]]:
            of_all = len(never) == len(tried)
            classes = [names.get(row["class_index"], str(row["class_index"])) for row in never]
            lines.append(_unscreened(request, never, "" if of_all else f" of {_listed(classes)}"))
    quotas = counts.get("quotas", {})
    for request, made in counts.get("requests", {}).items():
        if made["rejected"] and not made["accepted"]:
            lines.append(f"{request}: its rule accepted none of {made['attempted']} samples; {_RULE_REMEDY}")
        elif empty := [row for row in quotas.get(request, ()) if row["attempted"] and not row["accepted"]]:
            num_made = sum(row["attempted"] for row in empty)
            of_classes = _listed([row["class"] for row in empty])
            lines.append(f"{request}: its rule accepted none of {num_made} samples of {of_classes}; {_RULE_REMEDY}")
    return [one_line(line) for line in lines]


_RULE_REMEDY = "ask for less in accept, or leave them out"


def _unscreened(request: str, rows: list[dict[str, Any]], of_classes: str) -> str:
    samples, draws = (sum(row[name] for row in rows) for name in ("samples", "draws"))
    return (
        f"{request}: none of {draws} draws for {samples} samples{of_classes} passed the screening, so that they are not"
        " screened; lower conditioning.threshold, raise max_draws, or use method: risky without conditioning"
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def known_warnings(manifest: Mapping[str, Any]) -> list[str]:
    """The warnings of a manifest; none where an earlier version wrote it, or where they are of another kind."""
    lines = manifest.get("warnings")
    return [*map(one_line, _texts(lines[:_MAX_WARNINGS]))] if isinstance(lines, list) else []


def _texts(values: Iterable[Any]) -> Iterable[str]:
    return (value for value in values if isinstance(value, str))
