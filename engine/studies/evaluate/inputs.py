"""The images that an evaluation reads: stored samples of the run, and labelled images of a source.

Evenly drawn and bounded in number; equal options draw equal images.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.data.images import LabelledImage, Unusable, UnusableImageError, decode_sample, nothing_usable, open_images
from engine.data.run.outcomes import target_errs
from engine.data.run.state import METADATA
from engine.data.stores.base import Store
from engine.driver.progress import Display
from engine.errors import CorruptShardError, JobError
from engine.job.records import STATUS_OK, STATUS_REJECTED
from engine.report.data import open_metadata
from engine.report.evaluation import (
    Source,
)
from engine.report.stored_images import find_images
from engine.studies.evaluate.image_features import ImageFeatures, VisionModels, draw_images
from engine.studies.evaluate.memorisation import source_of
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.samples import StudiedRun

if TYPE_CHECKING:
    import pyarrow as pa

# Real images for each sample of a request that may be asked for: classes are matched.
REAL_FACTOR = 2
_CHUNK = 256
_COLUMNS = [
    "key", "request", "class_index", "class_name", "context", "prompt", "status", "accepted", "is_error",
    "predicted_class", "risk", "kldb", "kldb_classes", "sha256",
]  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RunSamples:
    """Stored samples that were read: their pictures and, row by row, their metadata."""

    pictures: ImageFeatures
    records: tuple[dict[str, Any], ...]

    def rows(self, request: str, status: str = STATUS_OK) -> NDArray[np.int64]:
        """The rows of a request with a status."""
        chosen = [row for row, one in enumerate(self.records) if one["request"] == request and one["status"] == status]
        return np.array(chosen, dtype=np.int64)

    def flags(self, name: str) -> NDArray[np.bool_]:
        """A yes-or-no field of all."""
        return np.array([one[name] for one in self.records], dtype=bool)

    @property
    def target_errs(self) -> NDArray[np.bool_]:
        """Whether the target predicts a class that was not asked for, of all."""
        return np.array([target_errs(one) for one in self.records], dtype=bool)


def read_samples(
    run: StudiedRun, models: VisionModels, options: EvaluateOptions, display: Display
) -> tuple[RunSamples, int]:
    """At most so many images of each request and status, evenly drawn, and the number of attempts.

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
    kept: list[dict[str, Any]] = []

    def images() -> Iterator[tuple[str, int, PIL.Image.Image]]:
        for start in range(0, len(chosen), _CHUNK):
            part = dict(zip(chosen[start : start + _CHUNK], rows[start : start + _CHUNK], strict=True))
            found = find_images(run.store, run.job.name, {row: one["key"] for row, one in part.items()})
            display.advance(f"looking at samples: {start}/{len(chosen)}")
            for record in part.values():
                if record["key"] in found:
                    kept.append(record)
                    yield record["key"], record["class_index"], _decoded(run.store, record["key"], found[record["key"]])

    pictures = models.extract(images())
    if len(kept) < len(chosen):
        missing = len(chosen) - len(kept)
        raise CorruptShardError(
            f"{run.store.uri}: {missing} of {len(chosen)} images are not in their shards; `riskforge verify` says more"
        )
    if lines := left_out_lines(pictures):
        if not len(pictures):
            raise JobError([f"RUN: no image of '{run.store.uri}' can be looked at: {line}" for line in lines])
        for line in lines:
            display.notice(f"left out of the evaluation: {line}")
    gone = {key for key, _ in pictures.left_out}
    return RunSamples(pictures, tuple(record for record in kept if record["key"] not in gone)), table.num_rows


def left_out_lines(pictures: ImageFeatures) -> tuple[str, ...]:
    """How many images a model gives unusable values for, a line for each reason."""
    counts = Counter(reason for _, reason in pictures.left_out)
    total = len(pictures) + len(pictures.left_out)
    return tuple(f"{count} of {total} images: {reason}" for reason, count in counts.most_common())


def _choose(table: pa.Table, options: EvaluateOptions) -> list[int]:
    """Row numbers of images to read, in order; equal options choose equal rows.

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


def _decoded(store: Store, key: str, data: bytes) -> PIL.Image.Image:
    try:
        return decode_sample(data)
    except UnusableImageError as error:
        raise CorruptShardError(f"{store.uri}: the image of sample {key} {error}") from None


def read_real(
    options: EvaluateOptions, labels: tuple[str, ...], models: VisionModels, display: Display
) -> tuple[ImageFeatures, Source]:
    assert options.real is not None
    return _read_source(
        options.real, "--real", labels, models, display, limit=REAL_FACTOR * options.limit, seed=options.seed
    )


def _read_source(
    address: str, option: str, labels: tuple[str, ...], models: VisionModels, display: Display, *, limit: int, seed: int
) -> tuple[ImageFeatures, Source]:
    source, unusable = open_images(address, labels, option), list[Unusable]()

    def images() -> Iterator[tuple[str, int, PIL.Image.Image]]:
        for found in draw_images(source, limit, seed, lambda text: display.advance(f"looking at {option}: {text}")):
            if isinstance(found, LabelledImage):
                yield found.name, found.class_index, found.image
            else:
                unusable.append(found)

    pictures = models.extract(images())
    unusable += [Unusable(name, reason) for name, reason in pictures.left_out]
    if not len(pictures):
        raise JobError(nothing_usable(source, option, address, unusable))
    return pictures, source_of(address, source.kind, len(pictures), unusable)
