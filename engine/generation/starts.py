"""The real images that samples start from (SDEdit, Meng et al. 2022): which one, at which size, and where they wait."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from engine.data.images import LabelledImage
from engine.errors import JobError
from engine.generation.given_images import CheckedImages, GivenImages, Reader, check_same
from engine.job.plan import Plan, RequestPlan, SampleSpec

_FIELD = "start.images"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartImage:
    """The image that a sample starts from.

    Attributes:
        key: its name in its set.
        sha256: of its pixels, as the column `start_sha256` has it.
        class_index: its class.
        pixels: [H, W, 3], 8 bits, at the size of the pipeline's images.
        is_synthetic: whether its file, or a record beside it, says that a model made it.
    """

    key: str
    sha256: str
    class_index: int
    pixels: np.ndarray
    is_synthetic: bool


class Size(NamedTuple):
    """Of images, in pixels."""

    height: int
    width: int


class _Entry(NamedTuple):
    """An image of a class, and its place in the file."""

    key: str
    sha256: str
    place: int
    is_synthetic: bool


class StartImages:
    """Images by class, in their order, at one size.

    They lie in a temporary file without a name, which the system removes with the process: there may be more of them
    than memory holds.

    Args:
        needed: images of each class that can be asked for, by its index.
        size: of a pipeline's images.
    """

    def __init__(self, needed: dict[int, int], size: Size) -> None:
        self._needed, self._size = needed, size
        self._entries: dict[int, list[_Entry]] = {index: [] for index in needed}
        self._num_kept = 0
        self._file = tempfile.TemporaryFile(prefix="riskforge-starts-")  # noqa: SIM115
        self._pixels: np.ndarray | None = None

    def take(self, image: LabelledImage, key: bytes) -> None:
        """Keep an image, if it can be asked for.

        Args:
            key: digest of its pixels.
        """
        entries = self._entries.get(image.class_index)
        if entries is None or len(entries) == self._needed[image.class_index]:
            return
        self._file.write(fitted(image.image, self._size).tobytes())
        entries.append(_Entry(image.name, key.hex(), self._num_kept, image.is_synthetic))
        self._num_kept += 1

    def flush(self) -> None:
        """Write what waits to be written; after the last image."""
        self._file.flush()

    def of(self, spec: SampleSpec) -> StartImage:
        """The image of a sample: number `index` of its class, from the first again after the last.

        The classes of a joint prompt take turns.
        """
        turn, which = divmod(spec.index, len(spec.cell.classes))
        index = spec.cell.classes[which]
        # Where the class has more images than are kept, `turn` is below their number.
        entry = self._entries[index][turn % len(self._entries[index])]
        return StartImage(
            key=entry.key,
            sha256=entry.sha256,
            class_index=index,
            pixels=self._mapped()[entry.place],
            is_synthetic=entry.is_synthetic,
        )

    def _mapped(self) -> np.ndarray:
        if self._pixels is None:
            self.flush()
            shape = (self._num_kept, *self._size, 3)
            self._pixels = np.memmap(self._file, dtype=np.uint8, mode="r", shape=shape)
        return self._pixels


class StartSets:
    """The images that the requests of a plan start from, those of an address once for each size of pipelines.

    Args:
        plan: of the whole run: a set has all images that some sample of it can start from.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._read: dict[tuple[str, Size], StartImages] = {}

    def of(self, request: RequestPlan, size: Size, later: Callable[[Reader], None]) -> StartImages | None:
        """The images of a request at the size of its pipeline; None where it starts from noise alone.

        Args:
            later: takes the reader of images that were not read yet, which is to be done before they are asked for.
        """
        spec = request.spec.used_start
        if spec is None:
            return None
        if images := self._read.get((spec.images, size)):
            return images
        where, planned = f"{request.where}.{_FIELD}", self._plan.identity["requests"][request.number]["start"]["images"]
        with _space_for(spec.images, where, size):
            images = StartImages(self._needed(spec.images), size)

        def take(image: LabelledImage, key: bytes) -> None:
            with _space_for(spec.images, where, size):
                images.take(image, key)

        def finish(given: GivenImages) -> None:
            with _space_for(spec.images, where, size):
                images.flush()
            check_same(given.named_digest, planned, spec.images, where)
            self._read[spec.images, size] = images

        later(Reader(address=spec.images, where=where, take=take, finish=finish))
        return images

    def _needed(self, address: str) -> dict[int, int]:
        """Images of each class that some sample of the plan can start from."""
        needed = Counter[int]()
        for request in self._plan.requests:
            if request.spec.used_start and request.spec.used_start.images == address:
                for cell in request.cells:
                    most = -(-request.spec.attempts_limit // len(cell.classes))
                    needed |= Counter(dict.fromkeys(cell.classes, most))
        return dict(needed)


@contextlib.contextmanager
def _space_for(address: str, where: str, size: Size) -> Iterator[None]:
    """Within it images are written to the temporary folder.

    Raises:
        JobError: they do not fit.
    """
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{where}: '{address}' cannot be kept in {tempfile.gettempdir()} at {size.width} x {size.height} pixels"
            f" ({error.strerror or error}); set TMPDIR to a folder on a larger disk"
        ) from None


def start_digests(requests: Sequence[RequestPlan], images: CheckedImages) -> dict[str, str]:
    """Check the images that requests start from: digest of the names, classes and pixels of each set, by address.

    Raises:
        JobError: an image source is missing or damaged, or lacks a class that a request asks for.
    """
    return {
        spec.images: images.of(request, spec.images, _FIELD).named_digest
        for request in requests
        if (spec := request.spec.used_start)
    }


def fitted(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """An image at a size: the shorter side resized, the middle of the longer one; untouched where it has the size."""
    return PIL.ImageOps.fit(image, (size.width, size.height), PIL.Image.Resampling.LANCZOS)
