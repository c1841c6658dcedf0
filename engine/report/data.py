"""What the report shows, gathered from a run's `manifest.json` and `metadata.parquet`.

The metadata is read by columns: all rows once for what is counted (`row_sums`), and some rows for charts and gallery.
Whole rows are read only for the samples that are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.run.outcomes import errors, joint_rows, label_validity, oracle_agreement, scored_rows
from engine.data.run.some_rows import chosen_rows, shares_of
from engine.data.run.summary import SUMMARY_COLUMNS, read_tables
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
    import pyarrow.parquet as pq
    from pyarrow.dataset import Dataset, Expression

TEXTS = ("request", "method", "context", "class_name", "status", "worker")
_CATEGORIES = ("request", "class_name", "status", "context", "worker")
_NUMBERS = (
    "class_index", "predicted_class", "oracle_class", "is_error", "accepted", "surplus", "seed", "guided_steps",
    "zero_gradients", "nonfinite_gradients", "duration_seconds", "batch_size",
    *(column.name for column in columns_with(Role.DRAWN)),
)  # fmt: skip
MAX_CONFUSION_CLASSES = 50
MAX_PAIRS = 25
MAX_MESSAGES = 10
MAX_DISTINCT_MESSAGES = 20_000
MAX_SUBSET = 8
# With more requests, confusions are those of all that are guided, and of all that are not.
MAX_CONFUSIONS = 6
# Rows of a run, about, that charts and gallery are made of; figures are of all.
MAX_ROWS = 50_000
_ROWS_AT_ONCE = 8192


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
        weights: how many rows of the run each row stands for.
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
    weights: np.ndarray

    def count(self, which: np.ndarray) -> int:
        """How many rows of the run some rows stand for.

        Args:
            which: flags, [N].
        """
        return int(self.weights[which].sum())

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


class KnownTexts:
    """The distinct texts of columns over several tables, and what is known of requests, in order of appearance.

    Attributes:
        names: texts by column, in the order of their codes.
        guided, subsets: of each request, as in `Rows`.
    """

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {name: [] for name in _CATEGORIES}
        self._codes: dict[str, dict[str, int]] = {name: {} for name in _CATEGORIES}
        self.guided: list[bool] = []
        self.subsets: list[tuple[int, ...]] = []

    def categories(self, name: str, column: pa.ChunkedArray) -> Categories:
        """A column of the next table."""
        encoded = column.combine_chunks().dictionary_encode()
        used, first, places = np.unique(encoded.indices.to_numpy(), return_index=True, return_inverse=True)
        texts, known, numbers = encoded.dictionary.to_pylist(), self._codes[name], np.zeros(len(used), dtype=np.int64)
        for place in np.argsort(first):
            text = texts[used[place]]
            if text not in known:
                known[text] = len(known)
                self.names[name].append(text)
            numbers[place] = known[text]
        return Categories(numbers[places], self.names[name])

    def note_requests(self, table: pa.Table, request: Categories, joint: np.ndarray) -> None:
        """Take what rows say of their requests: the method of the first, and the classes of the first joint prompt.

        Args:
            joint: whether a row is a scored one of a joint prompt.
        """
        codes, first = np.unique(request.codes, return_index=True)
        for code, method in zip(codes.tolist(), table["method"].take(first).to_pylist(), strict=True):
            if code == len(self.guided):
                self.guided.append(is_guided(method))
                self.subsets.append(())
        codes, first = np.unique(request.codes[joint], return_index=True)
        rows = np.flatnonzero(joint)[first]
        for code, classes in zip(codes.tolist(), table["kldb_classes"].take(rows).to_pylist(), strict=True):
            self.subsets[code] = self.subsets[code] or tuple(classes)


def open_metadata(path: Path) -> Dataset:
    """The metadata of a run, a file or a folder of parts, for reading some rows or columns of it."""
    import pyarrow.dataset

    return pyarrow.dataset.dataset(path, format="parquet", partitioning=None)


def columns_of(path: Path) -> list[str]:
    """The columns of a run that tables and charts are made of."""
    names = dict.fromkeys([*TEXTS, *_NUMBERS, *SUMMARY_COLUMNS, *PAIR_COLUMNS])
    return stored_names(names, open_metadata(path).schema.names)


def read_some(path: Path, per_request: Mapping[str, int], max_rows: int = MAX_ROWS) -> tuple[pa.Table, np.ndarray]:
    """The columns of rows that charts and gallery are made of, and their row numbers in the run.

    All rows, or of a run with more than `max_rows` of each request about equally many, chosen by their seeds: evenly,
    and together with those that began with the same noise.

    Args:
        per_request: rows of each request.
    """
    import pyarrow as pa

    shares = shares_of(per_request, max_rows)
    tables, places, start = [], [np.array([], dtype=np.int64)], 0
    for table in read_tables(path, columns_of(path), texts=TEXTS):
        kept = chosen_rows(table, shares)
        tables.append(table.take(kept) if len(kept) < len(table) else table)
        places.append(start + kept)
        start += len(table)
    return pa.concat_tables(tables).unify_dictionaries(), np.concatenate(places)


def make_rows(table: pa.Table, known: KnownTexts | None = None) -> Rows:
    """The rows of a table with `columns_of` a run.

    Args:
        known: texts of the tables before, which those of this one are added to.
    """
    known = known or KnownTexts()
    texts = {name: known.categories(name, table.column(name)) for name in _CATEGORIES}
    numbers = {name: table.column(name).to_numpy() for name in stored_names(_NUMBERS, table.column_names)}
    scored = scored_rows(table)
    known.note_requests(table, texts["request"], scored & joint_rows(table))
    return Rows(
        **texts,
        numbers=numbers,
        scored=scored,
        target_errs=errors(table),
        oracle_agrees=oracle_agreement(table) > 0,
        label_valid=label_validity(table),
        guided=known.guided,
        subsets=known.subsets,
        weights=np.ones(table.num_rows, dtype=np.int64),
    )


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
        counts = [rows.count(here & (predicted == column)) for column in columns]
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
    unique, places = np.unique(pairs, axis=0, return_inverse=True)
    counts = np.bincount(places.ravel(), rows.weights[wrong])
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
    import pyarrow.dataset

    is_failed = pc.field("status") == STATUS_FAILED
    scanner = metadata.scanner(
        columns=["error_message"], filter=is_failed if among is None else is_failed & among, batch_readahead=1,
        fragment_readahead=1, fragment_scan_options=pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False),
    )  # fmt: skip
    counts: Counter[str] = Counter()
    for batch in scanner.to_batches():
        for entry in pc.value_counts(batch.column(0)).to_pylist():
            counts[entry["values"]] += entry["counts"]
        if len(counts) > MAX_DISTINCT_MESSAGES:
            # Rare ones may be counted too low by what was dropped before.
            counts = Counter(dict(counts.most_common(MAX_DISTINCT_MESSAGES // 2)))
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_MESSAGES]


def read_samples(metadata: Dataset, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The whole rows of the given numbers, in the given order."""
    import pyarrow.parquet as pq

    wanted, records, start = np.array(sorted(set(numbers)), dtype=np.int64), dict[int, dict[str, Any]](), 0
    for path in metadata.files:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                here = wanted[(wanted >= start) & (wanted < stop)]
                if len(here):
                    records |= _records(file, group, start, here)
                start = stop
    return [records[number] for number in numbers]


def _records(file: pq.ParquetFile, group: int, start: int, wanted: np.ndarray) -> dict[int, dict[str, Any]]:
    """Rows of a row group by number, a few thousand of them in memory at a time."""
    records: dict[int, dict[str, Any]] = {}
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
        here = wanted[(wanted >= start) & (wanted < start + len(batch))]
        records |= dict(zip(here.tolist(), batch.take(pa_indices(here - start)).to_pylist(), strict=True))
        start += len(batch)
    return records


def pa_indices(places: np.ndarray) -> pa.Array:
    """Row numbers for Arrow."""
    import pyarrow as pa

    return pa.array(places, pa.int64())
