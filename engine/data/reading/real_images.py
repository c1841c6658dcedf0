"""Real labelled images as samples of an export: drawn independently of their order, equal pixels only once."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
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


class RealImages:
    """Images of a data set, drawn and stored as files in a spool, to be read in any order.

    Attributes:
        keys: of the drawn images.
        classes: theirs.
        num_usable: distinct images to draw from.
        unusable: unusable images with their reasons.
    """

    def __init__(self, spool: Path, name: str, image_format: str) -> None:
        self._spool, self._name, self._format = spool, name, image_format
        self._places: list[tuple[int, int]] = []
        self._contexts: list[str] = []
        self.keys: list[str] = []
        self.classes: list[int] = []
        self.num_usable = 0
        self.unusable: list[Unusable] = []

    def draw(
        self, address: str, labels: tuple[str, ...], count: int, seed: int, advance: Callable[[str], None]
    ) -> None:
        """Draw images without replacement.

        Args:
            address: as for `engine.data.images.open_images`.

        Raises:
            JobError: there are fewer, or nothing that can be read.
        """
        source = open_images(address, labels, OPTION)
        numbers = self._choose(source, count, seed, advance)
        if not self.num_usable:
            raise JobError(nothing_usable(source, OPTION, address, self.unusable))
        if self.num_usable < count:
            most = self.num_usable
            raise JobError(
                f"--real-ratio: asks for {count} real images, and '{address}' has {most} that can be used; give a lower"
                " ratio or more images"
            )
        self._store(source, set(numbers), advance)

    def _choose(self, source: ImageSource, count: int, seed: int, advance: Callable[[str], None]) -> list[int]:
        """Numbers of the drawn findings: those whose pixels have the smallest digests under the seed."""
        heap: list[tuple[int, int]] = []
        seen: set[bytes] = set()
        for number, item in enumerate(source.read()):
            advance(f"real image {number}")
            if isinstance(item, LabelledImage) and item.is_synthetic:
                item = Unusable(item.name, SYNTHETIC)
            if isinstance(item, Unusable):
                self.unusable.append(item)
                continue
            pixels = image_key(item.image)
            if pixels in seen:
                continue
            seen.add(pixels)
            rank = int.from_bytes(hashlib.blake2b(f"{seed}/".encode() + pixels, digest_size=16).digest())
            heapq.heappush(heap, (-rank, number))
            if len(heap) > count:
                heapq.heappop(heap)
        self.num_usable = len(seen)
        return [number for _, number in heap]

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
                file.write(data)
                advance(f"real image {len(self.keys)} of {len(numbers)}")

    def read(self, number: int, labels: tuple[str, ...]) -> SampleResult:
        """A drawn image as a sample: of method `real`, without scores."""
        offset, size = self._places[number]
        with explained(self._spool), self._spool.open("rb") as file:
            file.seek(offset)
            image = file.read(size)
        label = self.classes[number]
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
        }
        record = upgraded(known)
        run = {"batch_size": 0, "duration_seconds": 0.0, "attempt": 0, "worker": ""}
        return SampleResult(record=record, image=image, run=run)

    def close(self) -> None:
        """Remove the spool."""
        self._spool.unlink(missing_ok=True)
