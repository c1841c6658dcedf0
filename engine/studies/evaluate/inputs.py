"""The images that an evaluation reads: stored samples of the run, and labelled images of a source.

Evenly drawn and bounded in number; equal options draw equal images.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.data.images import (
    ImageSource,
    LabelledImage,
    ReadResult,
    Unusable,
    decode_stored,
    nothing_usable,
    open_images,
)
from engine.data.run.file_names import METADATA
from engine.data.run.outcomes import target_errs
from engine.driver.progress import Display
from engine.errors import CorruptShardError, JobError
from engine.job.records import STATUS_OK, STATUS_REJECTED
from engine.report.data import open_metadata
from engine.report.evaluation import Source
from engine.report.stored_images import find_images
from engine.report.text import clip as clipped
from engine.studies.evaluate.image_features import ImageFeatures, VisionModels
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.samples import StudiedRun

if TYPE_CHECKING:
    import pyarrow as pa

# Real images for each sample of a request that may be asked for: classes are matched.
REAL_FACTOR = 2
MAX_UNUSABLE = 20
_CHUNK = 256
_COLUMNS = [
    "key", "request", "class_index", "class_name", "context", "prompt", "status", "accepted", "is_error",
    "predicted_class", "risk", "kldb", "kldb_classes", "sha256",
]  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class StudiedSamples:
    """N stored samples that were read.

    Attributes:
        images: their features.
        records: their metadata, row by row.
    """

    images: ImageFeatures
    records: tuple[dict[str, Any], ...]

    def rows(self, request: str, status: str = STATUS_OK) -> NDArray[np.int64]:
        """The rows of a request with a status."""
        wanted = (request, status)
        rows = [row for row, record in enumerate(self.records) if (record["request"], record["status"]) == wanted]
        return np.array(rows, dtype=np.int64)

    def flags(self, name: str) -> NDArray[np.bool_]:
        """A boolean column, [N]."""
        return np.array([record[name] for record in self.records], dtype=bool)

    @property
    def target_errs(self) -> NDArray[np.bool_]:
        """Whether the target predicts a class that was not asked for, [N]."""
        return np.array([target_errs(record) for record in self.records], dtype=bool)


def read_samples(
    run: StudiedRun, models: VisionModels, options: EvaluateOptions, display: Display
) -> tuple[StudiedSamples, int]:
    """At most `options.limit` images of each request and status, evenly drawn, and the number of attempts.

    Raises:
        JobError: the run has no stored image.
        CorruptShardError: an image is not where the metadata says.
    """
    import pyarrow as pa

    metadata = open_metadata(run.store.fetch(METADATA, keep=True))
    table = metadata.to_table(columns=["request", "status", "sha256"])
    chosen = _choose(table, options)
    if not chosen:
        raise JobError(f"RUN: '{run.store.uri}' has no stored image to look at")
    rows = metadata.take(pa.array(chosen, pa.int64()), columns=_COLUMNS).to_pylist()
    read: list[dict[str, Any]] = []
    features = models.extract(_stored_images(run, dict(zip(chosen, rows, strict=True)), read, display))
    if len(read) < len(rows):
        missing = len(rows) - len(read)
        raise CorruptShardError(
            f"{run.store.uri}: {missing} of {len(rows)} images are not in their shards; `riskforge verify` says more"
        )
    _note_left_out(run, features, display)
    gone = {key for key, _ in features.left_out}
    return StudiedSamples(features, tuple(record for record in read if record["key"] not in gone)), table.num_rows


def _stored_images(
    run: StudiedRun, records: dict[int, dict[str, Any]], read: list[dict[str, Any]], display: Display
) -> Iterator[tuple[str, int, PIL.Image.Image]]:
    """Key, class and image of stored samples, whose records are given by row number.

    Records of which the image is there are added to `read`.
    """
    items = list(records.items())
    for start in range(0, len(items), _CHUNK):
        part = items[start : start + _CHUNK]
        files = find_images(run.store, run.job.name, {row: record["key"] for row, record in part})
        display.advance(f"embedding samples: {start}/{len(items)}")
        for _, record in part:
            if (key := record["key"]) in files:
                read.append(record)
                image = decode_stored(files[key], f"{run.store.uri}: the image of sample {key}")
                yield key, record["class_index"], image


def _note_left_out(run: StudiedRun, features: ImageFeatures, display: Display) -> None:
    """Notify the user of images that are left out.

    Raises:
        JobError: no image is left.
    """
    lines = left_out_lines(features)
    if lines and not len(features):
        raise JobError([f"RUN: no image of '{run.store.uri}' can be looked at: {line}" for line in lines])
    for line in lines:
        display.notice(f"left out of the evaluation: {line}")


def left_out_lines(images: ImageFeatures) -> tuple[str, ...]:
    """For how many images a model gives unusable values, a line for each reason."""
    counts = Counter(reason for _, reason in images.left_out)
    total = len(images) + len(images.left_out)
    return tuple(f"{count} of {total} images: {reason}" for reason, count in counts.most_common())


def _choose(table: pa.Table, options: EvaluateOptions) -> list[int]:
    """Row numbers of the images to read, in order; equal options choose equal rows.

    Args:
        table: requests, statuses and checksums of the images, which are empty where none is stored.
    """
    import pyarrow.compute as pc

    has_image = pc.not_equal(table["sha256"], "").to_numpy()
    chosen: list[int] = []
    for request in table["request"].unique().to_pylist():
        is_here = pc.equal(table["request"], request).to_numpy() & has_image
        for status in (STATUS_OK, STATUS_REJECTED):
            rows = np.flatnonzero(is_here & pc.equal(table["status"], status).to_numpy())
            if len(rows) > options.limit:
                rng = np.random.default_rng([options.seed, zlib.crc32(f"{request} {status}".encode())])
                rows = rng.choice(rows, options.limit, replace=False)
            chosen += rows.tolist()
    return sorted(chosen)


def read_real(
    options: EvaluateOptions, labels: tuple[str, ...], models: VisionModels, display: Display
) -> tuple[ImageFeatures, Source]:
    """Features of real images, at most `REAL_FACTOR` times `options.limit`, and where they came from.

    Raises:
        JobError: no image can be used.
    """
    assert options.real is not None
    return _read_source(
        options.real, "--real", labels, models, display, limit=REAL_FACTOR * options.limit, seed=options.seed
    )


def _read_source(
    address: str, option: str, labels: tuple[str, ...], models: VisionModels, display: Display, *, limit: int, seed: int
) -> tuple[ImageFeatures, Source]:
    source, unusable = open_images(address, labels, option), list[Unusable]()

    def images() -> Iterator[tuple[str, int, PIL.Image.Image]]:
        for item in draw_images(source, limit, seed, lambda text: display.advance(f"embedding {option}: {text}")):
            if isinstance(item, LabelledImage):
                yield item.name, item.class_index, item.image
            else:
                unusable.append(item)

    features = models.extract(images())
    unusable += [Unusable(name, reason) for name, reason in features.left_out]
    if not len(features):
        raise JobError(nothing_usable(source, option, address, unusable))
    return features, source_of(address, source.kind, len(features), unusable)


def source_of(address: str, kind: str, num_images: int, unusable: Sequence[Unusable]) -> Source:
    """The record of a source: how many images were used, and the first of those that could not be."""
    shown = tuple(clipped(f"{item.name}: {item.reason}", 400) for item in unusable[:MAX_UNUSABLE])
    return Source(address=address, kind=kind, num_images=num_images, num_unusable=len(unusable), unusable=shown)


def count_items(source: ImageSource) -> int:
    """How many items a source has, without decoding them."""
    if source.num_images is not None:
        return source.num_images
    return sum(1 for file in source.files for _ in file())


def draw_images(source: ImageSource, limit: int, seed: int, advance: Callable[[str], None]) -> Iterator[ReadResult]:
    """At most `limit` items of a source, drawn evenly, in order; the others are not decoded."""
    num = count_items(source)
    wanted = set(np.random.default_rng(seed).choice(num, limit, replace=False).tolist() if num > limit else range(num))
    done = 0
    for number, item in enumerate(itertools.chain.from_iterable(file() for file in source.files)):
        if number in wanted:
            done += 1
            advance(f"{done}/{len(wanted)}")
            yield item()
