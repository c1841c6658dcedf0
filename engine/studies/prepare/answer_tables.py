"""Tables of people's answers: CSV, JSON lines or parquet, with a column `key` that names the image.

Either `answer` holds a class name, a row for each answer (empty: none of these), or each class has a column with the
number of people who said it, and `none`, where there is one, the number of those who said none of these. Whatever is
wrong in a table is refused with its row and column; rows are counted from 1, without the header.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.images.decode import UnusableImageError
from engine.data.images.labelling import Labelling
from engine.errors import JobError, first_line
from engine.job.spec_messages import nearest
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole

OPTION = "--answers"
KEY, ANSWER, NONE = "key", "answer", "none"
MAX_ROWS = 10**6
# People who said a class of an image; more is a mistake.
MAX_COUNT = 10**6
MAX_PROBLEMS = 5
_FORMS = "a table in .csv, .jsonl or .parquet with the columns key and answer, or key and one for each class"
_SHOWN = 60

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AnswerTable:
    """The answers of a table by image.

    Attributes:
        rows: of each key the number of its first row.
        counts: of each key the answers by class index, [n + 1]; the last entry is "none of these".
        left_out: columns that are not read.
    """

    rows: dict[str, int]
    counts: dict[str, np.ndarray]
    left_out: tuple[str, ...]


def read_answer_table(path: Path, labels: Sequence[str]) -> AnswerTable:
    """The answers in a table.

    Args:
        labels: class names of the target in index order.

    Raises:
        JobError: the file cannot be read as such a table; the first problems, a line each, with row and column.
    """
    columns, rows = _read(path)
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise JobError(f"{OPTION}: {path}: has the column {repeated[0]!r} twice; rename or remove one")
    if KEY not in columns:
        raise JobError(f"{OPTION}: {path}: has no column {KEY!r}{nearest(KEY, columns)}; give {_FORMS}")
    if not rows:
        raise JobError(f"{OPTION}: {path}: has no row; give {_FORMS}")
    return _of_answers(path, columns, rows, labels) if ANSWER in columns else _of_counts(path, columns, rows, labels)


def _of_answers(path: Path, columns: list[str], rows: list[Row], labels: Sequence[str]) -> AnswerTable:
    """The table of one answer a row."""
    problems, labelling = _Problems(path), Labelling(tuple(labels))
    if counted := [name for name in columns if name in labels]:
        raise JobError(
            f"{OPTION}: {path}: has the column {ANSWER!r} and {counted[0]!r}, a class; give single answers or counts"
        )
    first, counts = dict[str, int](), dict[str, np.ndarray]()
    classes: dict[str, int] = {"": len(labels)}
    for number, row in enumerate(rows, 1):
        key = problems.key(row, number)
        if ANSWER not in row:
            problems.add(number, ANSWER, 'is missing; give a class name, or "" for none of these')
            continue
        text = "" if row[ANSWER] is None else row[ANSWER]
        if not isinstance(text, str):
            problems.add(number, ANSWER, f"{shown(text)} is no class name; give names, as indices can be mistaken")
            continue
        if text not in classes:
            try:
                classes[text] = labelling.of_name(text)
            except UnusableImageError as error:
                problems.add(number, ANSWER, f"{error}; leave it empty for none of these")
                continue
        if key is not None:
            first.setdefault(key, number)
            counts.setdefault(key, np.zeros(len(labels) + 1, dtype=np.int64))[classes[text]] += 1
    problems.check()
    return AnswerTable(rows=first, counts=counts, left_out=tuple(set(columns) - {KEY, ANSWER}))


def _of_counts(path: Path, columns: list[str], rows: list[Row], labels: Sequence[str]) -> AnswerTable:
    """The table of the number of answers by class."""
    problems, wanted = _Problems(path), [*labels, NONE] if NONE not in labels else [*labels]
    if unknown := [name for name in columns if name not in {KEY, *wanted}]:
        raise JobError(
            f"{OPTION}: {path}: column {shown(unknown[0])}: is no class of the target{nearest(unknown[0], wanted)};"
            " rename it, or remove it"
        )
    if missing := [label for label in labels if label not in columns]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise JobError(f"{OPTION}: {path}: has no column for the class {missing[0]!r}{more}; give {_FORMS}")
    first, counts = dict[str, int](), dict[str, np.ndarray]()
    for number, row in enumerate(rows, 1):
        key = problems.key(row, number)
        values = [problems.count(row, number, name) if name in columns else 0 for name in wanted]
        if key is None:
            continue
        if key in first:
            problems.add(number, KEY, f"{shown(key)} is that of row {first[key]} too; give one row an image")
        first.setdefault(key, number)
        counts[key] = np.zeros(len(labels) + 1, dtype=np.int64)
        counts[key][: len(values)] = values
    problems.check()
    return AnswerTable(rows=first, counts=counts, left_out=())


class _Problems:
    """Problems of single values, of which the first are reported."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []
        self._count = 0

    def add(self, number: int, column: str, text: str) -> None:
        """Note a problem of a value; `check` raises it."""
        self._count += 1
        if len(self._lines) < MAX_PROBLEMS:
            self._lines.append(f"{OPTION}: {self._path}: row {number}, column {column!r}: {text}")

    def key(self, row: Row, number: int) -> str | None:
        """The key of a row; None with a problem."""
        key = row.get(KEY)
        if isinstance(key, str) and key:
            return key
        self.add(number, KEY, "is empty; give the name of an image" if not key else f"{shown(key)} is no text")
        return None

    def count(self, row: Row, number: int, column: str) -> int:
        """A number of people; 0 with a problem."""
        value = row.get(column)
        if isinstance(value, str):
            value = int(value) if value.strip().isascii() and value.strip().isdigit() else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT:
            return value
        text = "is empty" if value is None or value == "" else f"{shown(value)} is no number of people"
        self.add(number, column, f"{text}; give a whole number from 0 to {MAX_COUNT:,}")
        return 0

    def check(self) -> None:
        """Raise what was noted.

        Raises:
            JobError: there is something.
        """
        if self._count > len(self._lines):
            self._lines.append(f"{OPTION}: {self._path}: has {self._count - len(self._lines)} more problems like these")
        if self._lines:
            raise JobError(self._lines)


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a file, by its extension.

    Raises:
        JobError: it cannot be read, or has too many rows.
    """
    readers = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise JobError(f"{OPTION}: '{path}' is no file of answers by its name; give a run, or {_FORMS}")
    try:
        return reader(read_whole(path, MAX_DOCUMENT_BYTES))
    except FileNotFoundError:
        raise JobError(f"{OPTION}: there is no '{path}'; give a run, or {_FORMS}") from None
    except OSError as error:
        raise JobError(f"{OPTION}: '{path}' {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise JobError(f"{OPTION}: {path}: is not UTF-8 (byte {error.start}); save it in that encoding") from None
    except ValueError as error:
        raise JobError(f"{OPTION}: {path}: {first_line(error)}") from None


def _csv(data: bytes) -> tuple[list[str], list[Row]]:
    lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    try:
        columns = next(lines, [])
        if len(columns) == 1 and ";" in columns[0]:
            raise ValueError("its values are separated by semicolons; separate them by commas")
        rows: list[Row] = []
        for values in lines:
            if not values:
                continue
            if len(values) != len(columns):
                raise ValueError(
                    f"row {len(rows) + 1}: has {len(values)} values and the header {len(columns)}; quote values with"
                    " commas"
                )
            rows.append(dict(zip(columns, values, strict=True)))
            _check_number(len(rows))
    except csv.Error as error:
        remedy = (
            "a value is that long where its closing quote is missing" if "limit" in str(error) else "check its quotes"
        )
        raise ValueError(f"line {lines.line_num}: cannot be read as CSV ({error}); {remedy}") from None
    return columns, rows


def _json_lines(data: bytes) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: is not JSON ({first_line(error)}); give an object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: is {shown(row)}; give an object a line")
        columns |= dict.fromkeys(row)
        rows.append(row)
        _check_number(len(rows))
    return list(columns), rows


def _parquet(data: bytes) -> tuple[list[str], list[Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            _check_number(file.metadata.num_rows)
            columns = file.schema_arrow.names
            if len(set(columns)) < len(columns):
                return columns, []
            return columns, file.read().to_pylist()
    except (pa.ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"cannot be read as parquet ({first_line(error)})") from None


def _check_number(num_rows: int) -> None:
    if num_rows > MAX_ROWS:
        raise ValueError(f"has more than the {MAX_ROWS:,} rows that are read; give counts by class, a row an image")


def has_columns(path: Path, names: Sequence[str]) -> bool:
    """Whether a parquet file has some columns; false of what cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return path.suffix.lower() == ".parquet" and set(names) <= set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False


def shown(value: Any) -> str:
    """A value of a table, cut where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
