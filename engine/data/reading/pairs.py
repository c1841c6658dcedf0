"""Samples beside the images that they are compared with: the one that they started from, and their unguided twin.

A start lies under the sample's key in `starts/`, a twin in `twins/`; a twin that an evaluation found is a sample of the
run, which `twins.parquet` names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.data.images import decode_stored
from engine.data.reading.source import RunSource
from engine.data.run.companions import companion_name
from engine.data.run.shards import SHARDS
from engine.data.run.tar_index import SamplePlaces, TarReader, index_tars
from engine.data.run.twins_table import FoundTwins, read_twins, with_twins
from engine.data.stores.base import StoredFile
from engine.errors import CorruptShardError, JobError
from engine.job.columns import TWIN_COLUMNS
from engine.job.records import STARTS, TWINS

if TYPE_CHECKING:
    import PIL.Image
    import pyarrow as pa

# Where the images of a sample lie: its own, its start, its twin in `twins/`, its twin among the samples.
SAMPLE, START, TWIN, FOUND = "sample", STARTS, TWINS, "found"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """A sample and what it is compared with, of which it has at least one.

    Attributes:
        key: of the sample.
        image: the sample.
        twin: the same noise, condition and start without guidance.
        start: the real image that it started from, at the size of samples.
        record: the row of the sample; where an evaluation found its twin, with those columns.
    """

    key: str
    image: PIL.Image.Image
    twin: PIL.Image.Image | None
    start: PIL.Image.Image | None
    record: dict[str, Any]


class ImageFile(NamedTuple):
    """An image file, and its extension."""

    data: bytes
    image_format: str


class PairRows:
    """The rows of a run that have a start or a twin, and where their images are.

    Attributes:
        source: the run.
        table: `PAIR_COLUMNS` of these rows, with the twins that an evaluation found.

    Args:
        source: the run.
        rows: `PAIR_COLUMNS` of its samples.

    Raises:
        CorruptShardError: a tar or `twins.parquet` cannot be read, or an image that a row names is in no tar.
    """

    def __init__(self, source: RunSource, rows: pa.Table) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.source = source
        found = found_twins(source)
        merged = with_twins(rows, found)
        own = _filled(rows, "twin_key")
        is_stored = pa.scalar(not source.is_export)
        places = {
            START: pc.and_(_filled(rows, "start_key"), is_stored),
            TWIN: pc.and_(own, is_stored),
            FOUND: pc.and_not(_filled(merged, "twin_key"), own),
        }
        has_any = pc.or_(pc.or_(places[START], places[TWIN]), places[FOUND])
        self.table = merged.filter(has_any)
        self._keys: dict[str, dict[str, str]] = {}
        # A row has its own twin under its own key, and one that was found under that of another sample.
        for place, flags in (places | {SAMPLE: has_any}).items():
            chosen = merged.filter(flags)
            names = chosen["twin_key" if place == FOUND else "key"].to_pylist()
            self._keys[place] = dict(zip(chosen["key"].to_pylist(), names, strict=True))
        self._numbers = {key: number for number, key in enumerate(self._keys[SAMPLE])}
        self._index: dict[str, tuple[SamplePlaces, TarReader]] = {}

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def keys_of(self, *places: str) -> list[str]:
        """Keys of the samples that have an image of one of the places, such as `START`, sorted."""
        return sorted({key for place in places for key in self._keys[place]})

    def image(self, key: str) -> ImageFile:
        """The image of a sample."""
        file = self._read(SAMPLE, key)
        assert file is not None, "every row has an image"
        return file

    def start(self, key: str) -> ImageFile | None:
        """The image that a sample started from."""
        return self._read(START, key)

    def twin(self, key: str) -> ImageFile | None:
        """The unguided twin of a sample."""
        return self._read(TWIN, key) or self._read(FOUND, key)

    def decoded(self, key: str, what: str, file: ImageFile) -> PIL.Image.Image:
        """An image of a sample, decoded.

        Raises:
            CorruptShardError: it is none.
        """
        return decode_stored(file.data, f"{self.source.uri}: the {what} of {key!r}")

    def count(self, kind: str) -> int:
        """How many of the samples have a start, or a twin of either kind."""
        return len(self._keys[START]) if kind == START else len(self._keys[TWIN]) + len(self._keys[FOUND])

    def twin_fields(self, key: str) -> dict[str, Any]:
        """What a row has of its twin, by column."""
        number = self._numbers[key]
        return {name: self.table[name][number].as_py() for name in TWIN_COLUMNS}

    def close(self) -> None:
        """Close the tars."""
        for _, reader in self._index.values():
            reader.close()

    def _read(self, place: str, key: str) -> ImageFile | None:
        name = self._keys[place].get(key)
        if name is None:
            return None
        places, reader = self._indexed(place)
        found = places[name]
        return ImageFile(reader.read(found.image), found.image_format)

    def _indexed(self, place: str) -> tuple[SamplePlaces, TarReader]:
        """Where the images of a place are, found when the first of them is asked for."""
        if place not in self._index:
            tars = _companions(self.source, place) if place in (START, TWIN) else list(self.source.tars)
            if not tars:
                key = next(iter(self._keys[place]))
                raise CorruptShardError(
                    f"{self.source.uri}: has no tar in {place}/, but its rows name images there, such as that of"
                    f" {key!r}; `riskforge verify` reports what is damaged"
                )
            self._index[place] = index_tars(tars, self._keys[place].values()), TarReader(tars)
        return self._index[place]


def read_pairs(runs: Sequence[tuple[PairRows, Iterable[pa.Table]]], num_selected: int) -> Iterator[Pair]:
    """The samples of some runs that have a start or a twin, with their images, in the order of the runs and their rows.

    Args:
        runs: each with all of its selected rows, some at a time.
        num_selected: samples among which they are.

    Raises:
        JobError: there is none.
        CorruptShardError: an image is missing or damaged.
    """
    check_any([pairs for pairs, _ in runs], sum(len(pairs) for pairs, _ in runs), num_selected)
    return (pair for pairs, tables in runs for pair in _read(pairs, tables))


def check_any(runs: Sequence[PairRows], num_pairs: int, num_selected: int) -> None:
    """Check that some of the selected samples of some runs have a pair.

    Raises:
        JobError: none has.
    """
    if num_pairs:
        return
    remedy = (
        "make them with `start` or `twin: true` in their request, or let `riskforge evaluate` find twins among requests"
        " of one seed_group"
    )
    if exports := [pairs.source.uri for pairs in runs if pairs.source.is_export]:
        remedy = f"{exports[0]} is an export, which keeps no second images: give the runs that it was made of"
    raise JobError(f"RUN: none of the {num_selected} selected samples has a start or an unguided twin; {remedy}")


def _read(pairs: PairRows, tables: Iterable[pa.Table]) -> Iterator[Pair]:
    rows = (row for table in tables for row in table.to_pylist() if row["key"] in pairs)
    with contextlib.closing(pairs):
        for row in rows:
            key, start, twin = row["key"], pairs.start(row["key"]), pairs.twin(row["key"])
            # What a run of an earlier schema version lacks is left out.
            record = {name: value for name, value in row.items() if value is not None} | pairs.twin_fields(key)
            yield Pair(
                key=key,
                image=pairs.decoded(key, "image", pairs.image(key)),
                twin=None if twin is None else pairs.decoded(key, "twin", twin),
                start=None if start is None else pairs.decoded(key, "start", start),
                record=record,
            )


def _companions(source: RunSource, kind: str) -> list[StoredFile]:
    """The tars of starts or twins beside those of the samples, as far as they are there."""
    files = []
    for store in dict.fromkeys(tar.store for tar in source.tars):
        there = set(store.list(kind))
        stems = [tar.name.removeprefix(f"{SHARDS}/").removesuffix(".tar") for tar in source.tars if tar.store is store]
        files += [StoredFile(store, name) for stem in stems if (name := companion_name(kind, stem)) in there]
    return files


def found_twins(source: RunSource) -> FoundTwins | None:
    """The twins that an evaluation found; none of a rescored run, as their scores are those before.

    Raises:
        CorruptShardError: the file cannot be read.
    """
    return None if source.is_rescored or not source.digest else read_twins(source.store, source.digest)


def _filled(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """For each row whether a column of texts has one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.not_equal(pc.coalesce(rows[name], pa.scalar("")), "")
