"""What a study found, as its `study.json` has it: tables, figures and sentences, drawn by pages and written to files.

A study (`riskforge study sweep`, `transfer`, `ablate`, `rounds`) keeps the document in its own folder and in each of
its runs, whose report shows it as a section.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from engine.data.run.file_names import STUDY
from engine.data.run.kept_documents import read_kept
from engine.data.stores.base import Store
from engine.methods.intervals import Estimate

VERSION = 1
MAX_ROWS = 20_000
MAX_COLUMNS = 200
MAX_SVG_CHARS = 2_000_000
RUNNING, COMPLETE = "running", "complete"


class _Part(BaseModel):
    # A later version may know more of a study.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Interval(_Part):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: Estimate) -> Interval:
        """From an estimate."""
        return cls(value=estimate.value, low=estimate.low, high=estimate.high)


Cell = bool | int | float | str | Interval | None


class StudyColumn(_Part):
    """A column of a table.

    Attributes:
        name: in files.
        title: on pages.
        digits: after the point, of numbers.
        note: what it is, where the title does not say.
        is_p_value: whether what rounds to zero is shown as less than the last digit.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=80)]
    title: str
    unit: str = ""
    digits: int = Field(default=2, ge=0, le=6)
    note: str = ""
    is_p_value: bool = False

    @property
    def heading(self) -> str:
        """The title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, cell: Cell) -> str:
        """A cell as pages and Markdown show it."""
        least = 10.0**-self.digits
        if self.is_p_value and isinstance(cell, float) and cell < least / 2:
            return f"< {least:.{self.digits}f}"
        return cell_text(cell, self.digits)


class StudyTable(_Part):
    """A table; the first one of a study is its main one.

    Attributes:
        name: of its files.
        rows: as many cells each as there are columns.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=80)]
    title: str
    columns: tuple[StudyColumn, ...] = Field(max_length=MAX_COLUMNS)
    rows: tuple[tuple[Cell, ...], ...] = Field(max_length=MAX_ROWS)
    note: str = ""

    @model_validator(mode="after")
    def _check_rows(self) -> StudyTable:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row has other than {len(self.columns)} cells, the number of columns")
        return self

    def texts(self, row: tuple[Cell, ...]) -> list[str]:
        """The cells of a row as pages and Markdown show them."""
        return [column.text(cell) for cell, column in zip(row, self.columns, strict=True)]


class StudyFigure(_Part):
    """A figure as SVG."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=80)]
    caption: str
    svg: Annotated[str, Field(max_length=MAX_SVG_CHARS)]


class StudyDocument(_Part):
    """A study and what it found.

    Attributes:
        version: of the form of the document.
        status: `running` until the figures are there.
        arguments: fields of the study as they were given, with the job.
        command: that makes it again.
        date: when it ended, in UTC, YYYY-MM-DD; when it began, while it is running.
        hardware: of the machine, in words.
        seconds: of all its calls together.
        runs: names of their folders in `runs/`.
        findings: in words, with figures.
        notes: what was left out, and what limits the findings.
    """

    study: str
    version: int
    riskforge: str
    status: str
    name: str
    command: str
    date: str
    hardware: str
    seconds: float = 0.0
    versions: dict[str, str] = {}
    arguments: dict[str, JsonValue]
    runs: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=80)], ...] = ()
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    tables: tuple[StudyTable, ...] = ()
    figures: tuple[StudyFigure, ...] = ()


def cell_text(cell: Cell, digits: int) -> str:
    """A cell in words: a value with its interval, a number with some digits, yes or no; empty where there is none."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Interval):
        value, low, high = (_number(part, digits) for part in (cell.value, cell.low, cell.high))
        return f"{value} ({low} to {high})"
    return _number(cell, digits) if isinstance(cell, float) else f"{cell}"


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    # No minus in front of zeros.
    return text.removeprefix("-") if not float(text) else text


def read_study(store: Store) -> StudyDocument | None:
    """The study of a folder or of one of its runs; None where it has none.

    Raises:
        CorruptShardError: the document cannot be read.
        OutputError: the store refuses.
    """
    remedy = "riskforge study"
    return read_kept(store, STUDY, StudyDocument, "a study", remedy)


def keep_study(store: Store, document: StudyDocument) -> None:
    """Keep the document of a study in a folder, in place of an earlier one.

    Raises:
        OutputError: the store refuses.
    """
    store.replace(STUDY, document_bytes(document.model_dump(mode="json")))


def document_bytes(value: Any) -> bytes:
    """A JSON document as it is stored."""
    import json

    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
