"""The scored samples of a run, as a comparison reads them: a column each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.data.reading.people.review import NO_PEOPLE, People, read_people
from engine.data.run.curated import Curation, curation_of
from engine.data.run.file_names import MANIFEST, METADATA, RESCORED_FROM, SUCCESS
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.outcomes import errors, joint_rows, label_validity, oracle_agreement, scored_rows
from engine.data.run.schema import check_rows
from engine.data.run.some_rows import chosen_rows, shares_of
from engine.data.run.summary import class_texts, read_tables, without_absent
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.data.stores.opening import open_store
from engine.errors import OutputError, first_line
from engine.job.class_names import distinct_names
from engine.job.columns import ASKED, BY_NAME, ERRS, Role, columns_with, stored_names
from engine.job.spec import JOINT_SEPARATOR
from engine.models.calibration import noted_temperature

if TYPE_CHECKING:
    import pyarrow as pa

SHARES = ("error_rate", "valid_failures", "strictly_valid_failures")
MEDIANS = tuple(column.name for column in columns_with(Role.COMPARED))
METRICS = (*SHARES, *MEDIANS)
_COLUMNS = [
    *ASKED, *ERRS, "request", "method", "class_name", "prompt", "context", "seed", "status", "oracle_class", *MEDIANS,
]  # fmt: skip
_DATE = re.compile(r"(?<!\d)\d{4}-\d\d-\d\d(?!\d)")
Texts = NDArray[np.object_]
Rows = NDArray[np.intp]
# Of larger runs so many are compared, about equally many of each request: tests and bootstraps hold them several times.
MAX_COMPARED = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRun:
    """The scored samples of a run, a column each, [N].

    Attributes:
        target: `address` and `digest` of the classifier that scored.
        methods: the method of each request, by its name.
        classes: what was asked for: a class, or the classes of a joint prompt.
        is_error: whether the target predicts a class that was not asked for.
        valid: 1 where the target errs and the oracle agrees, 0 where not, NaN without an oracle.
        scores: by metric of `MEDIANS`; of runs and baselines of an earlier schema version without later ones.
        unknown: requests whose shares are not known: those with a joint prompt in earlier baselines.
        strictly_valid: 1 where the target errs and the label is valid by the name `label_is_valid`, 0 where not, NaN
            where that is unknown; None in runs without it.
        predicted: index of the predicted class; None in baselines that do not know it.
        night: the date of the run, such as 2026-11-21; empty where it is not known.
        is_baseline: whether it was read from a pinned file.
        is_rescored: whether it is the folder of a rescoring.
        temperature: of the target in place of its own; None for its own.
        curation: of a curated run, in which every attempt of its parent has its scores.
        people: what people say of its images; nothing of a baseline.
        num_scored: scored samples of the run, of which these may be some; 0 of earlier baselines.
    """

    address: str
    name: str
    target: dict[str, str]
    labels: tuple[str, ...]
    methods: dict[str, str]
    keys: Texts
    requests: Texts
    classes: Texts
    contexts: Texts
    prompts: Texts
    seeds: NDArray[np.int64]
    is_error: NDArray[np.bool_]
    valid: NDArray[np.float64]
    scores: Mapping[str, NDArray[np.float64]]
    strictly_valid: NDArray[np.float64] | None = None
    predicted: NDArray[np.int64] | None = None
    night: str = ""
    is_baseline: bool = False
    is_rescored: bool = False
    unknown: frozenset[str] = frozenset()
    temperature: float | None = None
    curation: Curation | None = None
    people: People = NO_PEOPLE
    num_scored: int = 0

    @property
    def num_samples(self) -> int:
        """Scored samples of the run."""
        return max(self.num_scored, len(self.keys))

    def metric(self, name: str, rows: Rows) -> Any:
        """A metric's column at some rows; None where it is not known for all of them.

        A score of two images is NaN in rows without a second one.
        """
        if name in SHARES and not self.unknown.isdisjoint(self.requests[rows]):
            return None
        if name == "error_rate":
            return self.is_error[rows]
        if name in SHARES:
            flags = self.valid if name == "valid_failures" else self.strictly_valid
            return None if flags is None or np.isnan(flags[rows]).any() else flags[rows] > 0
        if name not in self.scores:
            return None
        values, column = self.scores[name][rows], BY_NAME[name]
        return without_absent(values, column) if column.is_optional else values

    def class_names(self) -> dict[int, str]:
        """Names of the target's classes by index; of several classes of one name with the index."""
        return distinct_names(dict(enumerate(self.labels)))


def read_scored_run(address: str, shares: Mapping[str, float] | None = None) -> ScoredRun:
    """The scored samples of a run, or of a folder of `riskforge rescore`; of a large one some of each request.

    Args:
        shares: of the samples of each request that are read (`common_shares`); by the run alone where not given.

    Raises:
        OutputError: there is no such folder, or nothing that a finished run has.
        CorruptShardError: its manifest cannot be read.
    """
    import pyarrow as pa

    store = open_store(address)
    path = _metadata_of(store, address)
    manifest = read_manifest(store)
    try:
        target = manifest["models"]["target"]
        with explained(path):
            shares = shares_of(_request_counts(path), MAX_COMPARED) if shares is None else shares
            table, num_scored = _read_some(path, shares, store.address(METADATA))
        run = replace(_scored_run(store.uri, str(manifest["name"]), target, table), num_scored=num_scored)
        is_rescored = RESCORED_FROM in manifest
        people = read_people(store, is_rescoring=is_rescored)
        run = replace(
            run, night=night_of(manifest, store.uri), curation=curation_of(manifest), people=people,
            is_rescored=is_rescored,
        )  # fmt: skip
        return run if _has_strict_validity(manifest, table) else replace(run, strictly_valid=None)
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise _unreadable(address, error) from error


def common_shares(addresses: Sequence[str]) -> dict[str, float]:
    """The share of the samples of each request that is read of all of some runs, by the largest of them.

    Raises:
        OutputError: a run cannot be read.
    """
    import pyarrow as pa

    most: dict[str, int] = {}
    for address in addresses:
        path = _metadata_of(open_store(address), address)
        try:
            with explained(path):
                counts = _request_counts(path)
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise _unreadable(address, error) from error
        most |= {name: max(count, most.get(name, 0)) for name, count in counts.items()}
    return shares_of(most, MAX_COMPARED)


def _metadata_of(store: Store, address: str) -> Path:
    if not store.exists(METADATA) or not store.exists(MANIFEST):
        raise OutputError(
            f"{address}: holds no {MANIFEST} with {METADATA}; give the folder of a run, or of a rescoring, that has"
            " come to its end"
        )
    return store.fetch(METADATA, keep=True)


def _unreadable(address: str, error: Exception) -> OutputError:
    reason = first_line(error)
    return OutputError(f"{address}: cannot be read as a run ({reason}); `riskforge verify` says more")


def _request_counts(metadata: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for table in read_tables(metadata, ["request"]):
        counts.update({entry["values"]: entry["counts"] for entry in table["request"].value_counts().to_pylist()})
    return counts


def _read_some(metadata: Path, shares: Mapping[str, float], where: str) -> tuple[pa.Table, int]:
    """The chosen rows of a run, and how many scored ones it has."""
    import pyarrow as pa

    tables, num_scored = [], 0
    for table in read_tables(metadata, _COLUMNS):
        check_rows(table, where)
        num_scored += int(scored_rows(table).sum())
        tables.append(table.take(chosen_rows(table, shares)))
    if not tables:
        raise ValueError("it has no rows")
    return pa.concat_tables(tables).combine_chunks(), num_scored


def _has_strict_validity(manifest: Mapping[str, Any], table: pa.Table) -> bool:
    """Whether validity is known better than by one oracle: by an estimate fitted on people, or several oracles."""
    if "p_valid" in table.column_names and (table["p_valid"].to_numpy() >= 0).any():
        return True
    oracles = manifest["models"].get("oracles")
    return isinstance(oracles, list) and len(oracles) > 1


def night_of(manifest: Mapping[str, Any], uri: str) -> str:
    """The date of a run: of its fresh requests, else the last one in its address, else of its end; empty without any.

    A run that ends after midnight began on the day before, so the date in its address is the better one.
    """
    requests = manifest.get("job", {}).get("requests", [])
    dates = [request["fresh"] for request in requests if isinstance(request.get("fresh"), str)]
    for text in (*dates, *reversed(_DATE.findall(uri))):
        try:
            return date.fromisoformat(text).isoformat()
        except ValueError:
            continue
    timing = manifest.get("timing", {})
    try:
        began = float(timing["finished"]) - float(timing.get("run_seconds", 0))
        return datetime.fromtimestamp(began).date().isoformat()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return ""


def _scored_run(address: str, name: str, target: dict[str, Any], table: pa.Table) -> ScoredRun:
    table = table.filter(scored_rows(table)).combine_chunks()
    labels = tuple(map(str, target["labels"]))
    oracle = oracle_agreement(table)
    is_error, validity = errors(table), label_validity(table)
    scores = stored_names(MEDIANS, table.column_names)
    requests, methods = (_shared(table[name]) for name in ("request", "method"))
    return ScoredRun(
        address=address,
        name=name,
        target={key: str(target[key]) for key in ("address", "digest")},
        temperature=noted_temperature(target),
        labels=labels,
        methods=dict(zip(requests.tolist(), methods.tolist(), strict=True)),
        keys=texts_of(table["key"].to_pylist()),
        requests=requests,
        classes=_class_names(table, labels),
        contexts=_shared(table["context"]),
        prompts=_shared(table["prompt"]),
        seeds=np.asarray(table["seed"].to_numpy(), dtype=np.int64),
        is_error=is_error,
        valid=np.where(oracle < 0, np.nan, (oracle > 0) & is_error),
        strictly_valid=np.where(validity < 0, np.nan, (validity > 0) & is_error),
        predicted=np.asarray(table["predicted_class"].to_numpy(), dtype=np.int64),
        scores={name: np.asarray(table[name].to_numpy(), dtype=float) for name in scores},
    )


def _class_names(table: pa.Table, labels: Sequence[str]) -> Texts:
    """The requested class or classes, row by row; rows of one class share one text."""
    texts = _shared(class_texts(table, labels))
    joint = np.flatnonzero(joint_rows(table))
    names = distinct_names(dict(enumerate(labels)))
    shared: dict[tuple[int, ...], str] = {}
    for row, members in zip(joint, table["kldb_classes"].take(joint).to_pylist(), strict=True):
        texts[row] = shared.setdefault(tuple(members), JOINT_SEPARATOR.join(names[index] for index in members))
    return texts


def _shared(column: pa.Array | pa.ChunkedArray) -> Texts:
    """A column of texts in which equal texts are one object, which saves memory."""
    import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = whole.dictionary_encode()
    return texts_of(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]


def texts_of(values: Sequence[str]) -> Texts:
    """A column of texts."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def unfinished(addresses: Sequence[str]) -> list[str]:
    """The runs and rescorings without `_SUCCESS`: their figures are of a part, or from before they grew."""
    return [address for address in addresses if not open_store(address).exists(SUCCESS)]


def metric_name(metric: str) -> str:
    """A metric in words."""
    if metric == "strictly_valid_failures":
        return "valid failures (strictly)"
    return metric.replace("_", " ") if metric in SHARES else f"median {BY_NAME[metric].label}"
