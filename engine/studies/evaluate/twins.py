"""Unguided twins found among a run's own samples: what a request's `twin: true` would have recorded.

A sample of an unguided request is the twin of a guided one where both began from the same noise and start, under the
same prompt, model, conditioning and sampling: guidance alone makes the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import PIL.Image

from engine.data.images.decode import decode_stored
from engine.data.run.file_names import METADATA
from engine.data.run.outcomes import scored_rows
from engine.data.run.twins_table import FoundTwins, twins_table
from engine.driver.progress import Display
from engine.errors import CorruptShardError
from engine.generation.pairs import distances, twin_fields
from engine.job.columns import UNKNOWN, stored_names
from engine.job.partners import unguided_partners
from engine.models.clip import Clip
from engine.report.data import open_metadata
from engine.report.stored_images import find_images
from engine.studies.samples import StudiedRun

_COLUMNS = (
    "key", "request", "method", "seed", "prompt", "start_sha256", "twin_key", "status", "scored", "sha256",
    "predicted_class", "risk",
)  # fmt: skip
# Pairs whose images are in memory at a time.
_BATCH = 32

Row = dict[str, Any]
Pair = tuple[Row, Row]


def find_twins(run: StudiedRun, clip: Clip, display: Display) -> FoundTwins | None:
    """The twins of all guided samples that have none of their own; None where no request can have any.

    Args:
        clip: measures the distances.

    Raises:
        CorruptShardError: an image is not where the metadata says, or cannot be read.
    """
    partners = unguided_partners(run.job.model_dump(mode="json", exclude_none=True))
    if not partners:
        return None
    table, num_attempts = _rows(run, {name for guided, plain in partners.items() for name in (guided, *plain)})
    pairs = [pair for guided, plain in partners.items() for pair in _pairs(table, guided, plain)]
    rows = []
    display.phase("comparing samples with their unguided twins")
    for start in range(0, len(pairs), _BATCH):
        display.advance(f"comparing twins: {start}/{len(pairs)}")
        rows += list(_measured(run, pairs[start : start + _BATCH], clip))
    return FoundTwins(rows=twins_table(rows), plan_digest=run.plan_digest, num_attempts=num_attempts, clip=clip.name)


def _rows(run: StudiedRun, requests: set[str]) -> tuple[list[Row], int]:
    """The rows with an image of some requests, each with its number in the metadata, and the number of all rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    metadata = open_metadata(run.store.fetch(METADATA, keep=True))
    whole: pa.Table = metadata.to_table(columns=stored_names(_COLUMNS, metadata.schema.names))
    is_scored = scored_rows(whole)
    names = pa.array(sorted(requests), pa.string())
    wanted = pc.and_(pc.is_in(whole["request"], value_set=names), pc.not_equal(whole["sha256"], ""))
    numbers = wanted.to_numpy().nonzero()[0]
    rows = whole.take(numbers).to_pylist()
    return [
        {"start_sha256": "", "twin_key": ""} | row | {"row": int(number), "scored": bool(is_scored[number])}
        for row, number in zip(rows, numbers, strict=True)
    ], whole.num_rows


def _pairs(rows: list[Row], guided: str, plain: list[str]) -> Iterator[Pair]:
    """Each sample of a request without a twin of its own, with its twin in other requests."""

    def identity(row: Row) -> tuple[int, str, str]:
        return row["seed"], row["prompt"], row["start_sha256"]

    twins = {identity(row): row for row in rows if row["request"] in plain and row["scored"]}
    for row in rows:
        if row["request"] == guided and not row["twin_key"] and (twin := twins.get(identity(row))):
            yield row, twin


def _measured(run: StudiedRun, pairs: list[Pair], clip: Clip) -> Iterator[Row]:
    """What the columns of twins have of some pairs; nothing of a pair whose distance is not finite."""
    samples, twins = _images(run, [row for row, _ in pairs]), _images(run, [twin for _, twin in pairs])
    apart = distances(clip.image_embeds(samples), clip.image_embeds(twins))
    for (row, twin), sample, twin_image, distance in zip(pairs, samples, twins, apart, strict=True):
        if sample.size != twin_image.size:
            raise CorruptShardError(
                f"{run.store.uri}: the images of {row['key']} and its twin {twin['key']} have different sizes;"
                " `riskforge verify` reports what is damaged"
            )
        if distance != UNKNOWN:
            yield {"key": row["key"]} | twin_fields(sample, distance, twin_image, twin)


def _images(run: StudiedRun, rows: list[Row]) -> list[PIL.Image.Image]:
    """The images of rows.

    Raises:
        CorruptShardError: one is not there, or cannot be decoded.
    """
    files = find_images(run.store, run.job.name, {row["row"]: row["key"] for row in rows})
    if missing := [row["key"] for row in rows if row["key"] not in files]:
        raise CorruptShardError(
            f"{run.store.uri}: the image of sample {missing[0]} is not in its shard; `riskforge verify` says more"
        )
    return [decode_stored(files[row["key"]], f"{run.store.uri}: the image of sample {row['key']}") for row in rows]
