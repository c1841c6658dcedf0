"""Real labelled images as samples of an export: drawn independently of their order, equal pixels only once."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.images import ImageSource, LabelledImage, Unusable, image_key, nothing_usable, open_images
from engine.data.stores.file_errors import explained
from engine.errors import JobError
from engine.job.columns import NO_CLASS
from engine.job.records import REAL, STATUS_OK, SampleResult, upgraded

OPTION = "--mix-real"
SYNTHETIC = "says that a trained model made it, so it is not real; give runs as RUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedReal:
    """How many real images are mixed in.

    Attributes:
        classes: of which they may be.
        count: how many.
        per_class: how many of each class the data set is to have, in place of `count`.
        there: by class, how many it has already.
    """

    classes: frozenset[int]
    count: int
    per_class: int | None
    there: Counter[int]

    @property
    def most(self) -> int:
        """Of one class."""
        return max(1, self.count if self.per_class is None else self.per_class)

    def needed(self, label: int) -> int:
        """Of a class, with `per_class`."""
        return max(0, (self.per_class or 0) - self.there[label])

    def shares(self, usable: Mapping[int, int]) -> dict[int, int]:
        """By class how many to draw: with those that are there as equally many as there are images for.

        Args:
            usable: by class, how many there are.
        """
        if self.per_class is not None:
            return {label: self.needed(label) for label in usable}
        drawn = dict.fromkeys(usable, 0)
        # The class with the fewest first.
        heap = [(self.there[label], label) for label in usable]
        heapq.heapify(heap)
        for _ in range(self.count):
            number, label = heap[0]
            drawn[label] += 1
            if drawn[label] < usable[label]:
                heapq.heapreplace(heap, (number + 1, label))
            else:
                heapq.heappop(heap)
        return drawn


class RealImages:
    """Images of a data set, drawn and stored as files in a spool, to be read in any order.

    Attributes:
        keys: of the drawn images.
        classes: theirs.
        usable: by class, distinct images to draw from.
        num_of_other_classes: images of classes that are not wanted.
        unusable: unusable images with their reasons.
    """

    def __init__(self, spool: Path, name: str, image_format: str) -> None:
        self._spool, self._name, self._format = spool, name, image_format
        self._places: list[tuple[int, int]] = []
        self._contexts: list[str] = []
        self._files: list[tuple[str, str]] = []
        self.keys: list[str] = []
        self.classes: list[int] = []
        self.usable: Counter[int] = Counter()
        self.num_of_other_classes = 0
        self.unusable: list[Unusable] = []

    def draw(
        self, address: str, labels: tuple[str, ...], wanted: WantedReal, seed: int, advance: Callable[[str], None]
    ) -> None:
        """Draw images without replacement, as many of each class as there are.

        Args:
            address: as for `engine.data.images.open_images`.

        Raises:
            JobError: there are fewer, or nothing that can be read.
        """
        source = open_images(address, labels, OPTION)
        drawn = self._ranked(source, wanted, seed, advance)
        if not drawn:
            raise JobError(self._nothing(source, address, wanted))
        self._check_enough(address, labels, wanted)
        shares = wanted.shares(self.usable)
        chosen = {number for label, heap in drawn.items() for _, number in heapq.nlargest(shares[label], heap)}
        self._store(source, chosen, advance)

    def _ranked(
        self, source: ImageSource, wanted: WantedReal, seed: int, advance: Callable[[str], None]
    ) -> dict[int, list[tuple[int, int]]]:
        """By class numbers of findings that may be drawn, with minus the digests of their pixels under the seed."""
        heaps: dict[int, list[tuple[int, int]]] = {}
        seen: set[bytes] = set()
        for number, item in enumerate(source.read()):
            advance(f"real image {number}")
            if isinstance(item, LabelledImage) and item.is_synthetic:
                item = Unusable(item.name, SYNTHETIC)
            if isinstance(item, Unusable):
                self.unusable.append(item)
                continue
            if item.class_index not in wanted.classes:
                self.num_of_other_classes += 1
                continue
            pixels = image_key(item.image)
            if pixels in seen:
                continue
            seen.add(pixels)
            self.usable[item.class_index] += 1
            rank = int.from_bytes(hashlib.blake2b(f"{seed}/".encode() + pixels, digest_size=16).digest())
            heap = heaps.setdefault(item.class_index, [])
            heapq.heappush(heap, (-rank, number))
            if len(heap) > wanted.most:
                heapq.heappop(heap)
        return heaps

    def _nothing(self, source: ImageSource, address: str, wanted: WantedReal) -> str:
        if not self.num_of_other_classes:
            return nothing_usable(source, OPTION, address, self.unusable)
        return (
            f"{OPTION}: '{address}' has no image of a class that the samples have; --real-classes all takes its"
            f" {self.num_of_other_classes} of others"
        )

    def _check_enough(self, address: str, labels: tuple[str, ...], wanted: WantedReal) -> None:
        """Refuse to mix in fewer images than were asked for."""
        if wanted.per_class is None:
            if (most := self.usable.total()) < wanted.count:
                others = self.num_of_other_classes
                of_others = f" (and {others} of classes that no sample has: --real-classes all)" if others else ""
                raise JobError(
                    f"--real-ratio: asks for {wanted.count} real images, and '{address}' has {most} that can be used"
                    f"{of_others}; give a lower ratio or more images"
                )
            return
        lacking = [label for label in sorted(wanted.classes) if self.usable[label] < wanted.needed(label)]
        if lacking:
            first = lacking[0]
            more = f" (and fewer than it takes of {len(lacking) - 1} more classes)" if len(lacking) > 1 else ""
            raise JobError(
                f"--real-per-class: asks for {wanted.needed(first)} real images of class '{labels[first]}', and"
                f" '{address}' has {self.usable[first]} that can be used{more}; give a lower number or more images"
            )

    def _store(self, source: ImageSource, numbers: set[int], advance: Callable[[str], None]) -> None:
        from engine.data.images.encoding import encode

        with explained(self._spool), self._spool.open("wb") as file:
            for number, item in enumerate(source.read()):
                if number not in numbers or not isinstance(item, LabelledImage):
                    continue
                data = encode(np.asarray(item.image), self._format)
                self._places.append((file.tell(), len(data)))
                self.keys.append(f"{self._name}-{REAL}-{item.class_index:03d}-{len(self.keys):08d}")
                self.classes.append(item.class_index)
                self._contexts.append(item.contexts[0] if len(item.contexts) == 1 else "")
                self._files.append((item.name, image_key(item.image).hex()))
                file.write(data)
                advance(f"real image {len(self.keys)} of {len(numbers)}")

    def read(self, number: int, labels: tuple[str, ...]) -> SampleResult:
        """A drawn image as a sample: of method `real`, without scores."""
        offset, size = self._places[number]
        with explained(self._spool), self._spool.open("rb") as file:
            file.seek(offset)
            image = file.read(size)
        label, (name, checksum) = self.classes[number], self._files[number]
        known: dict[str, Any] = {
            "key": self.keys[number],
            "request": REAL,
            "method": REAL,
            "class_name": labels[label],
            "class_index": label,
            "context": self._contexts[number],
            "index": number,
            "status": STATUS_OK,
            "predicted_class": NO_CLASS,
            "oracle_class": NO_CLASS,
            "soft_label": [float(index == label) for index in range(len(labels))],
            "accepted": True,
            "start_key": name,
            "start_sha256": checksum,
        }
        record = upgraded(known)
        run = {"batch_size": 0, "duration_seconds": 0.0, "attempt": 0, "worker": ""}
        return SampleResult(record=record, image=image, run=run)

    def close(self) -> None:
        """Remove the spool."""
        self._spool.unlink(missing_ok=True)
