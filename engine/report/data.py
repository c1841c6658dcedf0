"""What the report shows, gathered from a run's `manifest.json` and `metadata.parquet`.

The metadata is read by columns; whole rows are read only for the samples that are shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.run.outcomes import errors, joint_rows, label_validity, oracle_agreement, scored_rows
from engine.data.run.schema import check_rows
from engine.data.run.summary import SUMMARY_COLUMNS
from engine.data.stores.file_errors import shown_path
from engine.job.columns import (
    BY_NAME,
    NO_CLASS,
    OTHER_CLASS,
    PAIR_COLUMNS,
    Column,
    Role,
    by_rank,
    columns_with,
    stored_names,
)
from engine.job.records import STATUS_FAILED
from engine.methods.registry import is_guided
from engine.report.text import joined, many

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.dataset import Dataset, Expression

_TEXTS = ["request", "method", "context", "class_name", "status", "worker"]
_NUMBERS = (
    "class_index", "predicted_class", "oracle_class", "is_error", "accepted", "surplus", "seed", "guided_steps",
    "zero_gradients", "nonfinite_gradients", "duration_seconds", "batch_size",
    *(column.name for column in columns_with(Role.DRAWN)),
)  # fmt: skip
MAX_CONFUSION_CLASSES = 50
MAX_PAIRS = 25
MAX_MESSAGES = 10
MAX_SUBSET = 8
# With more requests, confusions are those of all that are guided, and of all that are not.
MAX_CONFUSIONS = 6


@dataclass(frozen=True, slots=True)
class Categories:
    """A column of few distinct texts: a code a row, and the texts in order of first appearance."""

    codes: np.ndarray
    names: list[str]

    def is_one_of(self, rows: np.ndarray, *names: str) -> np.ndarray:
        """For each of the row numbers, whether its text is one of the names."""
        wanted = [code for code, name in enumerate(self.names) if name in names]
        return np.isin(self.codes[rows], wanted)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The columns of every attempt that tables and charts are made of.

    Attributes:
        numbers: the columns of numbers by name; of a run of an earlier schema version without later ones.
        scored: whether models scored a row.
        target_errs: whether the target predicts a class that was not asked for.
        oracle_agrees: whether the oracle predicts one that was.
        label_valid: 1.0 where the label is valid by the name `label_is_valid`, 0.0 where not, -1.0 where unknown.
        guided: for each request whether its samples were guided.
        subsets: for each request the classes of its joint prompt; empty where it has one class a sample.
    """

    request: Categories
    class_name: Categories
    status: Categories
    context: Categories
    worker: Categories
    numbers: dict[str, np.ndarray]
    scored: np.ndarray
    target_errs: np.ndarray
    oracle_agrees: np.ndarray
    label_valid: np.ndarray
    guided: list[bool]
    subsets: list[tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.request.codes)

    def plain_first(self) -> list[int]:
        """The requests: prompt-only ones, then guided ones, each in the order of their first sample."""
        return sorted(range(len(self.request.names)), key=lambda code: self.guided[code])

    def main_score(self, request: int) -> Column:
        """The score that a request aims at: KLDB between classes, risk otherwise."""
        return BY_NAME["kldb" if self.subsets[request] else "risk"]

    def drawn_scores(self) -> list[Column]:
        """The scores that charts show, in the order of the page."""
        return [column for column in by_rank(columns_with(Role.DRAWN)) if column.name in self.numbers]

    def scores_of(self, request: int, score: str) -> np.ndarray:
        """A score over the scored samples of a request."""
        return self.numbers[score][self.scored & (self.request.codes == request)]


def open_metadata(path: Path) -> Dataset:
    """The metadata of a run, a file or a folder of parts, for reading some rows or columns of it."""
    import pyarrow.dataset

    return pyarrow.dataset.dataset(path, format="parquet")


def read_table(path: Path) -> pa.Table:
    """The columns of every attempt that tables and charts are made of."""
    import pyarrow.parquet as pq

    names = dict.fromkeys([*_TEXTS, *_NUMBERS, *SUMMARY_COLUMNS, *PAIR_COLUMNS])
    columns = stored_names(names, open_metadata(path).schema.names)
    table = pq.read_table(path, columns=columns, read_dictionary=_TEXTS)
    check_rows(table, shown_path(path))
    return table


def make_rows(table: pa.Table) -> Rows:
    """The rows of a table that `read_table` gave."""
    texts = {name: _categories(table.column(name)) for name in ("request", "class_name", "status", "context", "worker")}
    numbers = {name: table.column(name).to_numpy() for name in stored_names(_NUMBERS, table.column_names)}
    scored = scored_rows(table)
    return Rows(
        **texts,
        numbers=numbers,
        scored=scored,
        target_errs=errors(table),
        oracle_agrees=oracle_agreement(table) > 0,
        label_valid=label_validity(table),
        guided=_guided(table, texts["request"]),
        subsets=_subsets(table, texts["request"], scored & joint_rows(table)),
    )


def _categories(column: pa.ChunkedArray) -> Categories:
    encoded = column.combine_chunks().dictionary_encode()
    used, first, codes = np.unique(encoded.indices.to_numpy(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    names = encoded.dictionary.to_pylist()
    return Categories(np.argsort(order)[codes], [names[used[place]] for place in order])


def _guided(table: pa.Table, request: Categories) -> list[bool]:
    """For each request whether its method guides, by its first row."""
    _, first = np.unique(request.codes, return_index=True)
    return [is_guided(name) for name in table["method"].take(first).to_pylist()]


def _subsets(table: pa.Table, request: Categories, joint: np.ndarray) -> list[tuple[int, ...]]:
    """The classes of each request with a joint prompt, from its first scored sample; a request has one subset.

    Args:
        joint: whether a row is a scored one of a joint prompt.
    """
    subsets: list[tuple[int, ...]] = []
    for code in range(len(request.names)):
        first = np.flatnonzero((request.codes == code) & joint)[:1]
        subsets += [tuple(classes) for classes in table["kldb_classes"].take(first).to_pylist()] or [()]
    return subsets


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Conditioned class against predicted class.

    Attributes:
        columns: names of the predicted classes.
        rows: for each conditioned class or subset its name, its counts, and the places of its own columns.
    """

    columns: list[str]
    rows: list[tuple[str, list[int], frozenset[int]]]


def names_by_index(rows: Rows, labels: list[str]) -> dict[int, str]:
    """Names by class index: the target's labels where known, else the names of the conditioned classes."""
    if labels:
        return dict(enumerate(labels))
    known = rows.numbers["class_index"] != NO_CLASS
    indices, first = np.unique(rows.numbers["class_index"][known], return_index=True)
    codes = rows.class_name.codes[known][first]
    return {int(index): rows.class_name.names[code] for index, code in zip(indices, codes, strict=True)}


def name_of(index: int, names: dict[int, str]) -> str:
    """A class for a reader: its name, or its index where the name is not known."""
    if index == OTHER_CLASS:
        return "another class"
    return "none" if index == NO_CLASS else names.get(index, f"class {index}")


def subset_name(subset: tuple[int, ...], names: dict[int, str]) -> str:
    """The classes of a joint prompt for a reader."""
    return joined((name_of(index, names) for index in subset), MAX_SUBSET, " and ")


def samples_apart(rows: Rows) -> list[tuple[str, np.ndarray]]:
    """Samples that tables may pool: names and which rows, of each request, prompt-only ones first.

    Of many requests it is all prompt-only ones together, and all guided ones.
    """
    order = rows.plain_first()
    if len(order) <= MAX_CONFUSIONS:
        return [(rows.request.names[code], rows.request.codes == code) for code in order]
    guided = np.array(rows.guided, dtype=bool)
    kinds = (("prompt-only", ~guided), ("guided", guided))
    return [
        (many(int(chosen.sum()), f"{kind} request"), chosen[rows.request.codes])
        for kind, chosen in kinds
        if chosen.any()
    ]


def conditioned(rows: Rows, names: dict[int, str], among: np.ndarray) -> list[tuple[str, frozenset[int], np.ndarray]]:
    """What samples were conditioned on: name, classes, and which scored rows; the classes first, then the subsets.

    Args:
        among: which rows, [N].
    """
    joint = np.array([bool(subset) for subset in rows.subsets], dtype=bool)[rows.request.codes]
    single = rows.scored & among & ~joint
    rows_of: dict[tuple[int, ...], np.ndarray] = {
        (int(index),): single & (rows.numbers["class_index"] == index)
        for index in np.unique(rows.numbers["class_index"][single])
    }
    for code, subset in enumerate(rows.subsets):
        if subset:
            here = rows.scored & among & (rows.request.codes == code)
            rows_of[subset] = rows_of.get(subset, np.zeros(len(rows), dtype=bool)) | here
    rows_of = {classes: here for classes, here in rows_of.items() if here.any()}
    return [(subset_name(classes, names), frozenset(classes), here) for classes, here in rows_of.items()]


def confusion(rows: Rows, names: dict[int, str], among: np.ndarray) -> Confusion | None:
    """The confusion table of some rows, or None with too many classes for one, or with no scored sample."""
    predicted = rows.numbers["predicted_class"]
    columns = sorted({int(index) for index in np.unique(predicted[rows.scored])} | set(names))
    if len(columns) > MAX_CONFUSION_CLASSES or not (rows.scored & among).any():
        return None
    lines = []
    for name, classes, here in conditioned(rows, names, among)[: 2 * MAX_CONFUSION_CLASSES]:
        counts = [int(np.count_nonzero(predicted[here] == column)) for column in columns]
        lines.append((name, counts, frozenset(place for place, column in enumerate(columns) if column in classes)))
    return Confusion(columns=[name_of(index, names) for index in columns], rows=lines)


def error_pairs(rows: Rows, names: dict[int, str], among: np.ndarray) -> list[tuple[str, str, int]]:
    """The most frequent errors of some rows: what was asked for, predicted class, count; for many classes."""
    wrong = rows.scored & among & rows.target_errs
    subsets = list(dict.fromkeys(subset for subset in rows.subsets if subset))
    # Subsets are numbered below zero, so that they differ from classes.
    numbers = np.array([-1 - subsets.index(subset) if subset else 0 for subset in rows.subsets], dtype=np.int64)
    of_subset = numbers[rows.request.codes]
    asked = np.where(of_subset < 0, of_subset, rows.numbers["class_index"])
    pairs = np.stack([asked[wrong], rows.numbers["predicted_class"][wrong]], axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.lexsort((unique[:, 1], unique[:, 0], -counts))[:MAX_PAIRS]
    return [
        (
            subset_name(subsets[-1 - asked_class], names) if asked_class < 0 else name_of(asked_class, names),
            name_of(predicted, names),
            int(counts[place]),
        )
        for place in order
        for asked_class, predicted in [map(int, unique[place])]
    ]


def failures(metadata: Dataset, among: Expression | None = None) -> list[tuple[str, int]]:
    """The most frequent messages of failed samples, with counts.

    Args:
        among: which samples; all where not given.
    """
    import pyarrow.compute as pc

    is_failed = pc.field("status") == STATUS_FAILED
    table = metadata.to_table(columns=["error_message"], filter=is_failed if among is None else is_failed & among)
    counted = sorted(
        ((entry["values"], entry["counts"]) for entry in pc.value_counts(table.column("error_message")).to_pylist()),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return counted[:MAX_MESSAGES]


def read_samples(metadata: Dataset, numbers: list[int]) -> list[dict[str, Any]]:
    """The whole rows of the given numbers, in the given order."""
    import pyarrow as pa

    if not numbers:
        return []
    order = sorted(numbers)
    records = dict(zip(order, metadata.take(pa.array(order, pa.int64())).to_pylist(), strict=True))
    return [records[number] for number in numbers]
