"""A review from its options: a design that is drawn or found again, and the page, the file or the answers of it."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.data.reading.corpus import Corpus, open_run
from engine.data.review.answers import check_rater, read_answers
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.studies.output_folders import check_replaces
from engine.studies.review.design import Design, read_design, store_design, stored_digests
from engine.studies.review.drawing import draw_design
from engine.studies.review.images import ReviewImages
from engine.studies.review.options import DrawOptions
from engine.studies.review.page import file_page
from engine.studies.review.records import AnswerBook
from engine.studies.review.server import ReviewServer, check_port, review_address

_FILE_BEGINNING = "<!doctype html>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A review that can be shown.

    Attributes:
        corpus: the run.
        design: as it is stored.
    """

    corpus: Corpus
    design: Design

    @property
    def store(self) -> Store:
        """Where the answers are stored."""
        return self.corpus.runs[0].store

    def counts(self) -> dict[str, int]:
        """Items of each kind."""
        return dict(sorted(Counter(item.kind for item in self.design.items).items()))


def open_review(
    run: str,
    options: DrawOptions,
    digest: str = "",
    *,
    notice: Callable[[str], None] = lambda text: None,
    advance: Callable[[str], None] = lambda text: None,
) -> Review:
    """Draw the design of a run, or find the one with a digest; equal options find their design again.

    Raises:
        JobError: an option cannot be used, or there is nothing to show.
        RiskforgeError: the run cannot be read, or not be written to.

    Side effects: stores the design.
    """
    corpus = open_run(run)
    store = corpus.runs[0].store
    if digest:
        return Review(corpus=corpus, design=read_design(store, digest))
    drawn = draw_design(corpus, options, advance)
    others = stored_digests(store)
    is_new = drawn.design.digest not in others
    store_design(store, drawn.design, drawn.images)
    store.leave()
    if is_new and others:
        most = _most_answered(store, others)
        notice(f"this is a new design; --design {most} goes on with an earlier one ({len(others)} in this run)")
    if not corpus.runs[0].is_finished:
        notice(
            "the run is not finished: the design is of the samples so far, and another one is drawn when there are more"
        )
    return Review(corpus=corpus, design=drawn.design)


def _most_answered(store: Store, digests: Sequence[str]) -> str:
    """The design with the most answers; files of answers that cannot be read do not count."""
    counts = Counter(read_answers(store)["design"].to_pylist())
    return max(digests, key=lambda digest: (counts[digest], digest))


def check_outlet(rater: str, path: Path | None, port: int | None) -> None:
    """Check before the draw that its design can be shown.

    Args:
        path: of the page of a file.

    Raises:
        JobError: the name of the rater or the port cannot be used.
        OutputError: another file has this name, or its folder is none.
    """
    if rater:
        check_rater(rater)
    if path is not None:
        check_replaces("--html", path, _FILE_BEGINNING)
        nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"--html: {nearest} is no folder that can be written to; choose another")
    if port is not None:
        check_port(port)


def open_reviewed(run: str) -> Store:
    """The store of a run that people have reviewed.

    Raises:
        JobError: there is no such folder.
    """
    store = open_store(run)
    if not store.is_there():
        raise JobError(f"RUN: there is no folder '{run}'; give the run that was reviewed")
    return store


@contextlib.contextmanager
def serving(
    review: Review,
    *,
    rater: str = "",
    port: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int], None] = lambda rater, number: None,
) -> Iterator[ReviewServer]:
    """A server of a review, to be started by `serve_forever`.

    Args:
        rater: whom answers are of; empty to ask on the page.
        port: in place of the run's own.
        notice: receives a line for each file of answers that is left out.
        progress: called with a rater and how many items are answered, from other threads.

    Raises:
        JobError: the name of the rater or the port cannot be used.
    """
    if rater:
        check_rater(rater)
    images = ReviewImages(review.corpus, review.design)
    book = AnswerBook(review.store, review.design, notice)
    address = review_address(str(review.store.place), port)
    server = ReviewServer(
        review.design, images, book, address, is_fixed=port is not None, rater=rater, progress=progress
    )
    try:
        yield server
    finally:
        server.server_close()
        images.close()
        review.store.leave()


def write_file(review: Review, path: Path, rater: str = "") -> int:
    """Write a page that holds its images; its bytes.

    Raises:
        JobError: the name of the rater cannot be one, or the file would be too large.
        OutputError: another file has this name, or it cannot be written.
    """
    if rater:
        check_rater(rater)
    check_replaces("--html", path, _FILE_BEGINNING)
    images = ReviewImages(review.corpus, review.design)
    try:
        page = file_page(review.design, rater, images.png)
    finally:
        images.close()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    return len(page)
