"""Answers of synthetic raters to a stored design, written as those of people are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from engine.data.review.answers import Answer, append_answers
from engine.studies.review.design import Design, Item
from engine.studies.review.options import DrawOptions
from engine.studies.review.program import Review, open_review

# The class that an image shows, by item; -1 for none.
Truth = Callable[[Item], int]


def drawn(run: Path | str, **options: object) -> Review:
    """A review of a run with its design stored."""
    return open_review(str(run), DrawOptions(**options))  # type: ignore[arg-type]


def answer(
    review: Review,
    raters: Mapping[str, float],
    truth: Truth = lambda item: item.label,
    *,
    only: Iterable[str] | None = None,
    minute: int = 0,
) -> None:
    """Let raters answer every item.

    Args:
        raters: by name, the share of answers that are another class than the image shows, or none.
        truth: what an image shows.
        only: keys of the items that are answered; default: all.
        minute: of the answers.
    """
    keys = None if only is None else set(only)
    digest = review.design.digest
    for name, error in raters.items():
        records = [
            make_answer(review.design, item, name, _said(review.design, item, name, error, truth), minute, digest)
            for item in review.design.items
            if keys is None or item.key in keys
        ]
        append_answers(review.store, name, records)


def make_answer(
    design: Design, item: Item, rater: str, said: int, minute: int = 0, digest: str | None = None
) -> Answer:
    """The record of an answer.

    Args:
        digest: of the design, where it is known.
    """
    return {
        "version": 1, "rater": rater, "session": f"s{minute}", "item": item.id, "key": item.key, "kind": item.kind,
        "mode": design.mode, "answer": design.labels[said] if said >= 0 else "", "answer_class": said,
        "other_key": item.other_key, "question_class": item.question_class, "label": item.label,
        "subset": list(item.subset), "stratum": item.stratum, "weight": item.weight, "retracted": False,
        "seconds": 1.5, "answered_at": f"2026-01-01T00:{minute:02d}:00+00:00", "design": digest or design.digest,
    }  # fmt: skip


def _said(design: Design, item: Item, rater: str, error: float, truth: Truth) -> int:
    """What a rater says: errors are drawn anew for a repetition, and are wrong each time."""
    draw = random.Random(f"{rater} {item.id}")
    shown = truth(item)
    if draw.random() >= error:
        return shown
    return draw.choice([index for index in range(-1, len(design.labels)) if index != shown])
