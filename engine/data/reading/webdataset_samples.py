"""A `webdataset` pipeline of the selected samples: all tars are streamed, other samples are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.data.images.decode import MAX_SAMPLE_PIXELS, UnusableImageError, open_image
from engine.data.run.shard_writing import record_json
from engine.data.run.shards import IMAGE_FORMATS
from engine.data.run.tar_index import RECORD
from engine.data.stores.base import StoredFile
from engine.errors import CorruptShardError
from engine.job.records import columns_of


class RunSelection(NamedTuple):
    """The selected samples of one run.

    Attributes:
        tars: those of the run.
        keys: of the selected samples.
        rows: their whole rows where the tars hold older records, as of a run that was rescored; else None.
    """

    tars: Sequence[StoredFile]
    keys: frozenset[str]
    rows: Sequence[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """Selects samples of the pipeline and replaces outdated records; is pickled into the workers of a loader.

    Attributes:
        keys: by tar, the selected keys of its run.
        records: by tar, the records that replace those in the tar, by key; for rescored runs only.
    """

    keys: dict[str, frozenset[str]]
    records: dict[str, dict[str, bytes]]

    def wants(self, sample: dict[str, Any]) -> bool:
        """Whether a sample of the pipeline is selected."""
        return sample["__key__"] in self.keys[sample["__url__"]]

    def update(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample with its record as the rows have it."""
        records = self.records.get(sample["__url__"])
        return sample if records is None else sample | {RECORD: records[sample["__key__"]]}


def make_pipeline(runs: Sequence[RunSelection], decode: str | None, options: dict[str, Any]) -> Any:
    """The pipeline over the selected samples of runs without a common tar; see `Corpus.to_webdataset`."""
    import webdataset

    keys: dict[str, frozenset[str]] = {}
    files: dict[str, StoredFile] = {}
    records: dict[str, dict[str, bytes]] = {}
    for run in runs:
        if not run.keys:
            continue
        run_files = {str(tar): tar for tar in run.tars}
        files |= run_files
        keys |= dict.fromkeys(run_files, run.keys)
        if run.rows is not None:
            run_records = {row["key"]: record_json(as_record(row)) for row in run.rows}
            records |= dict.fromkeys(run_files, run_records)
    samples = SampleFilter(keys, records)
    options = {"shardshuffle": False, "empty_check": False} | options
    dataset = webdataset.WebDataset(list(keys), **options)
    dataset.pipeline = [_opening(stage, files) for stage in dataset.pipeline]
    pipeline = dataset.select(samples.wants).map(samples.update)
    return pipeline if decode is None else pipeline.map(check_image).decode(decode)


def check_image(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of the pipeline, checked before `webdataset` opens its image with any decoder that Pillow has.

    Raises:
        CorruptShardError: the image is of another format, or too large.
    """
    for extension in IMAGE_FORMATS:
        if extension in sample:
            try:
                with open_image(sample[extension], max_pixels=MAX_SAMPLE_PIXELS):
                    pass
            except UnusableImageError as error:
                raise CorruptShardError(f"{sample['__url__']}: the image of {sample['__key__']!r} {error}") from None
    return sample


@dataclass(frozen=True, slots=True)
class Opener:
    """The stage of a pipeline that opens tars, which are fetched first where they are on an object store.

    That of webdataset treats a path as a URL: it stops at a `#` or `?`, runs what follows `pipe:`, queries servers.

    Attributes:
        files: by address.
        handler: decides whether to continue after an error.
    """

    files: dict[str, StoredFile]
    handler: Callable[[Exception], bool]

    def __call__(self, urls: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for source in urls:
            try:
                path = self.files[source["url"]].fetch()
                yield {"url": source["url"], "stream": path.open("rb"), "local_path": str(path)}
            except Exception as error:
                if not self.handler(error):
                    return


def _opening(stage: Any, files: dict[str, StoredFile]) -> Any:
    from webdataset.cache import FileCache, StreamingOpen

    return Opener(files, stage.handler) if isinstance(stage, (StreamingOpen, FileCache)) else stage


def as_record(row: dict[str, Any]) -> dict[str, Any]:
    """The record of a row of its own schema version; what that version has and the row lacks is left out."""
    return {name: row[name] for name in columns_of(row["schema_version"]) if row.get(name) is not None}
