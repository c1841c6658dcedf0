"""The images of a review as a browser receives them: pixels alone, in one format, whatever file they came from."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from engine.data.images import decode_stored
from engine.data.reading.corpus import Corpus
from engine.data.reading.pairs import PairRows
from engine.data.run.tar_index import TarReader, index_tars
from engine.errors import CorruptShardError
from engine.job.columns import PAIR_COLUMNS
from engine.studies.review.design import Design, ItemImage, Source, stored_images

if TYPE_CHECKING:
    import PIL.Image

_NUM_KEPT = 64


def png_bytes(image: PIL.Image.Image) -> bytes:
    """An image as PNG without any metadata: marks of synthetic images, prompts and the like stay here."""
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "png")
    return buffer.getvalue()


@contextlib.contextmanager
def reading_samples(corpus: Corpus, keys: Iterable[str]) -> Iterator[Callable[[str], PIL.Image.Image]]:
    """A function that reads the images of some samples of a run by their keys."""
    images = _RunImages(corpus, keys)
    try:
        yield lambda key: images.read("samples", key)
    finally:
        images.close()


class _RunImages:
    """Images of a run by the keys of samples.

    Args:
        keys: of the samples whose own images are read.
    """

    def __init__(self, corpus: Corpus, keys: Iterable[str]) -> None:
        run = corpus.runs[0]
        self._where = run.uri
        self._stored = corpus.with_images(rejected=True, surplus=True)
        self._places = index_tars(run.tars, sorted(keys))
        self._reader = TarReader(run.tars)

    def read(self, source: Source, key: str) -> PIL.Image.Image:
        """The image of a sample, its start or its twin.

        Raises:
            CorruptShardError: it is missing or damaged.
        """
        data = self._reader.read(self._places[key].image) if source == "samples" else self._companion(source, key)
        return decode_stored(data, f"{self._where}: the image of {key!r} in {source}/")

    def _companion(self, source: Source, key: str) -> bytes:
        file = self._pairs.start(key) if source == "starts" else self._pairs.twin(key)
        if file is None:
            raise CorruptShardError(
                f"{self._where}: has nothing of {key!r} in {source}/; `riskforge verify` reports what is damaged"
            )
        return file.data

    @functools.cached_property
    def _pairs(self) -> PairRows:
        return PairRows(self._stored.runs[0], self._stored.run_table(0, PAIR_COLUMNS))

    def close(self) -> None:
        """Close the tars."""
        self._reader.close()
        if "_pairs" in self.__dict__:
            self._pairs.close()


class ReviewImages:
    """The images of a design as PNG files, for several threads.

    Args:
        corpus: the run, without a filter.

    Raises:
        OutputError: images that the design stores are missing.
    """

    def __init__(self, corpus: Corpus, design: Design) -> None:
        samples = {image.name for item in design.items for image in item.images if image.source == "samples"}
        self._images = _RunImages(corpus, samples)
        self._stored = stored_images(corpus.runs[0].store, design)
        self._kept: OrderedDict[ItemImage, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def png(self, image: ItemImage) -> bytes:
        """The PNG of an image.

        Raises:
            CorruptShardError: it is missing or damaged.
        """
        if image.source == "stored":
            return self._stored[image.name]
        with self._lock:
            if image not in self._kept:
                self._kept[image] = png_bytes(self._images.read(image.source, image.name))
            self._kept.move_to_end(image)
            while len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
            return self._kept[image]

    def close(self) -> None:
        """Close the tars of the run."""
        self._images.close()
