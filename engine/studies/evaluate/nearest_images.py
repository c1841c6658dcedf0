"""The nearest training image of each image, and how near it is in comparison with those of held-out images.

A distance alone says nothing: images of one class are all near to each other. Held-out real images, which cannot be
copies, show which distances are usual. Carlini et al., "Extracting training data from diffusion models" (2023),
calibrate by the neighbours of an image; Somepalli et al., "Diffusion art or digital forgery?" (CVPR 2023), search in
feature space.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.methods.finiteness import Faults
from engine.report.evaluation import Thresholds
from engine.report.gallery import image_uri
from engine.studies.evaluate.image_features import (
    THUMBNAIL_BYTES,
    ImageFeatures,
    VisionModels,
    batched,
    pixel_distances,
    small_pixels,
)

# A sample is suspect if it is nearer than this share of the held-out images.
QUANTILE = 0.01
MIN_HELD_OUT = 20
# Below both distances, a held-out image is a training image itself.
_SAME_CLIP, _SAME_PIXELS = 1e-5, 1e-3

Batch = Sequence[tuple[str, PIL.Image.Image]]


@dataclass(slots=True, eq=False)
class Nearest:
    """The nearest training image of each of Q images, by the cosine of CLIP embeddings.

    Attributes:
        cosine: [Q]; -2 before any training image was added.
        pixels: [Q, 32, 32, 3] of the nearest ones.
        names, thumbnails: of the nearest ones.
    """

    cosine: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    names: list[str]
    thumbnails: list[str]

    @classmethod
    def of(cls, num_queries: int, like: NDArray[np.uint8]) -> Nearest:
        """Before any training image was added; `like` are pixels [Q, 32, 32, 3] of the images."""
        cosine = np.full(num_queries, -2.0, np.float32)
        return cls(cosine, np.zeros((num_queries, *like.shape[1:]), np.uint8), [""] * num_queries, [""] * num_queries)

    def update(self, queries: NDArray[np.float32], clip: NDArray[np.float32], batch: Batch) -> None:
        """Add training images with their embeddings [B, d]; of equally near ones the first stays."""
        cosines = queries @ clip.T
        best = cosines.argmax(1)
        value = cosines[np.arange(len(queries)), best]
        nearer = np.flatnonzero(value > self.cosine)
        self.cosine[nearer] = value[nearer]
        pixels = small_pixels([image for _, image in batch])
        uris = {place: image_uri(batch[place][1], THUMBNAIL_BYTES) for place in set(best[nearer].tolist())}
        for query in nearer.tolist():
            place = int(best[query])
            self.pixels[query] = pixels[place]
            self.names[query], self.thumbnails[query] = batch[place][0], uris[place]


@dataclass(frozen=True, slots=True, eq=False)
class NearestImages:
    """The nearest training image of each of N images.

    Attributes:
        clip_distance: one minus the cosine, [N].
        pixel_distance: [N], of small images in [0, 1].
    """

    clip_distance: NDArray[np.float64]
    pixel_distance: NDArray[np.float64]
    names: tuple[str, ...]
    thumbnails: tuple[str, ...]

    def suspects(self, thresholds: Thresholds) -> NDArray[np.bool_]:
        """Which images are below both thresholds, [N]."""
        near = self.clip_distance <= thresholds.clip_distance
        return near & (self.pixel_distance <= thresholds.pixel_distance)


def find_nearest(
    sets: Sequence[ImageFeatures],
    training: Iterable[tuple[str, PIL.Image.Image]],
    models: VisionModels,
    leave_out: Callable[[str, str], None],
) -> list[NearestImages]:
    """The nearest training images of several sets, in one pass over the training images and in constant memory.

    Args:
        leave_out: called with the name of a training image that has no embedding, and the reason.
    """
    queries = np.concatenate([images.clip for images in sets])
    pixels = np.concatenate([images.pixels for images in sets])
    nearest = Nearest.of(len(queries), pixels)
    for batch in batched(training):
        faults = Faults(len(batch))
        embeds = models.embeds([image for _, image in batch], faults)
        usable = [row for row in range(len(batch)) if not faults[row]]
        if usable:
            nearest.update(queries, embeds[usable], [batch[row] for row in usable])
        for row, (name, _) in enumerate(batch):
            if faults[row]:
                leave_out(name, faults[row])
    clip_distance = np.maximum(0.0, 1.0 - nearest.cosine.astype(np.float64))
    pixel_distance = pixel_distances(pixels, nearest.pixels)
    ends = np.cumsum([0, *map(len, sets)]).tolist()
    return [
        NearestImages(
            clip_distance=clip_distance[start:stop],
            pixel_distance=pixel_distance[start:stop],
            names=tuple(nearest.names[start:stop]),
            thumbnails=tuple(nearest.thumbnails[start:stop]),
        )
        for start, stop in itertools.pairwise(ends)
    ]


def thresholds_of(held_out: NearestImages) -> Thresholds | None:
    """The distances below which an image is suspect, from held-out real images; None where these are too few.

    Held-out images that are training images themselves are left out: they would lower the thresholds.
    """
    is_shared = (held_out.clip_distance < _SAME_CLIP) & (held_out.pixel_distance < _SAME_PIXELS)
    clip, pixel = held_out.clip_distance[~is_shared], held_out.pixel_distance[~is_shared]
    if len(clip) < MIN_HELD_OUT:
        return None
    limits = [float(np.quantile(distances, QUANTILE)) for distances in (clip, pixel)]
    return Thresholds(
        num_held_out=len(clip),
        num_shared=int(is_shared.sum()),
        clip_distance=limits[0],
        pixel_distance=limits[1],
        clip_distance_median=float(np.median(clip)),
        pixel_distance_median=float(np.median(pixel)),
        num_suspects=int(((clip <= limits[0]) & (pixel <= limits[1])).sum()),
    )


def order_by_nearness(nearest: NearestImages, thresholds: Thresholds | None) -> NDArray[np.int64]:
    """Rows, the likeliest copies first: by the larger of both distances, each in units of its median."""
    units = (
        (thresholds.clip_distance_median, thresholds.pixel_distance_median)
        if thresholds
        else (float(np.median(nearest.clip_distance)), float(np.median(nearest.pixel_distance)))
    )
    clip = nearest.clip_distance / max(units[0], 1e-12)
    pixel = nearest.pixel_distance / max(units[1], 1e-12)
    return np.asarray(np.argsort(np.maximum(clip, pixel), kind="stable"))
