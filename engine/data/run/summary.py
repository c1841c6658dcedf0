"""Medians and rates of a data set's scores per request and context: one table for terminal, card and report."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.outcomes import errors, label_validity, oracle_agreement, predicts_asked, scored_rows
from engine.job.class_names import distinct_pairs
from engine.job.columns import (
    ASKED,
    ERRS,
    NO_CLASS,
    Column,
    EntryScore,
    Role,
    columns_with,
    entry_scores_with,
    stored_names,
)
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED
from engine.methods.quantiles import MAX_VALUES, QuantileSketch
from engine.methods.registry import is_guided

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from engine.job.spec import JobSpec

_TEXTS = ["request", "method", "context", "class_name", "status"]
_SCORES = columns_with(Role.SUMMARISED)
_ENTRY_SCORES = entry_scores_with(Role.SUMMARISED)
# What a summary reads; of a run of an earlier schema version, those of them that it has.
SUMMARY_COLUMNS = tuple(
    dict.fromkeys(
        [
            *_TEXTS, *(column.name for column in _SCORES), *ASKED, *ERRS, "accepted", "scored", "oracle_class",
            "oracle_p_label_min", "p_valid", "transfer", *(entry.column.name for entry in _ENTRY_SCORES.values()),
        ]
    )
)  # fmt: skip
_QUARTILES = (0.25, 0.5, 0.75)
ROWS_PER_TABLE = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and quartiles of a score."""

    q25: float
    median: float
    q75: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSummary:
    """The images of a group under a classifier that was never guided on."""

    model: str
    error_rate: float
    risk_median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """The samples of one request and context.

    Rates and scores are over all samples that were scored, `ok` and `rejected`: over the accepted ones alone they would
    describe the rule of acceptance, not the method.

    Attributes:
        error_rate: share on which the target predicts another class than the conditioned one, for a joint prompt one
            outside its subset; None without a scored sample, as all scores.
        oracle_agreement: share whose oracle class is the conditioned one, for a joint prompt any of its subset; None
            without an oracle.
        valid_failure_rate: share on which the target errs while the oracle agrees; None without an oracle.
        valid_label_rate: share of which the label is valid by the name `label_is_valid`; None where it is unknown.
        strict_failure_rate: share on which the target errs while the label is valid by that name.
        scores: by column, in the order of the table; of a run of an earlier schema version without later ones.
        entry_means: by name, the mean of a score under a model that has entries (`ENTRY_SCORES`), such as the judge;
            None without one.
    """

    request: str
    method: str
    context: str
    attempted: int
    ok: int
    rejected: int
    failed: int
    accepted: int
    error_rate: float | None
    scores: Mapping[str, Spread | None]
    oracle_agreement: float | None
    valid_failure_rate: float | None
    valid_label_rate: float | None = None
    strict_failure_rate: float | None = None
    transfer: tuple[TransferSummary, ...]
    entry_means: Mapping[str, float | None] = field(default_factory=dict)


def plain_first(groups: Sequence[GroupSummary]) -> list[GroupSummary]:
    """Groups as tables show them: those of prompt-only requests, then those of guided ones, each in their order."""
    return sorted(groups, key=lambda group: is_guided(group.method))


def shown_scores(groups: Sequence[GroupSummary]) -> list[Column]:
    """The summarised scores that a table of groups has columns for: those that any of the runs has a value of."""

    def is_shown(column: Column) -> bool:
        if column.is_optional:
            return any(group.scores.get(column.name) is not None for group in groups)
        return not groups or any(column.name in group.scores for group in groups)

    return [column for column in _SCORES if is_shown(column)]


def measured(values: pa.ChunkedArray, column: Column) -> np.ndarray:
    """The values of a score without absent ones: of rows of earlier schema versions, or without a second image."""
    known: np.ndarray = column.known(values.drop_null().to_numpy())
    return known


def shown_entry_scores(groups: Sequence[GroupSummary]) -> dict[str, EntryScore]:
    """The summarised scores of entries that a table of groups has columns for: those of models that the job names."""
    return {
        name: entry
        for name, entry in _ENTRY_SCORES.items()
        if any(group.entry_means.get(name) is not None for group in groups)
    }


def summarise(metadata: Path) -> list[GroupSummary]:
    """The groups of a data set in the order of their first sample, in bounded memory.

    Args:
        metadata: a parquet file, or a folder of them, with the columns of a shard.
    """
    sums = GroupSums()
    for table in read_tables(metadata, SUMMARY_COLUMNS, texts=_TEXTS):
        sums.add(table)
    return sums.groups()


def count_classes(metadata: Path) -> dict[str, dict[str, int]]:
    """Samples per class and status, classes in the order of labels; with their indices where a name is double."""
    import pyarrow as pa

    found: Counter[tuple[str, int, str]] = Counter()
    for table in read_tables(metadata, ["class_name", "class_index", "status"]):
        rows = table.group_by(["class_name", "class_index", "status"]).aggregate([([], "count_all")]).to_pylist()
        found.update({(row["class_name"], row["class_index"], row["status"]): row["count_all"] for row in rows})
    names, indices, statuses = zip(*found, strict=True) if found else ((), (), ())
    pairs = {"class_name": pa.array(names, pa.string()), "class_index": pa.array(indices, pa.int64())}
    texts = class_texts(pa.table(pairs)).to_pylist()
    counts: dict[str, dict[str, int]] = {}
    for _, text, status, count in sorted(zip(indices, texts, statuses, found.values(), strict=True)):
        of_class = counts.setdefault(text, dict.fromkeys((STATUS_OK, STATUS_REJECTED, STATUS_FAILED), 0))
        of_class[status] = of_class.get(status, 0) + count
    return counts


def class_texts(table: pa.Table, labels: Sequence[str] = ()) -> pa.Array:
    """For each row the name of its class, with the index where another class has that name.

    Args:
        labels: class names of the target in index order; without them the classes of the rows are all there are.
    """
    import numpy as np
    import pyarrow as pa

    if not table.num_rows:
        return pa.array([], pa.string())
    names = table["class_name"].cast(pa.string()).combine_chunks().dictionary_encode()
    known = names.dictionary.to_pylist()
    codes = table["class_index"].to_numpy().astype(np.int64) * len(known) + names.indices.to_numpy()
    unique, places = np.unique(codes, return_inverse=True)
    pairs = [(int(code) // len(known), known[int(code) % len(known)]) for code in unique]
    texts = distinct_pairs([*enumerate(labels), *pairs])
    return pa.array([texts[pair] for pair in pairs], pa.string()).take(pa.array(places))


def count_guidance(metadata: Path) -> dict[str, dict[str, int]]:
    """By request with guided samples: its scored ones, those that were guided, and those that no gradient moved.

    Of the latter the gradient was zero, or not finite and dropped, at every guided step.
    """
    import numpy as np

    columns = ["request", "status", "guided_steps", "zero_gradients", "nonfinite_gradients"]
    counts: dict[str, Counter[str]] = {}
    for table in read_tables(metadata, columns):
        table = table.filter(scored_rows(table))
        steps, zero, dropped = (_numbers(table, name) for name in columns[2:])
        guided = steps > 0
        flags = {"scored": np.ones(len(steps)), "guided": guided, "without_effect": guided & (zero + dropped >= steps)}
        requests = table["request"].combine_chunks().dictionary_encode()
        names, codes = requests.dictionary.to_pylist(), requests.indices.to_numpy()
        sums = {flag: np.bincount(codes, values, minlength=len(names)).astype(int) for flag, values in flags.items()}
        for code, name in enumerate(names):
            counts.setdefault(name, Counter()).update({flag: int(of_flag[code]) for flag, of_flag in sums.items()})
    return {name: dict(of_request) for name, of_request in counts.items() if of_request["guided"]}


def read_dials(metadata: Path, job: JobSpec) -> dict[str, dict[str, float]]:
    """How near the risk of scored samples is to the risk target, for each request that was guided to one.

    Returns:
        By request: `target_risk`, `tolerance`, the median of the risk, the share of scored samples within the
        tolerance, and the distance to the risk target within which half of them lie.
    """
    import numpy as np
    import pyarrow.compute as pc

    targets = {request.name: job.parameters_of(request).risk_target for request in job.requests}
    wanted = {name: target for name, target in targets.items() if target is not None}
    if not wanted:
        return {}
    risks, distances = QuantileSketch(), QuantileSketch()
    within, total = Counter[int](), Counter[int]()
    for table in read_tables(metadata, ["request", "method", "status", "scored", "risk", "guided_steps"]):
        # At strength 0 no step is taken that could be guided.
        table = table.filter(scored_rows(table)).filter(pc.field("guided_steps") > 0)
        for place, (name, target) in enumerate(wanted.items()):
            risk = table.filter(pc.equal(table["request"], name))["risk"].to_numpy()
            distance, group = np.abs(risk - target.risk), np.full(len(risk), place)
            risks.add(group, risk)
            distances.add(group, distance)
            within[place] += int((distance <= target.tolerance).sum())
            total[place] += len(risk)
    return {
        name: {
            "target_risk": float(target.risk),
            "tolerance": float(target.tolerance),
            "risk_median": risks.median(place) or 0.0,
            "share_within_tolerance": within[place] / total[place],
            "distance_median": distances.median(place) or 0.0,
        }
        for place, (name, target) in enumerate(wanted.items())
        if total[place]
    }


def read_tables(metadata: Path, names: Iterable[str], *, texts: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Columns of a data set in its order, some ten thousand rows at a time; those columns that it has.

    Args:
        metadata: a parquet file, or a folder of them.
        texts: columns of few distinct texts, which it must have.

    Raises:
        ValueError: it lacks one of `texts`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(metadata.glob("*.parquet")) if metadata.is_dir() else [metadata]
    for path in files:
        stored = pq.read_schema(path).names
        if missing := set(texts) - set(stored):
            raise ValueError(f"{path}: has no column {min(missing)}")
        columns = stored_names(names, stored)
        # What is read ahead would be kept until the file is closed.
        with pq.ParquetFile(path, read_dictionary=list(texts), pre_buffer=False) as file:
            for batch in file.iter_batches(ROWS_PER_TABLE, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def summarise_table(table: pa.Table) -> list[GroupSummary]:
    """The groups of a table that has the columns of a shard, in the order of their first sample."""
    sums = GroupSums()
    sums.add(table)
    return sums.groups()


class GroupSums:
    """The summary of a data set that comes in tables: counts are exact, and medians up to `MAX_VALUES` samples.

    Args:
        max_values: up to how many scored samples medians and quartiles are exact (`QuantileSketch`).
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._new_sketch = partial(QuantileSketch, max_values)
        # Request and context, with the method of the first sample.
        self._codes: dict[tuple[str, str], int] = {}
        self._methods: list[str] = []
        self._sums: defaultdict[str, defaultdict[int, float]] = defaultdict(partial(defaultdict, float))
        self._scores: dict[str, QuantileSketch] = {}
        self._transfers: dict[str, QuantileSketch] = {}
        self._stored: set[str] = set()

    def add(self, table: pa.Table) -> None:
        """Take the next rows, which have the columns of a shard."""
        import numpy as np

        if not table.num_rows:
            return
        codes = self._group_codes(table)
        scored, error = scored_rows(table), errors(table)
        oracle, valid = oracle_agreement(table), label_validity(table)
        has_oracle, has_validity = scored & (oracle >= 0), scored & (valid >= 0)
        ones = np.ones(len(codes))
        self._count("attempted", codes, ones)
        for status in (STATUS_OK, STATUS_REJECTED, STATUS_FAILED):
            self._count(status, codes, _equals(table, "status", status))
        self._count("accepted", codes, _numbers(table, "accepted"))
        self._count("scored", codes, scored)
        self._count("error", codes, error & scored)
        self._count("has_oracle", codes, has_oracle)
        self._count("oracle", codes, np.where(has_oracle, oracle, 0))
        self._count("valid_failure", codes, np.where(has_oracle, oracle * error, 0))
        self._count("has_validity", codes, has_validity)
        self._count("valid", codes, np.where(has_validity, valid, 0))
        self._count("strict_failure", codes, np.where(has_validity, valid * error, 0))
        self._add_scores(table, codes, scored)
        self._add_entries(table, codes)
        self._add_transfers(table, codes)

    def _group_codes(self, table: pa.Table) -> np.ndarray:
        """The number of its group for each row; groups are numbered in order of appearance."""
        import numpy as np

        codes = _group_codes(table)
        _, first = np.unique(codes, return_index=True)
        rows = table.select(["request", "method", "context"]).take(first).to_pylist()
        numbers = []
        for row in rows:
            name = row["request"], row["context"]
            if name not in self._codes:
                self._codes[name] = len(self._codes)
                self._methods.append(row["method"])
            numbers.append(self._codes[name])
        return np.array(numbers)[codes]

    def _count(self, name: str, codes: np.ndarray, values: np.ndarray) -> None:
        """Add whole numbers, so that the order of the sum makes no difference."""
        import numpy as np

        sums = np.bincount(codes, values)
        for code in np.flatnonzero(sums).tolist():
            self._sums[name][code] += float(sums[code])

    def _add_scores(self, table: pa.Table, codes: np.ndarray, scored: np.ndarray) -> None:
        import numpy as np

        for column in _SCORES:
            if column.name not in table.column_names:
                continue
            if len(measured(table[column.name], column)):
                self._stored.add(column.name)
            values = _numbers(table, column.name)
            values = without_absent(values, column) if column.is_optional else values
            known = scored & ~np.isnan(values)
            self._scores.setdefault(column.name, self._new_sketch()).add(codes[known], values[known])

    def _add_entries(self, table: pa.Table, codes: np.ndarray) -> None:
        import numpy as np

        for name, entry in _ENTRY_SCORES.items():
            readings = _entry_readings(table, entry)
            known = ~np.isnan(readings)
            self._count(f"num {name}", codes, known)
            for code in np.unique(codes[known]).tolist():
                self._sums[f"sum {name}"][code] += float(readings[known & (codes == code)].sum())

    def _add_transfers(self, table: pa.Table, codes: np.ndarray) -> None:
        import numpy as np

        for model, (risk, wrong) in _transfer_readings(table).items():
            seen = ~np.isnan(risk)
            self._count(f"seen {model}", codes, seen)
            self._count(f"wrong {model}", codes, np.where(seen, wrong, 0))
            self._transfers.setdefault(model, self._new_sketch()).add(codes[seen], risk[seen])

    def groups(self) -> list[GroupSummary]:
        """The groups so far, in the order of their first sample."""
        return [
            self._group(request, context, method, code)
            for (request, context), method, code in zip(self._codes, self._methods, self._codes.values(), strict=True)
        ]

    def _group(self, request: str, context: str, method: str, code: int) -> GroupSummary:
        def total(name: str) -> int:
            return int(self._sums[name][code])

        def share(name: str, among: str) -> float | None:
            return self._sums[name][code] / total(among) if total(among) else None

        return GroupSummary(
            request=request,
            method=method,
            context=context,
            attempted=total("attempted"),
            ok=total(STATUS_OK),
            rejected=total(STATUS_REJECTED),
            failed=total(STATUS_FAILED),
            accepted=total("accepted"),
            error_rate=share("error", "scored"),
            oracle_agreement=share("oracle", "has_oracle"),
            valid_failure_rate=share("valid_failure", "has_oracle"),
            valid_label_rate=share("valid", "has_validity"),
            strict_failure_rate=share("strict_failure", "has_validity"),
            transfer=tuple(self._transfer(model, code) for model in self._transfers if total(f"seen {model}")),
            scores={name: _spread(sketch, code) for name, sketch in self._scores.items() if name in self._stored},
            entry_means={name: share(f"sum {name}", f"num {name}") for name in _ENTRY_SCORES},
        )

    def _transfer(self, model: str, code: int) -> TransferSummary:
        seen, wrong = self._sums[f"seen {model}"][code], self._sums[f"wrong {model}"][code]
        return TransferSummary(
            model=model, error_rate=wrong / seen, risk_median=self._transfers[model].median(code) or 0.0
        )


def without_absent(values: np.ndarray, column: Column) -> np.ndarray:
    """The values of a score of two images, [N]; NaN where there is no second one."""
    import numpy as np

    return np.where(values == column.empty, np.nan, values)


def _group_codes(table: pa.Table) -> np.ndarray:
    """One number for each row, equal where request and context are, counted in order of appearance."""
    import numpy as np

    request, context = (_codes(table, name) for name in ("request", "context"))
    pairs = request.astype(np.int64) * (int(context.max()) + 1) + context
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[inverse]


def _codes(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().dictionary_encode().indices.to_numpy()


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def _equals(table: pa.Table, name: str, value: str) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.equal(table[name], value).to_numpy()


def _entry_readings(table: pa.Table, entry: EntryScore) -> np.ndarray:
    """A score of the entries of each row, [N]; NaN where there is no entry."""
    import numpy as np
    import pyarrow.compute as pc

    readings = np.full(table.num_rows, np.nan)
    if entry.column.name in table.column_names:
        entries = table[entry.column.name]
        rows = pc.list_parent_indices(entries).to_numpy()
        readings[rows] = pc.list_flatten(entries).combine_chunks().field(entry.part.name).to_numpy()
    return readings


def _transfer_readings(table: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per model and row: risk and whether it errs; NaN where the model did not score the row."""
    import numpy as np
    import pyarrow.compute as pc

    entries = pc.list_flatten(table["transfer"]).combine_chunks()
    parents = pc.list_parent_indices(table["transfer"]).to_numpy()
    readings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for model in pc.unique(entries.field("model")).to_pylist():
        chosen = pc.equal(entries.field("model"), model).to_numpy(zero_copy_only=False)
        rows = parents[chosen]
        risk, predicted = np.full(table.num_rows, np.nan), np.full(table.num_rows, NO_CLASS)
        risk[rows] = entries.field("risk").to_numpy()[chosen]
        predicted[rows] = entries.field("predicted_class").to_numpy()[chosen]
        error = np.where(np.isnan(risk), np.nan, ~predicts_asked(table, predicted))
        readings[model] = (risk, error)
    return readings


def _spread(sketch: QuantileSketch, group: int) -> Spread | None:
    quartiles = sketch.quantiles(group, _QUARTILES)
    return Spread(q25=quartiles[0], median=quartiles[1], q75=quartiles[2]) if quartiles else None


def group_document(group: GroupSummary) -> dict[str, Any]:
    """A group as plain data without nulls: what is not known is left out."""
    document: dict[str, Any] = {}
    for name, value in dataclasses.asdict(group).items():
        document |= value if name in ("scores", "entry_means") else {name: value}
    known = {name: value for name, value in document.items() if value is not None}
    return known | {"transfer": list(known["transfer"])}


def count_requests(groups: list[GroupSummary]) -> dict[str, dict[str, int]]:
    """Samples per request and status, and the accepted ones."""
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for group in groups:
        for name in ("attempted", STATUS_OK, STATUS_REJECTED, STATUS_FAILED, "accepted"):
            counts[group.request][name] = counts[group.request].get(name, 0) + getattr(group, name)
    return dict(counts)
