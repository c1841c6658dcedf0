"""What is in a run, at a glance, and one sample of it whole: the text and JSON of `riskforge inspect`."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.reading.corpus import Corpus
from engine.data.reading.pairs import found_twins
from engine.data.reading.selected_pairs import pair_rows
from engine.data.reading.source import RunSource
from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import inspect_records
from engine.data.run.curated import KEY, find_curation
from engine.data.run.file_names import CURATION_DOCUMENT, MANIFEST, SUCCESS
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.notices import count_notices, known_notices
from engine.data.run.summary import (
    SUMMARY_COLUMNS,
    GroupSummary,
    class_texts,
    group_document,
    measured,
    summarise_table,
)
from engine.data.run.tar_index import TarReader, index_tars
from engine.data.run.twins_table import with_twins
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.columns import BY_NAME, Role, columns_with, stored_names
from engine.job.records import STARTS, TWINS
from engine.job.spec_messages import nearest

if TYPE_CHECKING:
    import pyarrow as pa

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_NEAREST = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is in the rows of a corpus.

    Attributes:
        document: everything as plain data.
        groups: medians per request and context; empty where rows lack their columns.
    """

    document: dict[str, Any]
    groups: list[GroupSummary]


def inspect(corpus: Corpus) -> Inspection:
    """Counts, classes, contexts, quantiles of scores, sizes and models of the rows that pass the corpus' filters.

    Raises:
        CorruptShardError: rows or the first image cannot be read.
    """
    table = corpus.to_table([name for name in SUMMARY_COLUMNS if name in corpus.columns])
    groups = summarise_table(table) if _has_summary(table) else []
    document = {
        "runs": [_description(source) for source in corpus.runs],
        "filter": " and ".join(f"({condition})" for condition in corpus.conditions),
        "rows": len(corpus),
        "samples": len(corpus.samples),
        "schema_versions": _counts(corpus, "schema_version"),
        "status": _counts(corpus, "status"),
        "accepted": len(corpus.filter("accepted")),
        "surplus": len(corpus.filter("surplus")),
        "classes": _class_counts(corpus),
        "contexts": _counts(corpus, "context"),
        "methods": _counts(corpus, "method"),
        "quantiles": quantiles(corpus),
        "groups": [group_document(group) for group in groups],
        "image": _first_image(corpus),
        **_pairs(corpus),
    }
    return Inspection(document=document, groups=groups)


def _has_summary(table: pa.Table) -> bool:
    """Whether rows have all that a summary needs; what came with later schema versions may be missing."""
    needed = stored_names(SUMMARY_COLUMNS, ())
    return set(needed) <= set(table.column_names) and not any(table[name].null_count for name in needed)


def quantiles(corpus: Corpus) -> dict[str, list[float]]:
    """The `QUANTILES` of each score over the scored rows; nothing where there are none."""
    import numpy as np

    names = [column.name for column in columns_with(Role.INSPECTED) if column.name in corpus.columns]
    scored = corpus.filter("scored").to_table(names) if names else None
    if scored is None or not len(scored):
        return {}
    columns = {name: measured(scored[name], BY_NAME[name]) for name in names}
    finite = {name: values[np.isfinite(values)] for name, values in columns.items()}
    return {
        name: [float(value) for value in np.quantile(values, QUANTILES)]
        for name, values in finite.items()
        if len(values)
    }


def _pairs(corpus: Corpus) -> dict[str, Any]:
    """How many samples have a start, and an unguided twin; nothing where none has."""
    runs = list(pair_rows(corpus.samples))
    counts = {kind: sum(pairs.count(kind) for pairs in runs) for kind in (STARTS, TWINS)}
    return {"pairs": counts} if any(counts.values()) else {}


def find_sample(corpus: Corpus, key: str) -> tuple[RunSource, dict[str, Any]]:
    """The row of a key, with the twin that an evaluation found for it, and its run.

    Raises:
        JobError: no run has it.
    """
    for number, source in enumerate(corpus.runs):
        table = corpus.filter(f"key == {key!r}", "--key").run_table(number)
        if len(table):
            rows = with_twins(table, found_twins(source)).to_pylist()
            return source, {name: value for name, value in rows[0].items() if value is not None}
    keys = corpus.to_table(["key"])["key"][:MAX_NEAREST].to_pylist()
    raise JobError(f"--key: no row has the key {key!r}{nearest(key, keys)}")


def read_image(source: RunSource, row: dict[str, Any]) -> tuple[bytes, str]:
    """The image file of a row, and its extension.

    Raises:
        JobError: none is stored.
        CorruptShardError: the tar that should have it is damaged.
    """
    if not row["sha256"]:
        raise JobError(f"--save: no image of '{row['key']}' is stored; its status is '{row['status']}'")
    place = index_tars(source.tars, [row["key"]])[row["key"]]
    return TarReader(source.tars).read(place.image), place.image_format


def read_second_image(corpus: Corpus, key: str, which: str) -> bytes:
    """The image file that a sample started from, or that of its unguided twin.

    Args:
        which: `start` or `twin`.

    Raises:
        JobError: the sample has none.
        CorruptShardError: the tar that should have it is damaged.
    """
    for pairs in pair_rows(corpus.filter(f"key == {key!r}", "--key").with_images(rejected=True, surplus=True)):
        with contextlib.closing(pairs):
            if (file := pairs.start(key) if which == "start" else pairs.twin(key)) is not None:
                return file.data
    raise JobError(f"--image: no {which} of '{key}' is stored")


def save_image(path: Path, data: bytes) -> None:
    """Write an image file that is not there yet.

    Raises:
        OutputError: something has its name, or it cannot be written.
    """
    if os.path.lexists(path):
        raise OutputError(f"--save: {path} is there already; choose another name")
    with explained(f"--save: {path}"), path.open("xb") as file:
        file.write(data)


def _description(source: RunSource) -> dict[str, Any]:
    models = source.models or source.known_models()
    files: dict[Store, list[str]] = defaultdict(list)
    for file in (*source.rows, *source.tars):
        files[file.store].append(file.name)
    return {
        "uri": source.uri,
        "name": source.name,
        "state": source.state,
        "digest": source.digest,
        "classes": len(source.labels),
        "shards": len(source.tars),
        "disk_bytes": sum(store.total_size() for store in _outermost(source.stores)),
        "data_bytes": sum(store.size_of(names) for store, names in files.items()),
        "notices": _notices(source.store),
        "models": {role: _without_labels(description) for role, description in models.items()},
        **_curation(source.store),
    }


def _curation(store: Store) -> dict[str, Any]:
    """How a run was curated; nothing where it was not."""
    curation = find_curation(store) if store.exists(CURATION_DOCUMENT) else None
    return {KEY: curation.to_document()} if curation else {}


def _notices(store: Store) -> list[dict[str, Any]]:
    """The notices of a run: of its manifest where it has ended, else of the commit records that can be read."""
    if store.exists(SUCCESS):
        return known_notices(read_manifest(store)) if store.exists(MANIFEST) else []
    records = (record for _, record in inspect_records(store) if isinstance(record, CommitRecord))
    return count_notices(record.notices for record in records)


def _without_labels(description: Any) -> Any:
    if not isinstance(description, dict):
        return description
    return {name: value for name, value in description.items() if name != "labels"}


def _outermost(stores: tuple[Store, ...]) -> list[Store]:
    """The stores that are inside none of the others, as rescored rows are inside their run."""
    places = [store.place for store in stores]
    return [
        store
        for store, place in zip(stores, places, strict=True)
        if not any(place != other and place.is_relative_to(other) for other in places)
    ]


def _counts(corpus: Corpus, column: str) -> dict[str, int]:
    """Rows by the values of a column, in the order of the values."""
    if column not in corpus.columns:
        return {}
    counts = Counter[Any]()
    for pair in corpus.to_table([column])[column].value_counts().to_pylist():
        counts[pair["values"]] += pair["counts"]
    known = {value: count for value, count in counts.items() if value is not None}
    return {str(value): known[value] for value in sorted(known)}


def _class_counts(corpus: Corpus) -> dict[str, int]:
    """Rows by class, in the order of labels."""
    table = corpus.to_table(["class_name", "class_index"])
    table = table.append_column("class", class_texts(table))
    rows = table.group_by(["class", "class_index"]).aggregate([([], "count_all")]).to_pylist()
    counts = Counter[str]()
    for row in sorted(rows, key=lambda row: (row["class_index"], row["class"])):
        counts[row["class"]] += row["count_all"]
    return dict(counts)


def _first_image(corpus: Corpus) -> dict[str, Any]:
    """Size and format of the first image that is stored."""
    from engine.data.images.decode import UnusableImageError, open_image

    stored = corpus.with_images(rejected=True, surplus=True)
    for number, source in enumerate(corpus.runs):
        rows = stored.run_table(number, ["key", "sha256", "status"])
        if not len(rows) or not source.tars:
            continue
        data, extension = read_image(source, rows.slice(0, 1).to_pylist()[0])
        try:
            with open_image(data) as image:
                size = {"width": image.width, "height": image.height}
        except UnusableImageError as error:
            raise CorruptShardError(f"{source.uri}: its first image cannot be decoded: it {error}") from None
        return size | {"format": extension, "bytes": len(data)}
    return {}
