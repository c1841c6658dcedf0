"""Memorisation in an evaluation: the nearest training images, request by request, and the nearest pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from engine.data.images import LabelledImage, Unusable, nothing_usable, open_images
from engine.driver.progress import Display
from engine.errors import JobError
from engine.report.evaluation import (
    Copies,
    Memorisation,
    Pair,
    Source,
    Thresholds,
)
from engine.report.text import clip as clipped
from engine.studies.evaluate.image_features import ImageFeatures, VisionModels
from engine.studies.evaluate.image_registry import ImageRegistry
from engine.studies.evaluate.inputs import RunSamples
from engine.studies.evaluate.nearest_images import NearestImages, find_nearest, order_by_nearness, thresholds_of
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.quality import interval_of
from engine.studies.intervals import wilson_interval

if TYPE_CHECKING:
    pass

MAX_PAIRS = 12
MAX_UNUSABLE = 20


def source_of(address: str, kind: str, num_images: int, unusable: Sequence[Unusable]) -> Source:
    shown = tuple(clipped(f"{one.name}: {one.reason}", 400) for one in unusable[:MAX_UNUSABLE])
    return Source(address=address, kind=kind, num_images=num_images, num_unusable=len(unusable), unusable=shown)


def memorisation(
    samples: RunSamples, real: ImageFeatures | None, names: Sequence[str], labels: tuple[str, ...], models: VisionModels,
    options: EvaluateOptions, registry: ImageRegistry, display: Display,
) -> Memorisation | None:  # fmt: skip
    if options.train is None:
        return None
    source, unusable, num_images = open_images(options.train, labels, "--train"), list[Unusable](), 0

    def training() -> Iterator[tuple[str, PIL.Image.Image]]:
        nonlocal num_images
        for found in source.read():
            if isinstance(found, LabelledImage):
                num_images += 1
                of = f"/{source.num_images}" if source.num_images else ""
                display.advance(f"looking at --train: {num_images}{of}")
                yield found.name, found.image
            else:
                unusable.append(found)

    def leave_out(name: str, reason: str) -> None:
        nonlocal num_images
        num_images -= 1
        unusable.append(Unusable(name, reason))

    sets = [samples.pictures] if real is None else [samples.pictures, real]
    found = find_nearest(sets, training(), models, leave_out)
    if not num_images:
        raise JobError(nothing_usable(source, "--train", options.train, unusable))
    thresholds = None if real is None else thresholds_of(found[1])
    return Memorisation(
        model=models.clip.name,
        train=source_of(options.train, source.kind, num_images, unusable),
        thresholds=thresholds,
        requests=tuple(_copies(samples, name, found[0], thresholds) for name in names if len(samples.rows(name))),
        pairs=_pairs(samples, found[0], thresholds, registry),
    )


def _copies(samples: RunSamples, request: str, found: NearestImages, thresholds: Thresholds | None) -> Copies:
    rows = samples.rows(request)
    suspects = None if thresholds is None else int(found.suspects(thresholds)[rows].sum())
    return Copies(
        request=request,
        num_images=len(rows),
        clip_distance_median=float(np.median(found.clip_distance[rows])),
        pixel_distance_median=float(np.median(found.pixel_distance[rows])),
        num_suspects=suspects,
        suspects=None if suspects is None else interval_of(wilson_interval(suspects, len(rows))),
    )


def _pairs(
    samples: RunSamples, found: NearestImages, thresholds: Thresholds | None, registry: ImageRegistry
) -> tuple[Pair, ...]:
    """The samples that are likeliest to be copies, each with its training image."""
    suspects = found.suspects(thresholds) if thresholds else np.zeros(len(found.names), dtype=bool)
    pairs = []
    for row in order_by_nearness(found, thresholds)[:MAX_PAIRS].tolist():
        training = registry.show("train", found.names[row], found.thumbnails[row], found.names[row])
        pairs.append(
            Pair(
                sample=registry.sample(samples, row),
                training=training,
                clip_distance=float(found.clip_distance[row]),
                pixel_distance=float(found.pixel_distance[row]),
                is_suspect=bool(suspects[row]),
            )
        )
    return tuple(pairs)
