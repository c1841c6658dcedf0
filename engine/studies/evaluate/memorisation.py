"""Are samples copies of training images? Their distances to the nearest ones, by request, and the nearest pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image

from engine.data.images import LabelledImage, Unusable, nothing_usable, open_images
from engine.driver.progress import Display
from engine.errors import JobError
from engine.methods.intervals import wilson_interval
from engine.report.evaluation import Copies, Memorisation, Pair, Thresholds
from engine.studies.evaluate.image_features import ImageFeatures, VisionModels
from engine.studies.evaluate.image_registry import ImageRegistry
from engine.studies.evaluate.inputs import StudiedSamples, source_of
from engine.studies.evaluate.nearest_images import NearestImages, find_nearest, order_by_nearness, thresholds_of
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.quality import interval_of

MAX_PAIRS = 12


def memorisation(
    samples: StudiedSamples, real: ImageFeatures | None, names: Sequence[str], labels: tuple[str, ...],
    models: VisionModels, options: EvaluateOptions, registry: ImageRegistry, display: Display,
) -> Memorisation | None:  # fmt: skip
    """Distances of all samples to their nearest training images; None without `options.train`.

    Args:
        real: held-out images, from which the thresholds of suspects are taken.
        names: of the requests.
        labels: class names in index order.

    Raises:
        JobError: no training image can be used.
    """
    if options.train is None:
        return None
    source, unusable, num_images = open_images(options.train, labels, "--train"), list[Unusable](), 0

    def training() -> Iterator[tuple[str, PIL.Image.Image]]:
        nonlocal num_images
        for item in source.read():
            if isinstance(item, LabelledImage):
                num_images += 1
                of = f"/{source.num_images}" if source.num_images else ""
                display.advance(f"searching --train: {num_images}{of}")
                yield item.name, item.image
            else:
                unusable.append(item)

    def leave_out(name: str, reason: str) -> None:
        nonlocal num_images
        num_images -= 1
        unusable.append(Unusable(name, reason))

    sets = [samples.images] if real is None else [samples.images, real]
    nearest, *nearest_of_real = find_nearest(sets, training(), models, leave_out)
    if not num_images:
        raise JobError(nothing_usable(source, "--train", options.train, unusable))
    thresholds = thresholds_of(nearest_of_real[0]) if nearest_of_real else None
    return Memorisation(
        model=models.clip.name,
        train=source_of(options.train, source.kind, num_images, unusable),
        thresholds=thresholds,
        requests=tuple(_copies(samples, name, nearest, thresholds) for name in names if len(samples.rows(name))),
        pairs=_pairs(samples, nearest, thresholds, registry),
    )


def _copies(samples: StudiedSamples, request: str, nearest: NearestImages, thresholds: Thresholds | None) -> Copies:
    """Median distances of a request, and its number of suspects."""
    rows = samples.rows(request)
    suspects = None if thresholds is None else int(nearest.suspects(thresholds)[rows].sum())
    return Copies(
        request=request,
        num_images=len(rows),
        clip_distance_median=float(np.median(nearest.clip_distance[rows])),
        pixel_distance_median=float(np.median(nearest.pixel_distance[rows])),
        num_suspects=suspects,
        suspects=None if suspects is None else interval_of(wilson_interval(suspects, len(rows))),
    )


def _pairs(
    samples: StudiedSamples, nearest: NearestImages, thresholds: Thresholds | None, registry: ImageRegistry
) -> tuple[Pair, ...]:
    """The samples that are the likeliest copies, each with its training image."""
    suspects = nearest.suspects(thresholds) if thresholds else np.zeros(len(nearest.names), dtype=bool)
    pairs = []
    for row in order_by_nearness(nearest, thresholds)[:MAX_PAIRS].tolist():
        training = registry.show("train", nearest.names[row], nearest.thumbnails[row], nearest.names[row])
        pairs.append(
            Pair(
                sample=registry.sample(samples, row),
                training=training,
                clip_distance=float(nearest.clip_distance[row]),
                pixel_distance=float(nearest.pixel_distance[row]),
                is_suspect=bool(suspects[row]),
            )
        )
    return tuple(pairs)
