"""Medians and rates of a data set's scores per request and context: one table for terminal, card and report."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.outcomes import errors, label_validity, oracle_agreement, predicts_asked, scored_rows
from engine.job.class_names import distinct_pairs
from engine.job.columns import (
    ASKED,
    BY_NAME,
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
    """The groups of a data set in the order of their first sample.

    Args:
        metadata: a parquet file, or a folder of them, with the columns of a shard.
    """
    return summarise_table(_read_slim(metadata))


def count_classes(metadata: Path) -> dict[str, dict[str, int]]:
    """Samples per class and status, classes in the order of labels; with their indices where a name is double."""
    import pyarrow.parquet as pq

    table = pq.read_table(metadata, columns=["class_name", "class_index", "status"], partitioning=None)
    table = table.append_column("class", class_texts(table))
    counts: dict[str, dict[str, int]] = {}
    rows = table.group_by(["class", "class_index", "status"]).aggregate([([], "count_all")]).to_pylist()
    for row in sorted(rows, key=lambda row: (row["class_index"], row["class"])):
        empty = dict.fromkeys((STATUS_OK, STATUS_REJECTED, STATUS_FAILED), 0)
        counts.setdefault(row["class"], empty)[row["status"]] = row["count_all"]
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
    import pyarrow.parquet as pq

    columns = ["request", "status", "guided_steps", "zero_gradients", "nonfinite_gradients"]
    table = pq.read_table(metadata, columns=columns, partitioning=None)
    table = table.filter(scored_rows(table))
    steps, zero, dropped = (_numbers(table, name) for name in columns[2:])
    guided = steps > 0
    flags = {"scored": np.ones(len(steps)), "guided": guided, "without_effect": guided & (zero + dropped >= steps)}
    requests = table["request"].combine_chunks().dictionary_encode()
    names, codes = requests.dictionary.to_pylist(), requests.indices.to_numpy()
    sums = {flag: np.bincount(codes, values, minlength=len(names)).astype(int) for flag, values in flags.items()}
    return {
        name: {flag: int(counts[code]) for flag, counts in sums.items()}
        for code, name in enumerate(names)
        if sums["guided"][code]
    }


def read_dials(metadata: Path, job: JobSpec) -> dict[str, dict[str, float]]:
    """How near the risk of scored samples is to the risk target, for each request that was guided to one.

    Returns:
        By request: `target_risk`, `tolerance`, the median of the risk, the share of scored samples within the
        tolerance, and the distance to the risk target within which half of them lie.
    """
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    targets = {request.name: job.parameters_of(request).risk_target for request in job.requests}
    wanted = {name: target for name, target in targets.items() if target is not None}
    if not wanted:
        return {}
    table = pq.read_table(metadata, columns=["request", "status", "risk", "guided_steps"], partitioning=None)
    # At strength 0 no step is taken that could be guided.
    table = table.filter(scored_rows(table)).filter(pc.field("guided_steps") > 0)
    dials = {}
    for name, target in wanted.items():
        risk = table.filter(pc.equal(table["request"], name))["risk"].to_numpy()
        if len(risk):
            distance = np.abs(risk - target.risk)
            dials[name] = {
                "target_risk": float(target.risk),
                "tolerance": float(target.tolerance),
                "risk_median": float(np.median(risk)),
                "share_within_tolerance": float(np.mean(distance <= target.tolerance)),
                "distance_median": float(np.median(distance)),
            }
    return dials


def summarise_table(table: pa.Table) -> list[GroupSummary]:
    """The groups of a table that has the columns of a shard, in the order of their first sample."""
    import numpy as np

    if not table.num_rows:
        return []
    codes = _group_codes(table)
    scores = [column.name for column in _SCORES if _is_stored(table, column)]
    columns = {name: _numbers(table, name) for name in [*scores, "accepted"]}
    columns |= {name: without_absent(columns[name], BY_NAME[name]) for name in scores if BY_NAME[name].is_optional}
    columns |= {status: _equals(table, "status", status) for status in (STATUS_OK, STATUS_REJECTED, STATUS_FAILED)}
    columns |= {"scored": scored_rows(table), "error": errors(table), "oracle": oracle_agreement(table)}
    columns |= {"valid": label_validity(table)}
    columns |= {name: _entry_readings(table, entry) for name, entry in _ENTRY_SCORES.items()}
    transfers = _transfer_readings(table)
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    first = table.select(["request", "method", "context"]).take([int(rows[0]) for rows in groups]).to_pylist()
    return [
        _group(names, scores, {name: column[rows] for name, column in columns.items()}, _of_rows(transfers, rows))
        for names, rows in zip(first, groups, strict=True)
    ]


def _read_slim(metadata: Path) -> pa.Table:
    import pyarrow.dataset
    import pyarrow.parquet as pq

    stored = pyarrow.dataset.dataset(metadata, format="parquet").schema.names
    columns = stored_names(SUMMARY_COLUMNS, stored)
    return pq.read_table(metadata, columns=columns, read_dictionary=_TEXTS, partitioning=None)


def _is_stored(table: pa.Table, column: Column) -> bool:
    """Whether any row has a score: earlier schema versions lack later ones, and most rows have no second image."""
    if column.name not in table.column_names:
        return False
    return bool(len(measured(table[column.name], column))) if table.num_rows else not column.is_optional


def without_absent(values: np.ndarray, column: Column) -> np.ndarray:
    """The values of a score of two images, [N]; NaN where there is no second one."""
    import numpy as np

    return np.where(values == column.empty, np.nan, values)


def _group(
    names: dict[str, Any], scores: Sequence[str], rows: dict[str, np.ndarray], transfer: tuple[TransferSummary, ...]
) -> GroupSummary:
    scored = rows["scored"]
    has_oracle, has_validity = (scored & (rows[name] >= 0) for name in ("oracle", "valid"))
    return GroupSummary(
        **names,
        attempted=len(scored),
        ok=int(rows[STATUS_OK].sum()),
        rejected=int(rows[STATUS_REJECTED].sum()),
        failed=int(rows[STATUS_FAILED].sum()),
        accepted=int(rows["accepted"].sum()),
        error_rate=_mean(rows["error"][scored]),
        oracle_agreement=_mean(rows["oracle"][has_oracle]),
        valid_failure_rate=_mean((rows["oracle"] * rows["error"])[has_oracle]),
        valid_label_rate=_mean(rows["valid"][has_validity]),
        strict_failure_rate=_mean((rows["valid"] * rows["error"])[has_validity]),
        transfer=transfer,
        scores={name: _spread(_known(rows[name][scored])) for name in scores},
        entry_means={name: _mean(_known(rows[name])) for name in _ENTRY_SCORES},
    )


def _known(values: np.ndarray) -> np.ndarray:
    """The values that are known, without NaN."""
    import numpy as np

    return values[~np.isnan(values)]


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


def _of_rows(readings: dict[str, tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> tuple[TransferSummary, ...]:
    import numpy as np

    summaries = []
    for model, (risks, wrong) in readings.items():
        risk, error = risks[rows], wrong[rows]
        seen = ~np.isnan(risk)
        if seen.any():
            summaries.append(
                TransferSummary(
                    model=model, error_rate=float(error[seen].mean()), risk_median=float(np.median(risk[seen]))
                )
            )
    return tuple(summaries)


def _spread(values: np.ndarray) -> Spread | None:
    import numpy as np

    if not len(values):
        return None
    q25, median, q75 = (float(value) for value in np.quantile(values, _QUARTILES))
    return Spread(q25=q25, median=median, q75=q75)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


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
