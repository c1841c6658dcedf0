"""A `webdataset` pipeline of the selected samples: all tars are streamed, what is not selected is passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.data.images.decode import MAX_SAMPLE_PIXELS, UnusableImageError, open_image
from engine.data.run.shards import IMAGE_FORMATS, record_json
from engine.data.run.tar_index import RECORD
from engine.data.stores.base import StoredFile
from engine.errors import CorruptShardError
from engine.job.records import columns_of

if TYPE_CHECKING:
    from engine.data.reading.corpus import Corpus


@dataclass(frozen=True, slots=True)
class Selection:
    """Which samples of which tar are wanted; goes to the workers of a loader with the pipeline.

    Attributes:
        keys: by tar, the keys of its run that are selected.
        records: by tar, the records to give in the place of those in the tar, by key; of runs scored anew alone.
    """

    keys: dict[str, frozenset[str]]
    records: dict[str, dict[str, bytes]]

    def wants(self, sample: dict[str, Any]) -> bool:
        """Whether a sample of the pipeline is selected."""
        return sample["__key__"] in self.keys[sample["__url__"]]

    def renew(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A sample with its record as the rows have it."""
        own = self.records.get(sample["__url__"])
        return sample if own is None else sample | {RECORD: own[sample["__key__"]]}


def make_pipeline(corpus: Corpus, decode: str | None, options: dict[str, Any]) -> Any:
    """The pipeline over a corpus of samples of runs without a common tar; see `Corpus.to_webdataset`."""
    import webdataset

    keys: dict[str, frozenset[str]] = {}
    files: dict[str, StoredFile] = {}
    records: dict[str, dict[str, bytes]] = {}
    for number, source in enumerate(corpus.runs):
        chosen = frozenset(corpus.run_table(number, ["key"])["key"].to_pylist())
        if not chosen:
            continue
        keys.update(dict.fromkeys(map(str, source.tars), chosen))
        files |= {str(tar): tar for tar in source.tars}
        if source.is_rescored:
            records.update(dict.fromkeys(map(str, source.tars), _records(corpus, number)))
    selection = Selection(keys, records)
    options = {"shardshuffle": False, "empty_check": False} | options
    dataset = webdataset.WebDataset(list(keys), **options)
    dataset.pipeline = [_opening(stage, files) for stage in dataset.pipeline]
    pipeline = dataset.select(selection.wants).map(selection.renew)
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
    """The stage of a pipeline that opens tars, which are fetched first where they lie on an object store.

    That of webdataset takes a path for a URL: it stops at a `#` or `?`, runs what follows `pipe:`, asks servers.

    Attributes:
        files: by address.
        handler: is asked whether to go on after an error.
    """

    files: dict[str, StoredFile]
    handler: Callable[[Exception], bool]

    def __call__(self, urls: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for one in urls:
            try:
                path = self.files[one["url"]].fetch()
                yield {"url": one["url"], "stream": path.open("rb"), "local_path": str(path)}
            except Exception as error:
                if not self.handler(error):
                    return


def _opening(stage: Any, files: dict[str, StoredFile]) -> Any:
    from webdataset.cache import FileCache, StreamingOpen

    return Opener(files, stage.handler) if isinstance(stage, (StreamingOpen, FileCache)) else stage


def _records(corpus: Corpus, number: int) -> dict[str, bytes]:
    return {row["key"]: record_json(as_record(row)) for row in corpus.run_table(number).to_pylist()}


def as_record(row: dict[str, Any]) -> dict[str, Any]:
    """The record of a row of its own schema version; what that version has and the row lacks is left out."""
    return {name: row[name] for name in columns_of(row["schema_version"]) if row.get(name) is not None}
