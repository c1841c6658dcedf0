"""The samples that an export takes, with their keys and order; and reading them one by one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from engine.data.run.schema import check_run_fields
from engine.data.run.shards import is_key
from engine.data.run.tar_index import SamplePlace, SamplePlaces, TarReader, index_tars
from engine.errors import CorruptShardError, JobError
from engine.job.columns import RUN_COLUMNS
from engine.job.records import REAL, SampleResult, check_record, upgraded

if TYPE_CHECKING:
    import PIL.Image
    import pyarrow as pa

    from engine.data.reading.corpus import Corpus


class Chosen(NamedTuple):
    """A sample that is taken.

    Attributes:
        key: its key in the export; differs from that in its run where that was taken.
        run, row: the number of its run, and of its row among the selected rows of that run.
        is_real: whether it is a real image, which an earlier export mixed in.
    """

    key: str
    run: int
    row: int
    class_index: int
    is_real: bool = False


@dataclass(slots=True)
class Selection:
    """The samples of an export, in the order of runs and rows.

    Attributes:
        identical: samples left out because an earlier run has the same image under the same key.
        prefixes: by the number of a run, what was put before its keys as they were taken already.
        clashes: by the number of such a run, how many of its keys were taken, and the first of these.
        spare: samples beyond their quota, which may take the place of others; in the same order.
    """

    samples: list[Chosen] = field(default_factory=list)
    identical: Counter[int] = field(default_factory=Counter)
    prefixes: dict[int, str] = field(default_factory=dict)
    clashes: dict[int, tuple[int, str]] = field(default_factory=dict)
    spare: list[Chosen] = field(default_factory=list)


def select(corpus: Corpus, *, spares_surplus: bool = False) -> Selection:
    """The samples of a corpus under keys that are unique.

    Args:
        spares_surplus: whether samples beyond their quota are spare ones, and no samples.

    Raises:
        JobError: a key that cannot be a file's name, or that is taken even with a prefix.
    """
    taken: dict[str, str] = {}
    # Samples of earlier runs by original key: a third run may share samples that the second had under taken keys.
    seen: set[tuple[str, str]] = set()
    # Spare ones likewise, until a run has them as samples.
    spare: dict[tuple[str, str], Chosen] = {}
    chosen = Selection()
    last = len(corpus.runs) - 1
    for number, source in enumerate(corpus.runs):
        columns = corpus.run_table(number, ["key", "sha256", "class_index"]).to_pydict()
        pairs = list(zip(columns["key"], columns["sha256"], strict=True))
        real = _flags(corpus, number, "method", REAL)
        surplus = _flags(corpus, number, "surplus", True) if spares_surplus else [False] * len(pairs)
        clashes = [key for key, sha in pairs if taken.get(key, sha) != sha and (key, sha) not in seen]
        prefix = f"r{number + 1}-" if clashes else ""
        if prefix:
            chosen.prefixes[number] = prefix
            chosen.clashes[number] = len(clashes), clashes[0]
        run_keys: dict[str, str] = {}
        for row, (pair, class_index) in enumerate(zip(pairs, columns["class_index"], strict=True)):
            if pair in seen:
                chosen.identical[number] += not surplus[row]
                continue
            name = prefix + pair[0]
            _check_key(name, source.uri, is_taken=name in run_keys or (name in taken and pair not in spare))
            run_keys[name] = pair[1]
            sample = Chosen(name, number, row, class_index, real[row])
            if surplus[row]:
                spare.setdefault(pair, sample)
            else:
                spare.pop(pair, None)
                chosen.samples.append(sample)
        # Of the last run nothing need be remembered, and there may be millions of rows.
        if number < last:
            taken |= run_keys
            seen.update(pair for pair, is_spare in zip(pairs, surplus, strict=True) if not is_spare)
    chosen.spare = list(spare.values())
    return chosen


def _flags(corpus: Corpus, number: int, column: str, value: object) -> list[bool]:
    """For each row of a run whether a column has a value; of a column that is not there it has none."""
    if column not in corpus.columns:
        return [False] * corpus.run_table(number, ["key"]).num_rows
    return [entry == value for entry in corpus.run_table(number, [column])[column].to_pylist()]


def _check_key(key: str, uri: str, *, is_taken: bool) -> None:
    if not is_key(key):
        raise JobError(f"RUN: '{uri}' has the key {key[:100]!r}, which is not of a-z, 0-9 and hyphens, at most 90")
    if is_taken:
        raise JobError(f"RUN: two samples have the key '{key}', one of them in '{uri}'; take that run alone")


def shuffled(keys: Iterable[str], seed: int) -> list[int]:
    """Numbers of the keys in an order drawn by the seed; the relative order of two keys depends on no third."""
    digests = [hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest() for key in keys]
    return sorted(range(len(digests)), key=digests.__getitem__)


class SampleReader:
    """Reads the samples of a selection, in any order.

    Raises:
        CorruptShardError: a tar is missing, torn, or lacks a sample of the rows.
    """

    def __init__(self, corpus: Corpus, selection: Selection) -> None:
        self._corpus = corpus
        self._readers = [TarReader(source.tars) for source in corpus.runs]
        self._tables = [_rows(corpus, number) for number in range(len(corpus.runs))]
        self._keys = [table["key"].to_pylist() for table in self._tables]
        wanted: list[list[str]] = [[] for _ in corpus.runs]
        for sample in (*selection.samples, *selection.spare):
            wanted[sample.run].append(self._keys[sample.run][sample.row])
        self._places = [
            index_tars(source.tars, keys) if keys else SamplePlaces(())
            for source, keys in zip(corpus.runs, wanted, strict=True)
        ]

    @property
    def image_formats(self) -> list[str]:
        """Extensions of the images, sorted."""
        return sorted(frozenset[str]().union(*(places.image_formats for places in self._places)))

    def format_of(self, sample: Chosen) -> str:
        """Extension of a sample's image."""
        return self._place(sample).image_format

    def read(self, sample: Chosen) -> SampleResult:
        """A sample with its image and its record in the present schema version, under its new key.

        Raises:
            CorruptShardError: the image has another checksum than its row, or the record cannot be read.
        """
        row = self._tables[sample.run].slice(sample.row, 1).to_pylist()[0]
        image = self._readers[sample.run].read(self._place(sample).image)
        if hashlib.sha256(image).hexdigest() != row["sha256"]:
            self._damaged(sample, f"the image of {row['key']} is not the one of its row (checksum)")
        record = upgraded(row if self._corpus.runs[sample.run].is_rescored else self._record(sample))
        record["key"] = sample.key
        known = {column.name: column.empty for column in RUN_COLUMNS if column.name != "sha256"}
        run = {name: empty if row.get(name) is None else row[name] for name, empty in known.items()}
        try:
            check_record(record)
            check_run_fields(run)
        except ValueError as error:
            self._damaged(sample, str(error))
        return SampleResult(record=record, image=image, run=run)

    def images(self, samples: Iterable[Chosen]) -> Iterator[PIL.Image.Image]:
        """The images, decoded.

        Raises:
            CorruptShardError: one cannot be decoded.
        """
        from engine.data.images import UnusableImageError, decode_sample

        for sample in samples:
            try:
                yield decode_sample(self._readers[sample.run].read(self._place(sample).image))
            except UnusableImageError as error:
                self._damaged(sample, f"the image of {self._keys[sample.run][sample.row]} {error}")

    def close(self) -> None:
        """Close the tars."""
        for reader in self._readers:
            reader.close()

    def _place(self, sample: Chosen) -> SamplePlace:
        return self._places[sample.run][self._keys[sample.run][sample.row]]

    def _record(self, sample: Chosen) -> dict[str, Any]:
        try:
            record = json.loads(self._readers[sample.run].read(self._place(sample).record))
        except (ValueError, RecursionError) as error:
            self._damaged(sample, f"the record of {sample.key} cannot be read ({error})")
        if not isinstance(record, dict):
            self._damaged(sample, f"the record of {sample.key} is not a JSON object")
        return record

    def _damaged(self, sample: Chosen, what: str) -> NoReturn:
        remedy = "`riskforge verify` reports what is damaged"
        raise CorruptShardError(f"{self._corpus.runs[sample.run].uri}: {what}; {remedy}") from None


def _rows(corpus: Corpus, number: int) -> pa.Table:
    """The columns of the rows that the tars do not hold; all of them for a rescored run."""
    present = set(corpus.columns)
    columns = [name for name in ("key", *(column.name for column in RUN_COLUMNS)) if name in present]
    return corpus.run_table(number, None if corpus.runs[number].is_rescored else columns).combine_chunks()
