"""Images as an evaluation keeps them: features, a few pixels and a thumbnail, whatever the size of the files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.images import Found, ImageSource
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.report.gallery import image_uri
from engine.studies.features import Extractor

BATCH = 64
# Pixels are compared at this size: enough to tell a copy, and blind to noise and to a new encoding.
COMPARED_SIDE = 32
THUMBNAIL_BYTES = 6000
_ROWS = 1024

Advance = Callable[[str], None]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pictures:
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
    """

    names: tuple[str, ...]
    classes: NDArray[np.int64]
    clip: NDArray[np.float32]
    features: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    thumbnails: tuple[str, ...]
    logits: NDArray[np.float32]
    judged: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Eyes:
    """The models that look at images; target and judge where they are to, too."""

    clip: Clip
    extractor: Extractor
    target: Classifier | None = None
    judge: Clip | None = None

    def embeds(self, images: Sequence[PIL.Image.Image]) -> NDArray[np.float32]:
        """CLIP embeddings [B, d] of length one; an embedding of length zero stays so."""
        return unit(self.clip.image_embeds(images).numpy())

    def look(self, images: Iterable[tuple[str, int, PIL.Image.Image]]) -> Pictures:
        """Everything that is kept of images, given with name and class; a batch of them is held at a time."""
        parts = [self._part(batch) for batch in batched(images)]
        if not parts:
            return _nothing()
        return Pictures(
            names=tuple(name for part in parts for name in part.names),
            thumbnails=tuple(uri for part in parts for uri in part.thumbnails),
            classes=np.concatenate([part.classes for part in parts]),
            clip=np.concatenate([part.clip for part in parts]),
            features=np.concatenate([part.features for part in parts]),
            pixels=np.concatenate([part.pixels for part in parts]),
            logits=np.concatenate([part.logits for part in parts]),
            judged=np.concatenate([part.judged for part in parts]),
        )

    def _part(self, batch: Sequence[tuple[str, int, PIL.Image.Image]]) -> Pictures:
        images = [image for _, _, image in batch]
        clip = self.embeds(images)
        return Pictures(
            names=tuple(name for name, _, _ in batch),
            classes=np.array([index for _, index, _ in batch], dtype=np.int64),
            clip=clip,
            features=self.extractor.features(images, clip),
            pixels=small_pixels(images),
            thumbnails=tuple(image_uri(image, THUMBNAIL_BYTES) for image in images),
            logits=self.target.score(images).numpy() if self.target else np.empty((len(images), 0), np.float32),
            judged=(
                unit(self.judge.image_embeds(images).numpy()) if self.judge else np.empty((len(images), 0), np.float32)
            ),
        )


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of `BATCH`, the last one shorter."""
    waiting = iter(items)
    while batch := list(itertools.islice(waiting, BATCH)):
        yield batch


def _nothing() -> Pictures:
    return Pictures(
        names=(),
        classes=np.empty(0, np.int64),
        clip=np.empty((0, 1), np.float32),
        features=np.empty((0, 1), np.float32),
        pixels=np.empty((0, COMPARED_SIDE, COMPARED_SIDE, 3), np.uint8),
        thumbnails=(),
        logits=np.empty((0, 0), np.float32),
        judged=np.empty((0, 0), np.float32),
    )


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
    found = np.empty(len(first))
    # As floats, all of them at once would be eight times what is held.
    for start in range(0, len(first), _ROWS):
        part = slice(start, start + _ROWS)
        difference = (first[part].astype(np.float64) - second[part]) / 255
        found[part] = np.sqrt((difference**2).reshape(len(difference), -1).mean(1))
    return found


def count_items(source: ImageSource) -> int:
    """How many items a source has, without decoding them."""
    if source.num_images is not None:
        return source.num_images
    return sum(1 for file in source.files for _ in file())


def draw_images(source: ImageSource, limit: int, seed: int, advance: Advance) -> Iterator[Found]:
    """At most `limit` items of a source, equally likely each, in order; the others are not decoded."""
    num = count_items(source)
    wanted = set(np.random.default_rng(seed).choice(num, limit, replace=False).tolist() if num > limit else range(num))
    done = 0
    for number, item in enumerate(itertools.chain.from_iterable(file() for file in source.files)):
        if number in wanted:
            done += 1
            advance(f"{done}/{len(wanted)}")
            yield item()
