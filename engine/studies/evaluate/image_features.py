"""Images as an evaluation keeps them: features, small pixels and a thumbnail, whatever the size of the files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.report.gallery import image_uri
from engine.studies.evaluate.extractors import ClipFeatures, Extractor

BATCH = 64
# Pixels are compared at this size: enough to recognise a copy, and insensitive to noise and to another encoding.
COMPARED_SIDE = 32
THUMBNAIL_BYTES = 6000
_ROWS = 1024

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ImageFeatures:
    """A set of N images.

    Attributes:
        names: keys of samples, or where an image came from.
        classes: [N] class indices.
        clip: [N, d] CLIP embeddings of length one.
        features: [N, D] of the extractor of distances.
        pixels: [N, 32, 32, 3] in 8 bits.
        thumbnails: data URIs.
        logits: [N, n] of the target, or [N, 0] where they were not asked for.
        judged: [N, e] embeddings by a second CLIP model of length one, or [N, 0] without one.
        left_out: name of every image that a model gives unusable values for, and the reason, which names the model.
    """

    names: tuple[str, ...]
    classes: NDArray[np.int64]
    clip: NDArray[np.float32]
    features: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    thumbnails: tuple[str, ...]
    logits: NDArray[np.float32]
    judged: NDArray[np.float32]
    left_out: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class VisionModels:
    """The models that compute features of images; target and judge only where their outputs are needed.

    Attributes:
        clip_role: the field or option that names the CLIP model, for messages.
    """

    clip: Clip
    extractor: Extractor
    target: Classifier | None = None
    judge: Clip | None = None
    clip_role: str = "models.clip"

    def embeds(self, images: Sequence[PIL.Image.Image], faults: Faults) -> NDArray[np.float32]:
        """CLIP embeddings [B, d] of length one; undefined in rows with a fault, which is added to `faults`."""
        return _checked_unit(self.clip, self.clip_role, images, faults)

    def extract(self, images: Iterable[tuple[str, int, PIL.Image.Image]]) -> ImageFeatures:
        """Features of images that are given with name and class; a batch of images is in memory at a time."""
        parts = [self._part(batch) for batch in batched(images)]
        if not parts:
            return _nothing()
        return ImageFeatures(
            left_out=tuple(pair for part in parts for pair in part.left_out),
            names=tuple(name for part in parts for name in part.names),
            thumbnails=tuple(uri for part in parts for uri in part.thumbnails),
            classes=np.concatenate([part.classes for part in parts]),
            clip=np.concatenate([part.clip for part in parts]),
            features=np.concatenate([part.features for part in parts]),
            pixels=np.concatenate([part.pixels for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            judged=np.concatenate([part.judged for part in parts]),
        )

    def _part(self, batch: Sequence[tuple[str, int, PIL.Image.Image]]) -> ImageFeatures:
        images, faults = [image for _, _, image in batch], Faults(len(batch))
        clip = self.embeds(images, faults)
        features = self.extractor.features(images, clip)
        if not isinstance(self.extractor, ClipFeatures):
            faults.check_embeds(torch.from_numpy(features), "the network of features", self.extractor.name)
        logits = judged = np.empty((len(images), 0), np.float32)
        if self.target:
            scored = self.target.score(images)
            faults.check_logits(scored, "models.target", self.target.name)
            logits = scored.numpy()
        if self.judge:
            judged = _checked_unit(self.judge, "models.judge", images, faults)
        usable = [row for row in range(len(batch)) if not faults[row]]
        return ImageFeatures(
            names=tuple(batch[row][0] for row in usable),
            classes=np.array([batch[row][1] for row in usable], dtype=np.int64),
            clip=clip[usable],
            features=features[usable],
            pixels=small_pixels(images)[usable],
            thumbnails=tuple(image_uri(images[row], THUMBNAIL_BYTES) for row in usable),
            logits=logits[usable],
            judged=judged[usable],
            left_out=tuple((batch[row][0], faults[row]) for row in range(len(batch)) if faults[row]),
        )


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of `BATCH`, the last one shorter."""
    waiting = iter(items)
    while batch := list(itertools.islice(waiting, BATCH)):
        yield batch


def _nothing() -> ImageFeatures:
    return ImageFeatures(
        names=(),
        classes=np.empty(0, np.int64),
        clip=np.empty((0, 1), np.float32),
        features=np.empty((0, 1), np.float32),
        pixels=np.empty((0, COMPARED_SIDE, COMPARED_SIDE, 3), np.uint8),
        thumbnails=(),
        logits=np.empty((0, 0), np.float32),
        judged=np.empty((0, 0), np.float32),
    )


def _checked_unit(clip: Clip, role: str, images: Sequence[PIL.Image.Image], faults: Faults) -> NDArray[np.float32]:
    """Embeddings [B, d] of length one; rows without a direction are added to `faults`."""
    embeds = clip.image_embeds(images)
    faults.check_embeds(embeds, role, clip.name)
    return unit(embeds.numpy())


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [N, d] at length one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def small_pixels(images: Sequence[PIL.Image.Image]) -> NDArray[np.uint8]:
    """Images [B, 32, 32, 3] by averaging, whatever their shape."""
    size = (COMPARED_SIDE, COMPARED_SIDE)
    return np.stack([np.asarray(image.convert("RGB").resize(size, PIL.Image.Resampling.BOX)) for image in images])


def pixel_distances(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square difference of small images [N, 32, 32, 3], pair by pair, in [0, 1]."""
    distances = np.empty(len(first))
    # In blocks: as floats, all of them at once would take eight times the memory of the pixels.
    for start in range(0, len(first), _ROWS):
        part = slice(start, start + _ROWS)
        difference = (first[part].astype(np.float64) - second[part]) / 255
        distances[part] = np.sqrt((difference**2).reshape(len(difference), -1).mean(1))
    return distances
