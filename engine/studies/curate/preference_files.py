"""Files of preference records: JSON lines, CSV or parquet with the columns first, second, choice, rater, time, group.

`choice` is 0 where the first sample is preferred and 1 where the second is. The last three columns may be left out:
`rater` is who chose, `time` when, in seconds since 1970, `group` the group of the rater.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import MAX_REASON_CHARS, JobError, first_line
from engine.job.spec_messages import nearest
from engine.methods.curation.preferences import Preference
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import read_whole

REQUIRED = ("first", "second", "choice")
OPTIONAL = ("rater", "time", "group")
FIELDS = (*REQUIRED, *OPTIONAL)
MAX_FILE_BYTES = 256 * 2**20
MAX_RECORDS = 10**6
MAX_TEXT_CHARS = 200
MAX_SHOWN = 5
_FORMATS = ".jsonl, .csv or .parquet"
_EXAMPLE = '{"first": "KEY", "second": "KEY", "choice": 0, "rater": "ann", "time": 1764430000}'


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRecord:
    """A preference as a file has it.

    Attributes:
        preference: the choice.
        group: of the rater; empty where the file names none.
        line: number of the line or row, from 1.
    """

    preference: Preference
    group: str
    line: int

    @property
    def pair(self) -> frozenset[str]:
        """The two samples in no order."""
        return frozenset((self.preference.first, self.preference.second))

    @property
    def preferred(self) -> str:
        """The sample that was chosen."""
        return (self.preference.first, self.preference.second)[self.preference.choice]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceFile:
    """The records of a file that count.

    Attributes:
        path: of the file, as given.
        digest: of its bytes.
        records: in the order of the file.
        num_lines: records that the file has.
        num_repeated: records that a later one of the same rater and pair replaces, or that are equal to it.
    """

    path: str
    digest: str
    records: tuple[PreferenceRecord, ...]
    num_lines: int
    num_repeated: int


def read_preferences(path: str, option: str) -> PreferenceFile:
    """Read a file of preference records.

    A rater's last choice about a pair counts: whoever chooses again corrects a choice, and cannot add weight to it.
    Records without a rater count each, unless they are equal.

    Args:
        option: of the command line, for messages.

    Raises:
        JobError: it cannot be read, or a line is no record; with file, line, field, value and remedy.
    """
    try:
        data = read_whole(Path(path).expanduser(), MAX_FILE_BYTES)
    except OSError as error:
        raise JobError(f"{option}: '{path}' {_file_problem(error)}") from None
    problems: list[str] = []
    records = list(_checked(_rows(data, path, option), f"{option}: {path}", problems))
    if problems:
        more = [f"{option}: {path}: and {len(problems) - MAX_SHOWN} more lines"] if len(problems) > MAX_SHOWN else []
        raise JobError([*problems[:MAX_SHOWN], *more])
    if not records:
        raise JobError(f"{option}: {path}: has no record; a line is {_EXAMPLE}")
    kept = _last_choices(records)
    return PreferenceFile(
        path=path,
        digest=hashlib.sha256(data).hexdigest()[:32],
        records=kept,
        num_lines=len(records),
        num_repeated=len(records) - len(kept),
    )


def _file_problem(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist; give a file of preference records"
    return f"cannot be read ({error.strerror or error}); give a file of preference records"


def _rows(data: bytes, path: str, option: str) -> Iterator[tuple[int, Any]]:
    """Number and content of every row; a `ValueError` in place of one that cannot be parsed.

    Raises:
        JobError: the file as a whole cannot be read.
    """
    readers = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise JobError(f"{option}: '{path}' is of no known format; give a file that ends in {_FORMATS}")
    try:
        for number, row in enumerate(readers[suffix](data)):
            if number == MAX_RECORDS:
                raise ValueError(f"it has more than {MAX_RECORDS:,} records")
            yield row
    except (ValueError, csv.Error) as error:
        reason = first_line(error)[:MAX_REASON_CHARS]
        raise JobError(f"{option}: '{path}' cannot be read as {suffix[1:]} ({reason}); correct the file") from None


def _json_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, max_depth=2)
        except ValueError as error:
            yield number, error


def _csv_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    _check_columns(reader.fieldnames or ())
    for row in reader:
        # Cells beyond the header have the name None, missing cells the value None.
        named = {name or "a cell without a column": cell for name, cell in row.items() if cell is not None}
        values = {name: _number(cell) if name in ("choice", "time") else cell for name, cell in named.items()}
        yield reader.line_num, {name: value for name, value in values.items() if value != ""}


def _check_columns(names: Sequence[str]) -> None:
    """Check the columns of a table: each is known, and there once.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        _check_field(name)
        if list(names).count(name) > 1:
            raise ValueError(f"it has the column '{name}' twice")


def _check_field(name: str) -> None:
    if name not in FIELDS:
        raise ValueError(
            f"'{_clipped(name)}' is no field of a record{nearest(name, list(FIELDS))}; it has {', '.join(FIELDS)}"
        )


def _number(text: Any) -> Any:
    """The number that a cell holds, or its text."""
    for parse in (int, float):
        try:
            return parse(text)
        except (ValueError, TypeError):
            continue
    return text


def _parquet_rows(data: bytes) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            _check_columns(file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, OverflowError) as error:
        raise ValueError(first_line(error)) from None


def _checked(rows: Iterable[tuple[int, Any]], where: str, problems: list[str]) -> Iterator[PreferenceRecord]:
    """The records of rows; what is wrong with others is added to `problems`."""
    for line, row in rows:
        try:
            yield _record(line, row)
        except ValueError as error:
            problems.append(f"{where}, line {line}: {error}")


def _record(line: int, row: Any) -> PreferenceRecord:
    """A row as a record.

    Raises:
        ValueError: with field, value and remedy.
    """
    if isinstance(row, ValueError):
        raise ValueError(f"is not JSON ({first_line(row)[:MAX_REASON_CHARS]}); a line is {_EXAMPLE}")
    if not isinstance(row, dict):
        raise ValueError(f"{_shown(row)} is not an object; a line is {_EXAMPLE}")
    for name in row:
        _check_field(name)
    # An empty cell, as tables have it, and as others write them to JSON.
    row = {name: value for name, value in row.items() if value is not None}
    for name in REQUIRED:
        if name not in row:
            raise ValueError(f"{name} is missing; a line is {_EXAMPLE}")
    texts = {name: _text(name, row.get(name, "")) for name in ("first", "second", "rater", "group")}
    for name in ("first", "second"):
        if not texts[name]:
            raise ValueError(f"{name}: is empty; give the key of a sample")
    choice = row["choice"]
    if isinstance(choice, bool) or choice not in (0, 1):
        raise ValueError(f"choice: {_shown(choice)} is neither 0 (the first is preferred) nor 1 (the second is)")
    time = row.get("time", 0)
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
        raise ValueError(f"time: {_shown(time)} is no number; give seconds since 1970, or leave it out")
    if texts["first"] == texts["second"]:
        raise ValueError(f"second: '{texts['second']}' is the first sample too; a preference needs two")
    preference = Preference(
        first=texts["first"], second=texts["second"], choice=int(choice), rater=texts["rater"], time=float(time)
    )
    return PreferenceRecord(preference=preference, group=texts["group"], line=line)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {_shown(value)} is not text; put it in quotes")
    if len(value) > MAX_TEXT_CHARS or not value.isprintable():
        raise ValueError(f"{name}: {_shown(value)} is longer than {MAX_TEXT_CHARS} characters, or not printable")
    return value


def _shown(value: Any) -> str:
    return _clipped(repr(value))


def _clipped(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _last_choices(records: Sequence[PreferenceRecord]) -> tuple[PreferenceRecord, ...]:
    """The records without those that a later one replaces."""
    last: dict[Any, PreferenceRecord] = {}
    for record in records:
        key = (record.preference.rater, record.pair) if record.preference.rater else record.preference
        earlier = last.get(key)
        if earlier is None or record.preference.time >= earlier.preference.time:
            last[key] = record
    return tuple(sorted(last.values(), key=lambda record: record.line))


@dataclass(frozen=True, slots=True, kw_only=True)
class UsableRecords:
    """Records whose two samples can be looked at, and what became of the others.

    Attributes:
        records: those that can be used.
        left_out: reason and count, with examples of keys, a line each.
    """

    records: tuple[PreferenceRecord, ...]
    left_out: tuple[str, ...]


def usable_records(file: PreferenceFile, is_stored: Mapping[str, bool], option: str) -> UsableRecords:
    """The records of a file whose samples are in a run with their images.

    Args:
        file: as read.
        is_stored: whether the image is stored, by key of every sample of the run.
        option: of the command line, for messages.

    Raises:
        JobError: no record is left.
    """
    kept: list[PreferenceRecord] = []
    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, int]] = {}
    for record in file.records:
        keys = (record.preference.first, record.preference.second)
        if all(is_stored.get(key, False) for key in keys):
            kept.append(record)
            continue
        key = next(key for key in keys if not is_stored.get(key, False))
        reason = "of which the run stores no image" if key in is_stored else "that the run does not have"
        counts[reason] += 1
        examples.setdefault(reason, {}).setdefault(key, record.line)
    lines = tuple(
        f"{count} of {len(file.records)} records name a sample {reason}: {_named(examples[reason])}"
        for reason, count in counts.items()
    )
    if not kept:
        raise JobError(
            [f"{option}: {file.path}: {line}" for line in lines]
            + [f"{option}: {file.path}: no record is left; give records of this run's samples, by their key"]
        )
    return UsableRecords(records=tuple(kept), left_out=lines)


def _named(lines_of: Mapping[str, int]) -> str:
    shown = [f"'{_clipped(key)}' (line {line})" for key, line in list(lines_of.items())[:MAX_SHOWN]]
    return ", ".join(shown) + (f" and {len(lines_of) - MAX_SHOWN} more" if len(lines_of) > MAX_SHOWN else "")
