"""The figures of all rows of a run, gathered in one pass in bounded memory.

Counts are exact: rows that are alike in what tables count become one row with a weight. Medians and quartiles are exact
up to `MAX_VALUES` samples (`engine.methods.quantiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.run.counts import JOINT_KEY
from engine.data.run.schema import check_rows
from engine.data.run.summary import GroupSummary, GroupSums, read_tables
from engine.data.stores.file_errors import shown_path
from engine.job.columns import NO_CLASS
from engine.job.plan import JOINT_CODE
from engine.methods.quantiles import QuantileSketch
from engine.report.data import TEXTS, Categories, KnownTexts, Rows, columns_of, make_rows

if TYPE_CHECKING:
    import pyarrow as pa

_COUNTED = ("accepted", "surplus", "class_index", "predicted_class")
_FLAGS = ("scored", "target_errs", "oracle_agrees", "label_valid")
_STEPS = ("guided_steps", "zero_gradients", "nonfinite_gradients")


class _Alike:
    """Rows that are alike as one, with their number, in the order of the first of them."""

    def __init__(self) -> None:
        self.table: pa.Table | None = None

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Take rows by their columns."""
        import pyarrow as pa

        table = pa.table({**columns, "weights": np.ones(len(next(iter(columns.values()))), dtype=np.int64)})
        whole = table if self.table is None else pa.concat_tables([self.table, table])
        counted = whole.group_by(list(columns), use_threads=False).aggregate([("weights", "sum")])
        self.table = counted.rename_columns({"weights_sum": "weights"}).select([*columns, "weights"])

    def columns(self, empty: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The columns, those of `empty` where nothing was added."""
        if self.table is None:
            return {name: np.array([], dtype=np.int64) for name in (*empty, "weights")}
        return {name: self.table[name].to_numpy() for name in self.table.column_names}


class Speeds:
    """Time of sampling by request and by worker."""

    def __init__(self) -> None:
        # By `request` or `worker` and its number, and under `all` of all: attempts, measured ones and their seconds.
        self.sums: dict[tuple[str, int], np.ndarray] = {}
        self._seconds = {level: QuantileSketch() for level in ("request", "worker", "all")}
        self._sizes = _Alike()

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        seconds, sizes = rows.numbers["duration_seconds"], rows.numbers["batch_size"]
        known = seconds > 0
        of_all = np.zeros(len(rows), dtype=np.int64)
        for level, codes in (("request", rows.request.codes), ("worker", rows.worker.codes), ("all", of_all)):
            parts = np.stack([np.bincount(codes), np.bincount(codes, known), np.bincount(codes, seconds * known)], 1)
            for code in np.flatnonzero(parts[:, 0]).tolist():
                self.sums[level, code] = self.sums.get((level, code), np.zeros(3)) + parts[code]
            self._seconds[level].add(codes[known], seconds[known])
        self._sizes.add({"request": rows.request.codes, "worker": rows.worker.codes, "all": of_all, "sizes": sizes})

    @property
    def is_measured(self) -> bool:
        """Whether any time is known."""
        return any(sums[2] > 0 for sums in self.sums.values())

    def median_seconds(self, level: str, code: int) -> float:
        """The median time of a sample; 0 where none was measured."""
        return self._seconds[level].median(code) or 0.0

    def median_size(self, level: str, code: int) -> float:
        """The median size of the batches of samples."""
        columns = self._sizes.columns((level, "sizes"))
        here = columns[level] == code
        order = np.argsort(columns["sizes"][here])
        sizes, ends = columns["sizes"][here][order], np.cumsum(columns["weights"][here][order])
        middle = [(ends[-1] - 1) // 2, ends[-1] // 2]
        return float(sizes[np.searchsorted(ends, middle, side="right")].mean())


@dataclass(kw_only=True)
class RowSums:
    """What one pass over the rows of a run gives.

    Attributes:
        num_rows: attempts.
        texts: the requests and the other texts of all rows.
        groups: per request and context.
        totals: per request.
        classes: per request and class, which has its number, or the code of joint prompts, as its context.
    """

    num_rows: int = 0
    texts: KnownTexts = field(default_factory=KnownTexts)
    groups: GroupSums = field(default_factory=GroupSums)
    totals: GroupSums = field(default_factory=GroupSums)
    classes: GroupSums = field(default_factory=GroupSums)
    speeds: Speeds = field(default_factory=Speeds)
    _outcomes: _Alike = field(default_factory=_Alike)
    _steps: _Alike = field(default_factory=_Alike)

    def add(self, table: pa.Table) -> None:
        """Take the next rows."""
        rows = make_rows(table, self.texts)
        self.num_rows += len(rows)
        self.groups.add(table)
        self.totals.add(_with_context(table, _constant("", len(rows))))
        self.classes.add(_with_context(table, _class_codes(table)))
        self.speeds.add(rows)
        texts = {name: getattr(rows, name).codes for name in ("request", "class_name", "status")}
        numbers = {name: rows.numbers[name] for name in _COUNTED if name in rows.numbers}
        flags = {name: getattr(rows, name) for name in _FLAGS}
        # Whether there is an oracle is counted, not what it predicts.
        oracle = np.where(rows.numbers["oracle_class"] == NO_CLASS, NO_CLASS, 0)
        self._outcomes.add(texts | numbers | flags | {"oracle_class": oracle})
        steps = {name: rows.numbers[name][rows.scored] for name in _STEPS}
        if rows.scored.any():
            self._steps.add({"request": rows.request.codes[rows.scored], **steps})

    @property
    def outcomes(self) -> Rows:
        """All rows as tables of outcomes count them: with request, class, status, predictions and their weights."""
        columns = self._outcomes.columns(("request", "class_name", "status", *_COUNTED, *_FLAGS, "oracle_class"))
        return self._rows(columns, (*_COUNTED, "oracle_class"))

    @property
    def steps(self) -> Rows:
        """All scored rows as tables of gradients count them."""
        columns = self._steps.columns(("request", *_STEPS))
        return self._rows(columns | {"scored": np.ones(len(columns["request"]), dtype=bool)}, _STEPS)

    def _rows(self, columns: dict[str, np.ndarray], numbers: tuple[str, ...]) -> Rows:
        nothing = np.zeros(len(columns["weights"]), dtype=np.int64)
        names = self.texts.names
        texts: dict[str, Any] = {name: Categories(columns.get(name, nothing), names[name]) for name in names}
        flags: dict[str, Any] = {name: columns.get(name, nothing).astype(bool) for name in _FLAGS[:3]}
        return Rows(
            **texts,
            **flags,
            label_valid=columns.get("label_valid", nothing),
            numbers={name: columns[name] for name in numbers if name in columns},
            guided=self.texts.guided,
            subsets=self.texts.subsets,
            weights=columns["weights"],
        )

    def class_groups(self) -> dict[tuple[str, str], GroupSummary]:
        """The summary of each class by request and by its number or `JOINT_CODE`."""
        return {(group.request, group.context): group for group in self.classes.groups()}


def sum_rows(path: Path) -> RowSums:
    """Everything that the report shows of all rows.

    Raises:
        CorruptShardError: a column has values that no run writes.
    """
    sums = RowSums()
    for table in read_tables(path, columns_of(path), texts=TEXTS):
        check_rows(table, shown_path(path))
        sums.add(table)
    return sums


def _with_context(table: pa.Table, context: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index("context"), "context", context)


def _constant(text: str, length: int) -> pa.Array:
    import pyarrow as pa

    return pa.repeat(pa.scalar(text, pa.string()), length)


def _class_codes(table: pa.Table) -> pa.Array:
    """For each row the number of its class, or that it has several; such a row names the one it came closest to."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_joint = pc.match_substring_regex(table["key"], JOINT_KEY)
    return pc.if_else(is_joint, pa.scalar(JOINT_CODE), table["class_index"].cast(pa.string()))
