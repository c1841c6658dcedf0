"""What is found where images are read: images with their class, and what cannot be used with its reason."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image

from engine.data.images.decode import SYNTHETIC_MARK, UnusableImageError, brief, decode_rgb, plain

SOUGHT = (
    "class folders with images (CLASS/*.png, CLASS being a name or an index), WebDataset tars (*.tar with .png and"
    " .cls), a run, parquet files (columns image and label), or a named set such as digits:validation"
)
PART_ROWS = 64
# Of a sample that a run rejected and stored all the same: its label may well be wrong.
REJECTED = "was rejected by the rule of its run"
# So many files, or more, in each part of a source make the parts equal enough.
FILES_PER_PART = 4

_MAX_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image that can be used: 8-bit RGB, of a class of the target.

    Attributes:
        contexts: in which contexts it stands, for tables by context; empty where nothing is said of them.
        is_synthetic: whether its file says that a trained model made it (IPTC), or a run's record beside it does.
    """

    name: str
    image: PIL.Image.Image
    class_index: int
    contexts: tuple[str, ...] = ()
    is_synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Unusable:
    """An image, or a whole file, that cannot be used, and why."""

    name: str
    reason: str


Found = LabelledImage | Unusable
# Makes a finding, which is when an image is decoded; to be called before the next item is asked for, or not at all.
Item = Callable[[], Found]
# Number of the file and of the item in it.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images are read from, one by one.

    Attributes:
        kind: in words.
        num_images: how many there are to try, or None where only reading tells.
        files: each starts from its beginning: a tar, a table, the whole of a folder.
        num_bytes: size of the files, where `num_images` is not known.
    """

    kind: str
    num_images: int | None
    files: tuple[Callable[[], Iterator[Item]], ...]
    num_bytes: int = 0

    def read(self) -> Iterator[Found]:
        """All there is; equal files give equal findings in equal order."""
        return (item for _, item in self.read_part(0, 1))

    def read_part(self, part: int, num_parts: int) -> Iterator[tuple[Place, Found]]:
        """Part `part` of `num_parts`: every so-many-th file where there are many, else batch of `PART_ROWS` items.

        Every finding is in one part alone. Images of the other parts are not decoded; their files are walked through
        where parts share files.
        """
        is_by_file = len(self.files) >= FILES_PER_PART * num_parts
        for number, items in enumerate(self.files):
            if is_by_file and number % num_parts != part:
                continue
            for row, item in enumerate(items()):
                if is_by_file or (number + row // PART_ROWS) % num_parts == part:
                    yield (number, row), item()

    def beside(self, others: Sequence[Unusable]) -> ImageSource:
        """This source with files that lie in its folder and are not read, after all that is."""
        if not others:
            return self
        items = [partial(_same, other) for other in others]
        num_images = None if self.num_images is None else self.num_images + len(items)
        return dataclasses.replace(self, num_images=num_images, files=(*self.files, lambda: iter(items)))


def unusable(name: str, reason: str) -> Unusable:
    """Something that cannot be used, in texts that can be printed."""
    return Unusable(plain(name), plain(reason))


def _same(item: Unusable) -> Found:
    return item


def make_finding(name: str, class_of: Callable[[], int], data: Callable[[], bytes]) -> Found:
    """An image with its class; its bytes are only asked for where the class is known.

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


def in_context(item: Found, context: Any) -> Found:
    """What was found, with the context that stands beside it, where one does."""
    if isinstance(item, Unusable) or not isinstance(context, str):
        return item
    return dataclasses.replace(item, contexts=(plain(context),))


def image_key(image: PIL.Image.Image) -> bytes:
    """Digest of the pixels of an image, whatever its file."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()


def some_of(unusable: Sequence[Unusable]) -> str:
    """The first of what cannot be used, those with different reasons before others, and how many more there are."""
    first = {item.reason: number for number, item in reversed(list(enumerate(unusable)))}
    numbers = sorted(first.values())[:_MAX_SHOWN]
    numbers += [number for number in range(min(len(unusable), 2 * _MAX_SHOWN)) if number not in numbers]
    reasons = "; ".join(f"{unusable[item].name}: {unusable[item].reason}" for item in numbers[:_MAX_SHOWN])
    return reasons + (f"; and {len(unusable) - _MAX_SHOWN} more" if len(unusable) > _MAX_SHOWN else "")


def nothing_usable(source: ImageSource, option: str, address: str, unusable: Sequence[Unusable]) -> str:
    """What to report where no image of a source can be used."""
    if not unusable:
        return f"{option}: '{address}' has no image (read as {source.kind}); give {SOUGHT}"
    return f"{option}: '{address}' has no usable image (read as {source.kind}): {some_of(unusable)}; give {SOUGHT}"
