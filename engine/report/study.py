"""A study as pages show it: its own page, and a section in the report of each of its runs."""

from __future__ import annotations

import base64
from typing import Any

from engine.data.run.study_document import Interval, StudyDocument, StudyTable
from engine.report.style import page_style, page_templates
from engine.report.text import clip

MAX_ROWS = 300
MAX_SENTENCES = 60


def study_page(document: StudyDocument) -> bytes:
    """The page of a study: it loads nothing from anywhere and runs no script."""
    template = page_templates().get_template("study_page.html.j2")
    return template.render(study=study_context(document), style=page_style()).encode()


def study_context(document: StudyDocument) -> dict[str, Any]:
    """What the template needs of a study."""
    return {
        "document": document,
        "findings": document.findings[:MAX_SENTENCES],
        "notes": [clip(note, 4000) for note in document.notes[:MAX_SENTENCES]],
        "tables": [_table(table) for table in document.tables],
        "figures": [
            {"name": figure.name, "caption": figure.caption, "uri": _svg_uri(figure.svg)} for figure in document.figures
        ],
    }


def _table(table: StudyTable) -> dict[str, Any]:
    is_text = [any(isinstance(row[place], str) for row in table.rows) for place in range(len(table.columns))]
    rows = [
        [
            {"text": text, "note": note, "is_text": is_words}
            for (text, note), is_words in zip(map(_split, table.texts(row), row), is_text, strict=True)
        ]
        for row in table.rows[:MAX_ROWS]
    ]
    heads = [
        {"title": column.heading, "note": column.note, "is_text": is_words}
        for column, is_words in zip(table.columns, is_text, strict=True)
    ]
    return {"table": table, "heads": heads, "rows": rows, "left_out": len(table.rows) - len(rows)}


def _split(text: str, cell: object) -> tuple[str, str]:
    """A value, and its interval below it."""
    if not isinstance(cell, Interval):
        return text, ""
    value, _, rest = text.partition(" (")
    return value, rest.removesuffix(")")


def _svg_uri(svg: str) -> str:
    """As an image, in which no script of an SVG runs."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
