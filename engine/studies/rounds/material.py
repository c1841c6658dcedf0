"""What a study of rounds reads once: the target, the images to train on, and the test images with corrupted copies."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.images import ImageSource, Item, LabelledImage, Unusable
from engine.data.images.corruptions import Corruption, corrupted_item
from engine.driver.progress import Display
from engine.errors import JobError
from engine.models.labels import target_labels
from engine.models.library_logging import quiet_libraries
from engine.models.trainable import Trainable, load_trainable
from engine.studies.retrain.finetune import training_device
from engine.studies.retrain.image_tensors import ImageSet, read_images
from engine.studies.retrain.inputs import MIN_CALIBRATION_IMAGES, MIN_REAL_IMAGES, Scorable, plain_context
from engine.studies.rounds.design import Design
from engine.studies.rounds.sources import open_sources

SEEN, OTHER, CORRUPTED = "seen", "other", "corrupted"
# Between the attributes of a context: `red ink on a white background, small`.
_PARTS = re.compile(r", | on an? ")


@dataclass(frozen=True, kw_only=True)
class Material:
    """Target and images, read and preprocessed.

    Attributes:
        test: the test images, followed by corrupted copies of some, whose context is their corruption.
        num_plain: test images that are no corrupted copies.
        seen: contexts of test images that count as in distribution.
        labels: class names of the target in index order.
        overlap: different images that are both in `--real` and in `--test`.
    """

    target: Trainable
    real: ImageSet
    test: ImageSet
    num_plain: int
    seen: frozenset[str]
    calibration: ImageSet | None
    labels: tuple[str, ...]
    overlap: int

    @cached_property
    def kinds(self) -> NDArray[np.str_]:
        """Of each test image, [N]: seen, other or corrupted."""
        plain = [kind_of(tags, self.seen) for tags in self.test.contexts[: self.num_plain]]
        return np.array([*plain, *[CORRUPTED] * (len(self.test) - self.num_plain)])

    @cached_property
    def rows_of(self) -> dict[str, NDArray[np.int64]]:
        """The rows of each context and of each corruption, in the order of the images."""
        rows: dict[str, list[int]] = {}
        for row, tags in enumerate(self.test.contexts):
            for tag in dict.fromkeys(tags):
                rows.setdefault(tag, []).append(row)
        return {tag: np.array(members) for tag, members in rows.items()}

    def kind(self, context: str) -> str:
        """Of a context or corruption."""
        if self.rows_of[context][0] >= self.num_plain:
            return CORRUPTED
        return SEEN if context in self.seen else OTHER


def read_material(design: Design, display: Display) -> Material:
    """Load the target and read all images.

    Raises:
        JobError: the target or an image source cannot be used, or there are too few images.
    """
    sources, spec = open_sources(design), design.spec
    display.phase("loading the target")
    quiet_libraries()
    address = design.job.models.target
    target = load_trainable(address, str(training_device(design.job.runtime.device == "cpu")))
    scorable = Scorable(target.network, address, display)
    known = {plain_context(text): text for request in design.job.requests for text in request.contexts or ()}

    def read(source: ImageSource, field: str, given: str) -> ImageSet:
        display.phase(f"reading {field}")
        images = read_images(source, field, given, target.preprocessing, display)
        return images.named(lambda text: known.get(plain_context(text), text))

    real = scorable.of(read(sources.real, "real", spec.real), "real")
    _check_number(real, "real", spec.real, MIN_REAL_IMAGES)
    calibration = None
    if sources.calibrate is not None and spec.calibrate:
        calibration = scorable.of(read(sources.calibrate, "calibrate", spec.calibrate), "calibrate")
        _check_number(calibration, "calibrate", spec.calibrate, MIN_CALIBRATION_IMAGES)
    test, places = _some(read(sources.test, "test", spec.test), spec.test_images)
    seen = _seen(design, real, test)
    copies = _corrupted(design, sources.test, test, places, seen, target, display)
    _check_sizes(real, test, spec.test)
    return Material(
        target=target,
        real=real,
        test=test if copies is None else _joined(test, copies),
        num_plain=len(test),
        seen=seen,
        calibration=calibration,
        labels=tuple(target_labels(design.job)),
        overlap=len(set(test.keys) & set(real.keys)),
    )


def kind_of(tags: Sequence[str], seen: frozenset[str]) -> str:
    """Of a test image by its contexts: one without any is in distribution."""
    return SEEN if all(tag in seen for tag in tags) else OTHER


def _some(images: ImageSet, limit: int | None) -> tuple[ImageSet, list[int]]:
    """At most so many images of each context, and their places in their source."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for row, tags in enumerate(images.contexts):
        groups.setdefault(tags, []).append(row)
    rows = sorted(row for members in groups.values() for row in spread(members, limit))
    return images.take(rows), rows


def spread(rows: Sequence[int], limit: int | None) -> list[int]:
    """At most so many of some rows, evenly spread over them."""
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def is_known(context: str, known: set[str]) -> bool:
    """Whether each attribute of a context is one of those of the images to train on; the empty one has none."""
    text = plain_context(context)
    return not text or text in known or all(part in known for part in _PARTS.split(text))


def _seen(design: Design, real: ImageSet, test: ImageSet) -> frozenset[str]:
    """The contexts of test images that are in distribution.

    Raises:
        JobError: the study names one that no test image has.
    """
    contexts = {tag for tags in test.contexts for tag in tags}
    check_contexts(design.spec.seen, "seen", contexts)
    if design.spec.seen is not None:
        return frozenset(design.spec.seen)
    known = {plain_context(tag) for tags in real.contexts for tag in tags if tag}
    return frozenset(context for context in contexts if is_known(context, known))


def check_contexts(names: Sequence[str] | None, field: str, contexts: set[str]) -> None:
    """Check that contexts which a study names are those of test images.

    Raises:
        JobError: some are not, a line each.
    """
    if unknown := [name for name in names or () if name not in contexts]:
        has = ", ".join(repr(name) for name in sorted(contexts)) or "none"
        raise JobError(
            [f"{field}: no image of test has the context '{name}'; their contexts: {has}" for name in unknown]
        )


def _corrupted(
    design: Design,
    source: ImageSource,
    test: ImageSet,
    places: Sequence[int],
    seen: frozenset[str],
    target: Trainable,
    display: Display,
) -> ImageSet | None:
    """Corrupted copies of test images in distribution, evenly spread over them; None without corruptions.

    Args:
        places: of each test image, its number among the usable ones of the source.
    """
    rows = [row for row, tags in enumerate(test.contexts) if kind_of(tags, seen) == SEEN]
    if not design.corruptions or not rows:
        return None
    rows = spread(rows, design.spec.corruptions.images)
    chosen = frozenset(places[row] for row in rows)
    display.phase("corrupting test images")
    images = _chosen(source, chosen)
    copies = dataclasses.replace(
        source,
        num_images=len(rows) * len(design.corruptions),
        files=tuple(partial(_copies, images, corruption) for corruption in design.corruptions),
    )
    read = read_images(copies, "test", design.spec.test, target.preprocessing, display)
    origins = [test.origins[row] for row in rows] * len(design.corruptions)
    return dataclasses.replace(read, origins=tuple(origins), unusable=())


def _chosen(source: ImageSource, places: frozenset[int]) -> list[LabelledImage]:
    """Some of the usable images of a source, by their numbers."""
    usable = (result for result in source.read() if not isinstance(result, Unusable))
    return [image for place, image in enumerate(usable) if place in places]


def _copies(images: Sequence[LabelledImage], corruption: Corruption) -> Iterator[Item]:
    return (partial(corrupted_item, corruption, image) for image in images)


def _joined(first: ImageSet, second: ImageSet) -> ImageSet:
    return dataclasses.replace(
        first,
        pixels=torch.cat([first.pixels, second.pixels]),
        classes=torch.cat([first.classes, second.classes]),
        **{name: getattr(first, name) + getattr(second, name) for name in ("contexts", "keys", "origins")},
    )


def _check_number(images: ImageSet, field: str, address: str, least: int) -> None:
    if len(images) < least:
        raise JobError(f"{field}: '{address}' has {len(images)} usable images; give {least} or more")


def _check_sizes(real: ImageSet, test: ImageSet, address: str) -> None:
    if real.pixels.shape[1:] != test.pixels.shape[1:]:
        sizes = [" x ".join(map(str, images.pixels.shape[2:])) for images in (test, real)]
        raise JobError(
            f"test: '{address}' has images of {sizes[0]} pixels and real of {sizes[1]}, and the target's preprocessor"
            " does not resize; give images of one size"
        )


def digest_of_images(images: ImageSet) -> str:
    """Digest of the images, their classes and contexts, in their order."""
    texts = zip(images.classes.tolist(), images.contexts, images.keys, strict=True)
    return hashlib.sha256("\n".join(f"{index} {tags} {key.hex()}" for index, tags, key in texts).encode()).hexdigest()
