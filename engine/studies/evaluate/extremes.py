"""Real images and samples at both ends of a score: near the boundary and far from it, of high and of low risk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from engine.data.run.counts import is_joint
from engine.job.columns import BY_NAME
from engine.methods import scores
from engine.methods.registry import Method
from engine.report.evaluation import Extremes, Row, Shown
from engine.report.text import number

MAX_SUBSETS = 6
MAX_CLASSES = 6
PER_ROW = 6

Show = Callable[[int, str], Shown]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoredImages:
    """Real images and samples with the outputs of the target.

    Attributes:
        logits, classes: of the real images, [N, n] and [N].
        records: of the samples.
        methods: by request.
        labels: displayed names of the classes, by index.
        show_real, show_sample: add an image, given by its row, and its caption to the report.
    """

    logits: NDArray[np.float32]
    classes: NDArray[np.int64]
    records: Sequence[dict[str, Any]]
    methods: Mapping[str, Method]
    labels: Sequence[str]
    show_real: Show
    show_sample: Show


def boundary_extremes(scored: ScoredImages) -> Iterator[Extremes]:
    """Images nearest to the boundary and farthest from it, for the first subsets of boundary requests."""
    subsets: dict[tuple[int, ...], list[int]] = {}
    for row, record in enumerate(scored.records):
        if scored.methods[record["request"]].extremes == "kldb" and is_joint(record["key"]):
            subsets.setdefault(tuple(record["kldb_classes"]), []).append(row)
    for subset, rows in list(subsets.items())[:MAX_SUBSETS]:
        real = np.flatnonzero(np.isin(scored.classes, subset))
        values = scores.kldb(torch.from_numpy(scored.logits[real]), list(subset)).numpy()
        title = " and ".join(scored.labels[index] for index in subset)
        yield _extremes(scored, title, "kldb", real, values, rows, ("nearest", "farthest"), lowest_first=True)


def risk_extremes(scored: ScoredImages) -> Iterator[Extremes]:
    """Images of the highest and of the lowest risk, for the first classes of risky requests."""
    classes: dict[int, list[int]] = {}
    for row, record in enumerate(scored.records):
        if scored.methods[record["request"]].extremes == "risk":
            classes.setdefault(record["class_index"], []).append(row)
    for index, rows in sorted(classes.items())[:MAX_CLASSES]:
        real = np.flatnonzero(scored.classes == index)
        values = scores.risk(torch.from_numpy(scored.logits[real]), torch.full((len(real),), index)).numpy()
        ends = ("of the highest risk", "of the lowest risk")
        yield _extremes(scored, scored.labels[index], "risk", real, values, rows, ends, lowest_first=False)


def _extremes(
    scored: ScoredImages, title: str, score: Literal["kldb", "risk"], real: NDArray[np.int64],
    values: NDArray[np.float32], rows: Sequence[int], ends: tuple[str, str], *, lowest_first: bool,
) -> Extremes:  # fmt: skip
    """A row of images for each end and kind that there are images of.

    Args:
        real: rows of the real images, [R].
        values: their scores, [R].
        rows: rows of the samples.
    """
    of_samples = np.array([scored.records[row][score] for row in rows], dtype=np.float64)
    label = BY_NAME[score].label
    lines = []
    for place, end in enumerate(ends):
        is_rising = lowest_first == (place == 0)
        for kind, numbers, scores_of_kind, show in (
            ("Real", real, values.astype(np.float64), scored.show_real),
            ("Samples", np.array(rows), of_samples, scored.show_sample),
        ):
            chosen = _end(scores_of_kind, is_rising)
            if len(chosen):
                captions = [f"{label} {number(float(scores_of_kind[place]))}" for place in chosen]
                images = tuple(show(int(numbers[at]), text) for at, text in zip(chosen, captions, strict=True))
                lines.append(Row(title=f"{kind}, {end}", images=images))
    return Extremes(
        title=title,
        score=score,
        num_real=len(real),
        num_samples=len(rows),
        median_real=float(np.median(values)) if len(values) else None,
        median_samples=float(np.median(of_samples)) if len(of_samples) else None,
        rows=tuple(lines),
    )


def _end(values: NDArray[np.float64], is_rising: bool) -> NDArray[np.int64]:
    """Places of the values at an end, at most half of them, so that both ends differ."""
    order = np.argsort(values if is_rising else -values, kind="stable")
    return np.asarray(order[: min(PER_ROW, -(-len(values) // 2))])
