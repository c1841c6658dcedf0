"""Sources of labelled images, and their results: an image with its class, or why it cannot be used."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image

from engine.data.images.decode import SYNTHETIC_MARK, UnusableImageError, brief, decode_rgb, plain
from engine.data.images.labelling import Labelling

SOUGHT = (
    "class folders with images (CLASS/*.png, CLASS being a name or an index), WebDataset tars (*.tar with .png and"
    " .cls), a run, parquet files (columns image and label), or a named set such as digits:validation"
)
PART_ROWS = 64
# Of a sample that a run rejected and stored nevertheless: its label may be wrong.
REJECTED = "was rejected by the rule of its run"
# With at least this many files in each part of a source the parts are equal enough.
FILES_PER_PART = 4

_MAX_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image that can be used: 8-bit RGB, of a class of the target.

    Attributes:
        contexts: its contexts, for tables by context; empty where they are not known.
        is_synthetic: whether its file is marked as made by a trained model (IPTC), or a run's record is next to it.
        origin: what it was made of, such as one scan that is drawn in many contexts; empty where that is not known.
    """

    name: str
    image: PIL.Image.Image
    class_index: int
    contexts: tuple[str, ...] = ()
    is_synthetic: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Unusable:
    """An image, or a whole file, that cannot be used, and why."""

    name: str
    reason: str


ReadResult = LabelledImage | Unusable
# Gives a result; decodes the image when called. To be called before the next item is requested, or not at all.
Item = Callable[[], ReadResult]
# Number of the file and of the item in it.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images are read from, one by one.

    Attributes:
        kind: in words.
        num_images: number of images to try, or None where only reading shows it.
        files: each starts from its beginning: a tar, a table, the whole of a folder.
        num_bytes: size of the files, where `num_images` is not known.
        labelling: by which labels are read; it knows which of those that were read are no classes.
    """

    kind: str
    num_images: int | None
    files: tuple[Callable[[], Iterator[Item]], ...]
    num_bytes: int = 0
    labelling: Labelling | None = dataclasses.field(default=None, compare=False)

    @property
    def advice(self) -> str:
        """What to do about labels that are no classes, of the images that were read; empty where all are."""
        return self.labelling.advice() if self.labelling else ""

    def read(self) -> Iterator[ReadResult]:
        """All results; equal files give equal results in equal order."""
        return (item for _, item in self.read_part(0, 1))

    def read_part(self, part: int, num_parts: int) -> Iterator[tuple[Place, ReadResult]]:
        """Part `part` of `num_parts`: every so-many-th file where there are many, else batch of `PART_ROWS` items.

        Every result is in exactly one part. Images of the other parts are not decoded; their files are traversed
        where parts share files.
        """
        is_by_file = len(self.files) >= FILES_PER_PART * num_parts
        for number, items in enumerate(self.files):
            if is_by_file and number % num_parts != part:
                continue
            for row, item in enumerate(items()):
                if is_by_file or (number + row // PART_ROWS) % num_parts == part:
                    yield (number, row), item()

    def with_unread(self, others: Sequence[Unusable]) -> ImageSource:
        """This source followed by the files of its folder that are not read."""
        if not others:
            return self
        items = [partial(_same, other) for other in others]
        num_images = None if self.num_images is None else self.num_images + len(items)
        return dataclasses.replace(self, num_images=num_images, files=(*self.files, lambda: iter(items)))


def unusable(name: str, reason: str) -> Unusable:
    """An unusable item, with printable texts."""
    return Unusable(plain(name), plain(reason))


def _same(item: Unusable) -> ReadResult:
    return item


def make_result(name: str, class_of: Callable[[], int], data: Callable[[], bytes]) -> ReadResult:
    """Read an image with its class; its bytes are read only where the class is known.

    Args:
        class_of, data: raise `UnusableImageError` where there is none.
    """
    try:
        index, content = class_of(), data()
        return LabelledImage(plain(name), decode_rgb(content), index, is_synthetic=SYNTHETIC_MARK in content)
    except UnusableImageError as error:
        return unusable(name, str(error))
    except OSError as error:
        return unusable(name, f"cannot be read ({brief(error)})")


def in_context(item: ReadResult, context: Any) -> ReadResult:
    """A result with the context of its image, where one is known."""
    if isinstance(item, Unusable) or not isinstance(context, str):
        return item
    return dataclasses.replace(item, contexts=(plain(context),))


def image_key(image: PIL.Image.Image) -> bytes:
    """Digest of the pixels of an image, whatever its file."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()


def some_of(unusable: Sequence[Unusable]) -> str:
    """Some of the unusable items, those with different reasons first, and how many more there are."""
    first = {item.reason: number for number, item in reversed(list(enumerate(unusable)))}
    numbers = sorted(first.values())[:_MAX_SHOWN]
    numbers += [number for number in range(min(len(unusable), 2 * _MAX_SHOWN)) if number not in numbers]
    reasons = "; ".join(f"{unusable[item].name}: {unusable[item].reason}" for item in numbers[:_MAX_SHOWN])
    return reasons + (f"; and {len(unusable) - _MAX_SHOWN} more" if len(unusable) > _MAX_SHOWN else "")


def nothing_usable(source: ImageSource, option: str, address: str, unusable: Sequence[Unusable]) -> str:
    """What to report where no image of a source can be used."""
    if not unusable:
        return f"{option}: '{address}' has no image (read as {source.kind}); give {SOUGHT}"
    text = f"{option}: '{address}' has no usable image (read as {source.kind}): {some_of(unusable)}"
    return f"{text}; {source.advice or f'give {SOUGHT}'}"
