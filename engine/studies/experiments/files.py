"""The files that a study ends in: tables as CSV and parquet, figures, a page, and a paragraph in Markdown."""

from __future__ import annotations

import io
from typing import Any

from engine.data.run.file_names import REPORT, STUDY
from engine.data.run.study_document import (
    Cell,
    Interval,
    StudyDocument,
    StudyTable,
    document_bytes,
)
from engine.data.stores.base import Store
from engine.driver.progress import duration

MAIN_TABLE = "table"
MARKDOWN = "results.md"
MAX_MARKDOWN_ROWS = 60


def write_files(store: Store, document: StudyDocument) -> None:
    """Write everything that is drawn from a document, and the document last.

    Raises:
        OutputError: the store refuses.
    """
    from engine.report.study import study_page

    for table in document.tables:
        for name, data in table_files(table).items():
            store.replace(name, data)
    for figure in document.figures:
        store.replace(f"{figure.name}.svg", figure.svg.encode())
    store.replace(MARKDOWN, markdown(document).encode())
    store.replace(REPORT, study_page(document))
    store.replace(STUDY, document_bytes(document.model_dump(mode="json")))


def file_names(document: StudyDocument) -> list[str]:
    """Names of the files of a complete study."""
    tables = [f"{table.name}.{extension}" for table in document.tables for extension in ("csv", "parquet")]
    return [*tables, *(f"{figure.name}.svg" for figure in document.figures), MARKDOWN, REPORT, STUDY]


def table_files(table: StudyTable) -> dict[str, bytes]:
    """A table as CSV and as parquet, by file name; an interval is three columns: `x`, `x_low` and `x_high`."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {}
    for place, column in enumerate(table.columns):
        cells = [row[place] for row in table.rows]
        if not any(isinstance(cell, Interval) for cell in cells):
            columns[column.name] = _plain(cells)
            continue
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
            columns[f"{column.name}{suffix}"] = [_part(cell, part) for cell in cells]
    arrow = pa.table(columns)
    text, binary = io.BytesIO(), io.BytesIO()
    pyarrow.csv.write_csv(arrow, text)
    pyarrow.parquet.write_table(arrow, binary)
    return {f"{table.name}.csv": text.getvalue(), f"{table.name}.parquet": binary.getvalue()}


def _plain(cells: list[Cell]) -> list[Any]:
    """Cells of one type: numbers where all are, text where any is."""
    if any(isinstance(cell, str) for cell in cells):
        return [None if cell is None else str(cell) for cell in cells]
    if any(isinstance(cell, float) for cell in cells):
        return [None if cell is None else float(cell) for cell in cells]  # type: ignore[arg-type]
    return list(cells)


def _part(cell: Cell, part: str) -> float | None:
    if isinstance(cell, Interval):
        return float(getattr(cell, part))
    return float(cell) if isinstance(cell, int | float) and part == "value" else None


def markdown(document: StudyDocument) -> str:
    """The paragraph of a study, as `docs/results.md` has them: command, date, hardware, tables, figures, findings."""
    parts = [f"## {document.name}: {document.study}", f"```bash\n{document.command}\n```"]
    parts.append(f"{document.date}, {document.hardware}, {duration(document.seconds)}.")
    parts += map(_markdown_table, document.tables)
    captions = [(figure.name, _escaped(figure.caption)) for figure in document.figures]
    parts += [f"![{caption}]({name}.svg)\n\n*{caption}*" for name, caption in captions]
    parts += [_list(document.findings)] if document.findings else []
    parts += ["What limits this:", _list(document.notes)] if document.notes else []
    return "\n\n".join(parts) + "\n"


def _list(sentences: tuple[str, ...]) -> str:
    return "\n".join(f"- {_escaped(sentence)}" for sentence in sentences)


def _markdown_table(table: StudyTable) -> str:
    headings = [_escaped(column.heading) for column in table.columns]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(map(_escaped, table.texts(row)))} |" for row in table.rows[:MAX_MARKDOWN_ROWS]]
    left_out = len(table.rows) - MAX_MARKDOWN_ROWS
    more = f"\n\n{left_out} more rows are in `{table.name}.csv`." if left_out > 0 else ""
    note = f" {_escaped(table.note)}" if table.note else ""
    return f"{_escaped(table.title)}.{note}\n\n" + "\n".join(lines) + more


def _escaped(text: str) -> str:
    """Text that does not end a cell, open a tag, or begin a line."""
    flat = " ".join(text.split())
    for sign in "\\|<>*_`[]":
        flat = flat.replace(sign, f"\\{sign}")
    return flat
