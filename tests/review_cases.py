"""Runs to review, and raters who answer without a browser."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from engine.data.stores.base import Store
from engine.studies.review.design import Design, order_of
from engine.studies.review.options import DrawOptions
from engine.studies.review.program import Review, open_review
from engine.studies.review.records import AnswerBook, GivenAnswer
from tests.pair_cases import DIGITS, START, make_drawn_run, noise

GUIDED = {"name": "secretly-risky", "method": "risky", "classes": [3, 8], "count": 12, "twin": True, "start": START}
PLAIN = {"name": "by-prompt", "method": "prompt", "classes": [3, 8], "count": 6, "seed_group": "plain"}
SESSION = "a1b2c3d4e5f6a7b8"
TIME = 1_764_430_000_000


def make_reviewed_run(folder: Path, requests: Iterable[dict[str, Any]] = (GUIDED, PLAIN), size: int = 8) -> Store:
    """A finished run of noise, with starts, twins and a request without guidance."""
    return make_drawn_run(folder, list(requests), noise(size, levels=4))


def open_small(folder: Path | str, **options: Any) -> Review:
    """A review of few items."""
    few = {"num_samples": 12, "num_repeats": 2} | ({} if "is_pairs" in options else {"num_controls": 3})
    return open_review(str(folder), DrawOptions(**few | options))


def given(item: str, choice: int, after: int = 0, **changes: Any) -> GivenAnswer:
    """An answer some seconds after the others."""
    return GivenAnswer(**{"item": item, "choice": choice, "at": TIME + 1000 * after, "seconds": 1.5} | changes)


def answer_all(store: Store, design: Design, rater: str, choices: dict[str, int] | None = None) -> AnswerBook:
    """A rater who answers every item, by its label where nothing else is given."""
    book = AnswerBook(store, design, lambda text: None)
    answers = [
        given(item.id, (choices or {}).get(item.id, item.label), place)
        for place, (item, _) in enumerate(order_of(design, rater))
    ]
    book.add(rater, SESSION, answers)
    return book


def write_reals(folder: Path, sizes: Iterable[tuple[int, int]] = ((20, 30),) * 6) -> Path:
    """A folder by class with real images of other sizes."""
    for place, size in enumerate(sizes):
        name = DIGITS[place % 10]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name / f"photograph-{place}.png")
    return folder


def pixels_of(data: bytes) -> np.ndarray:
    """The pixels of an image file."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
