"""Riskforge: manufactures labelled images on which a classifier fails or hesitates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data.images import LabelledImage, Unusable, open_images
    from engine.data.reading.corpus import Corpus

__version__ = "0.1.0"
__all__ = ["LabelledImage", "Unusable", "open_images", "open_run"]


def __getattr__(name: str) -> Any:
    """What reads images is imported when it is asked for: it needs NumPy, which `--help` does not wait for."""
    if name in ("LabelledImage", "Unusable", "open_images"):
        import engine.data.images

        return getattr(engine.data.images, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_run(uri: str, *more: str) -> Corpus:
    """The rows and images of one run or of several, finished or not: see `docs/reading.md`.

    Args:
        uri: folder of a run, of a merged data set, or of scores made anew for a run.

    Raises:
        RiskforgeError: one of them is not there, or cannot be read.
    """
    from engine.data.reading.corpus import open_corpus

    return open_corpus(uri, *more)
