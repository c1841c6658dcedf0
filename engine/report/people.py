"""The section of a reviewed run: what people say of its labels, and what oracles and rules are worth against them."""

from __future__ import annotations

from typing import Any

from engine.data.reading.people.results import PeopleResults
from engine.data.reading.people.tables import PeopleTable, people_facts, people_tables
from engine.report.headline import Heading, Line, Table
from engine.report.text import clip

MAX_FACT_CHARS = 600
MAX_NAME_CHARS = 200


def people_context(results: PeopleResults | None) -> dict[str, Any] | None:
    """What the template shows of people's answers; None where there are none."""
    if results is None:
        return None
    return {
        "facts": [(name, clip(text, MAX_FACT_CHARS)) for name, text in people_facts(results)],
        "tables": [
            {"title": table.title, "note": table.note, "table": _table(table)} for table in people_tables(results)
        ],
        "notes": [clip(note, MAX_FACT_CHARS) for note in results.notes],
    }


def _table(table: PeopleTable) -> Table:
    headings = [Heading(name, note) for name, note in table.headings]
    lines = [
        Line(clip(name, MAX_NAME_CHARS), "", is_total, [(_spaced(value), _spaced(note)) for value, note in cells])
        for name, is_total, cells in table.lines
    ]
    return Table(headings, lines, table.num_left_out)


def _spaced(text: str) -> str:
    """A figure as this page writes shares."""
    return text.replace("%", " %")
