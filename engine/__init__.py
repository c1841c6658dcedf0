"""Riskforge: manufactures labelled images on which a classifier fails or hesitates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.dataset.corpus import Corpus

__version__ = "0.1.0"


def open_run(uri: str, *more: str) -> Corpus:
    """The rows and images of one run or of several, finished or not: see `docs/reading.md`.

    Args:
        uri: folder of a run, of a merged data set, or of scores made anew for a run.

    Raises:
        RiskforgeError: one of them is not there, or cannot be read.
    """
    from engine.dataset.corpus import open_corpus

    return open_corpus(uri, *more)
