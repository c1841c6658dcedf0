"""Images that a job names, to condition samples on or to start them from: read in order, and the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.data.images import LabelledImage, Unusable, image_key, nothing_usable, open_images, some_of
from engine.errors import JobError
from engine.job.plan import RequestPlan
from engine.methods.heartbeat import beat

ProgressCallback = Callable[[str], None]
# Called with a usable image, and the digest of its pixels.
Take = Callable[[LabelledImage, bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenImages:
    """What is known of given images.

    Attributes:
        digest: of the usable ones and their classes, in their order.
        named_digest: of their names, too, and of what is marked as synthetic.
        classes: of the usable ones.
        unusable: what could not be used.
    """

    digest: str
    named_digest: str
    classes: frozenset[int]
    unusable: tuple[Unusable, ...]


def read_given(address: str, labels: Sequence[str], where: str, *take: Take) -> GivenImages:
    """Walk through given images, in order.

    Args:
        where: the field that has the address, for messages.
        take: each is called with every usable image.

    Raises:
        JobError: there is nothing that can be read, or no usable image.
    """
    source = open_images(address, tuple(labels), where)
    digest, named, classes, unusable = hashlib.sha256(), hashlib.sha256(), set[int](), list[Unusable]()
    for image in source.read():
        beat()
        if isinstance(image, Unusable):
            unusable.append(image)
            continue
        key = image_key(image.image)
        digest.update(f"{image.class_index}:".encode() + key)
        # A name has no line break.
        named.update(f"{image.name}\n{image.class_index}:{'synthetic:' * image.is_synthetic}".encode() + key)
        classes.add(image.class_index)
        for each in take:
            each(image, key)
    if not classes:
        raise JobError(nothing_usable(source, where, address, unusable))
    return GivenImages(
        digest=digest.hexdigest()[:32],
        named_digest=named.hexdigest()[:32],
        classes=frozenset(classes),
        unusable=tuple(unusable),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What a worker keeps of given images.

    Attributes:
        where: the field that has the address, for messages.
        finish: called after the last image with what is known of all, such as to compare their digest.
    """

    address: str
    where: str
    take: Take
    finish: Callable[[GivenImages], None]


def read_for(readers: Sequence[Reader], labels: Sequence[str]) -> None:
    """Let each reader have the images of its address; those of several readers are read once.

    Raises:
        JobError: as `read_given`, or of a reader.
    """
    for address in dict.fromkeys(reader.address for reader in readers):
        own = [reader for reader in readers if reader.address == address]
        given = read_given(address, labels, own[0].where, *(reader.take for reader in own))
        for reader in own:
            reader.finish(given)


class CheckedImages:
    """Reads the given images of a job before any model is loaded, each source once.

    Args:
        labels: class names of the target.
        progress: called with the progress of reading.
        notice: called with what the user should know, and need not fix.
    """

    def __init__(self, labels: Sequence[str], progress: ProgressCallback, notice: ProgressCallback) -> None:
        self._labels, self._progress, self._notice = labels, progress, notice
        self._read: dict[str, GivenImages] = {}

    def of(self, request: RequestPlan, address: str, field: str) -> GivenImages:
        """The images of an address, if every class of the request has one.

        Args:
            field: of the request, that has the address.

        Raises:
            JobError: nothing can be read, or a class has no usable image.
        """
        where = f"{request.where}.{field}"
        if address not in self._read:
            self._read[address] = self._given(address, where)
        given = self._read[address]
        classes = [pair for cell in request.cells for pair in zip(cell.classes, cell.names, strict=True)]
        if missing := [name for index, name in classes if index not in given.classes]:
            raise JobError(f"{where}: '{address}' has no usable image of class '{missing[0]}'; add one")
        return given

    def _given(self, address: str, where: str) -> GivenImages:
        count = 0

        def take(_image: LabelledImage, _key: bytes) -> None:
            nonlocal count
            count += 1
            self._progress(f"reading {address}: {count} images")

        given = read_given(address, self._labels, where, take)
        if given.unusable:
            self._notice(f"{where}: {len(given.unusable)} of '{address}' cannot be used: {some_of(given.unusable)}")
        return given


def check_same(digest: str, planned: str, address: str, where: str) -> None:
    """Refuse images or an artefact that the driver did not see.

    Raises:
        JobError: the digest is not the planned one.
    """
    if digest != planned:
        raise JobError(
            f"{where}: '{address}' differs on this machine from the driver's; use a folder that all machines share, and"
            " do not change it during the run"
        )
