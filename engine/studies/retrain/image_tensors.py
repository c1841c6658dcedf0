"""Images as input of a network: read once, preprocessed as the model itself does, and kept in memory.

A float32 image of 224 x 224 pixels is 0.6 MB, one of 32 x 32 pixels 12 kB.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from engine.data.images import ImageSource, Unusable, decode_stored, image_key, nothing_usable
from engine.driver.progress import Display
from engine.errors import JobError, first_line
from engine.models.preprocessing import Preprocessing
from engine.studies.retrain.finetune import Samples
from engine.studies.samples import StudiedRun, read_samples

ROWS = 64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ImageSet:
    """Labelled images of a source.

    Attributes:
        pixels: [N, 3, h, w], preprocessed.
        classes: [N] class indices.
        contexts: of each image, those that it belongs to.
        keys: of each image, a digest of its pixels.
        origins: of each image, what it was made of; its own key where that is not known.
        unusable: what could not be used, in the order of the source.
        kind: of the source, in words.
    """

    pixels: Tensor
    classes: Tensor
    contexts: tuple[tuple[str, ...], ...]
    keys: tuple[bytes, ...]
    origins: tuple[str, ...]
    unusable: tuple[Unusable, ...]
    kind: str

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def digest(self) -> str:
        """Digest of the images and their classes, whatever their order."""
        rows = sorted(zip(self.classes.tolist(), self.keys, strict=True))
        return hashlib.sha256(b"".join(f"{index}:".encode() + key for index, key in rows)).hexdigest()[:32]

    def take(self, rows: Sequence[int]) -> ImageSet:
        """The images of some rows."""
        return dataclasses.replace(
            self,
            pixels=self.pixels[list(rows)],
            classes=self.classes[list(rows)],
            contexts=tuple(self.contexts[row] for row in rows),
            keys=tuple(self.keys[row] for row in rows),
            origins=tuple(self.origins[row] for row in rows),
        )

    def without(self, usable: Tensor, reason: str) -> ImageSet:
        """The images where `usable` [N] is true; the others are unusable for this reason."""
        gone = (~usable).nonzero()[:, 0].tolist()
        lost = (Unusable(f"image {row + 1} of the readable ones", reason) for row in gone)
        return dataclasses.replace(self.take(usable.nonzero()[:, 0].tolist()), unusable=(*self.unusable, *lost))

    def named(self, name: Callable[[str], str]) -> ImageSet:
        """The images with other names of their contexts."""
        return dataclasses.replace(self, contexts=tuple(tuple(map(name, texts)) for texts in self.contexts))

    def samples(self, num_classes: int) -> Samples:
        """The images with one-hot targets."""
        return Samples(self.pixels, one_hot(self.classes, num_classes).float())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GeneratedSet:
    """Stored samples of a run.

    Attributes:
        requests: of each sample, the name of its request.
        classes: of each sample, the class that it was asked for.
        origins: of each sample, the names of its seed and of its start image, where it has one.
        accepted: of each sample, whether its request's rule accepted it, [N] booleans.
    """

    samples: Samples
    requests: tuple[str, ...]
    classes: tuple[int, ...]
    origins: tuple[tuple[str, ...], ...]
    accepted: Tensor

    def rows_of(self, names: Sequence[str]) -> Tensor:
        """The rows of some requests."""
        return torch.tensor([row for row, name in enumerate(self.requests) if name in names], dtype=torch.int64)

    def without(self, usable: Tensor) -> GeneratedSet:
        """The samples where `usable` [N] is true."""
        rows = usable.nonzero()[:, 0]
        kept = rows.tolist()
        return GeneratedSet(
            samples=self.samples.take(rows),
            requests=tuple(self.requests[row] for row in kept),
            classes=tuple(self.classes[row] for row in kept),
            origins=tuple(self.origins[row] for row in kept),
            accepted=self.accepted[rows],
        )


def read_images(
    source: ImageSource, option: str, address: str, preprocessing: Preprocessing, display: Display
) -> ImageSet:
    """All usable images of a source.

    Args:
        option, address: where the user gave the source, for messages.

    Raises:
        JobError: there is none, or the preprocessing does not give them one size.
    """
    stack = _Stack(f"{option}: '{address}'", preprocessing)
    classes, contexts, keys, unusable = list[int](), list[tuple[str, ...]](), list[bytes](), list[Unusable]()
    origins = list[str]()
    for item in source.read():
        if isinstance(item, Unusable):
            unusable.append(item)
            continue
        stack.add(item.image)
        classes.append(item.class_index)
        contexts.append(item.contexts)
        keys.append(image_key(item.image))
        origins.append(item.origin or keys[-1].hex())
        display.advance(f"reading {option}: {len(keys)}{f'/{source.num_images}' if source.num_images else ''} images")
    if not keys:
        raise JobError(nothing_usable(source, option, address, unusable))
    return ImageSet(
        pixels=stack.pixels(),
        classes=torch.tensor(classes),
        contexts=tuple(contexts),
        keys=tuple(keys),
        origins=tuple(origins),
        unusable=tuple(unusable),
        kind=source.kind,
    )


def read_generated(
    run: StudiedRun,
    requests: Sequence[str],
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    soft: bool,
    display: Display,
) -> GeneratedSet:
    """The stored samples of some requests of a run.

    Args:
        soft: whether the target of a sample is its `soft_label`, else its class.

    Raises:
        CorruptShardError: a shard or an image in it is not whole.
    """
    stack, targets, records = _Stack("RUN: its samples", preprocessing), list[Tensor](), list[dict[str, Any]]()
    for data, record in read_samples(run, requests):
        stack.add(decode_stored(data, f"{run.store.uri}: the image of sample {record['key']}"))
        hard = one_hot(torch.tensor(record["class_index"]), num_classes).float()
        targets.append(torch.tensor(record["soft_label"]) if soft else hard)
        records.append(record)
        display.advance(f"reading the samples of the run: {len(records)}")
    pixels = stack.pixels()
    return GeneratedSet(
        samples=Samples(pixels, torch.stack(targets) if targets else torch.empty(0, num_classes)),
        requests=tuple(record["request"] for record in records),
        classes=tuple(record["class_index"] for record in records),
        origins=tuple(_origins(record) for record in records),
        accepted=torch.tensor([record["accepted"] for record in records], dtype=torch.bool),
    )


def _origins(record: dict[str, Any]) -> tuple[str, ...]:
    """What a sample began with: its noise, and its start by content; others with the same resemble it."""
    start = record.get("start_sha256") or record.get("start_key")
    return (f"seed {record['seed']}", *([f"start {start}"] if start else []))


@dataclass(slots=True, eq=False)
class _Stack:
    """Preprocesses images in small batches, and stacks them."""

    what: str
    preprocessing: Preprocessing
    waiting: list[PIL.Image.Image] = field(default_factory=list)
    done: list[Tensor] = field(default_factory=list)

    def add(self, image: PIL.Image.Image) -> None:
        self.waiting.append(image)
        if len(self.waiting) == ROWS:
            self._flush()

    def pixels(self) -> Tensor:
        """All images, [N, 3, h, w].

        Raises:
            JobError: their sizes differ.
        """
        self._flush()
        if len({part.shape[1:] for part in self.done}) > 1:
            self._refuse("sizes differ")
        return torch.cat(self.done) if self.done else torch.empty(0, 3, 1, 1)

    def _flush(self) -> None:
        if not self.waiting:
            return
        try:
            self.done.append(self.preprocessing.of_images(self.waiting))
        except (ValueError, RuntimeError) as error:
            self._refuse(first_line(error))
        self.waiting = []

    def _refuse(self, reason: str) -> None:
        raise JobError(
            f"{self.what} cannot go through the target's preprocessing in one batch ({reason}); give images of one"
            " size, or a target whose preprocessor resizes"
        ) from None
