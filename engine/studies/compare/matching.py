"""Which samples of two runs are compared with each other: pairs, or two groups of one mixture.

A sample of one run is the pair of a sample of the other where request, prompt and seed are equal: both began with the
same noise. A request whose samples are pairs is compared pair by pair, any other as two groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.studies.compare.scored_run import Rows, ScoredRun

# Fewer samples than this on a side are not compared.
MIN_SAMPLES = 5
# With fewer pairs than this share of the smaller side, a request is compared as two groups.
MIN_PAIRED_SHARE = 0.8
# How much more one class and context may have grown in number than another, before groups are cut to equal parts.
MAX_IMBALANCE = 1.1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Match:
    """The rows of a request that are compared.

    Attributes:
        old, new: rows in the two runs; of pairs, row by row.
        notes: which samples are not compared, and why.
    """

    old: Rows
    new: Rows
    is_paired: bool
    notes: list[str]

    @property
    def is_enough(self) -> bool:
        """Whether both sides have enough samples."""
        return min(len(self.old), len(self.new)) >= MIN_SAMPLES


def match_rows(old: ScoredRun, new: ScoredRun, request: str) -> Match:
    """The rows of a request that are compared: its pairs, or without enough of them two groups."""
    a, b = (np.flatnonzero(run.requests == request) for run in (old, new))
    return _match_pairs(old, new, a, b, request) or _match_groups(old, new, a, b, request)


def _match_pairs(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows, request: str) -> Match | None:
    """The pairs among rows; None where there are too few of them, or one sample would be in two."""
    first, second = pairs_among(old, new, a, b)
    if len(first) < max(MIN_SAMPLES, MIN_PAIRED_SHARE * min(len(a), len(b))):
        return None
    left = [len(side) - len(first) for side in (a, b)]
    notes = [f"request {request!r}: {left[0]} and {left[1]} samples without a pair are left out"] if any(left) else []
    return Match(old=first, new=second, is_paired=True, notes=notes)


def pairs_among(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """The pairs among rows of both runs, row by row; none where one sample would be in two."""
    first, second = _identities(old, new, a, b)
    if any(len(np.unique(side)) != len(side) for side in (first, second)):
        return a[:0], b[:0]
    _, of_a, of_b = np.intersect1d(first, second, return_indices=True)
    order = np.argsort(of_a)
    return a[of_a[order]], b[of_b[order]]


def _match_groups(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows, request: str) -> Match:
    """Rows of the classes and contexts that both runs have, in equal shares: another mixture would be a difference."""
    notes, num_before = [], len(a) + len(b)
    strata = [set(zip(run.classes[rows], run.contexts[rows], strict=True)) for run, rows in ((old, a), (new, b))]
    if strata[0] != strata[1]:
        common = strata[0] & strata[1]
        notes.append(
            f"request {request!r}: only the {len(common)} classes and contexts that both runs have are compared"
        )
        a, b = (
            np.array([row for row in rows if (run.classes[row], run.contexts[row]) in common], dtype=np.intp)
            for run, rows in ((old, a), (new, b))
        )
        num_before = len(a) + len(b)
    a, b = _balanced(old, new, a, b)
    if left_out := num_before - len(a) - len(b):
        notes.append(
            f"request {request!r}: {left_out} samples are left out, so that both runs have each class and context"
            " equally often"
        )
    match = Match(old=a, new=b, is_paired=False, notes=notes)
    if not match.is_enough:
        notes[:] = [f"request {request!r}: {len(a)} and {len(b)} samples are too few to compare"]
    return match


def _identities(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A number for each row of both runs, [A] and [B], equal where prompt and seed are."""
    known: dict[str, int] = {}
    sides = ((old, a), (new, b))
    prompts = np.array([known.setdefault(text, len(known)) for run, rows in sides for text in run.prompts[rows]])
    seeds, codes = np.unique(np.concatenate([run.seeds[rows] for run, rows in sides]), return_inverse=True)
    numbers = prompts.astype(np.int64) * len(seeds) + codes
    return numbers[: len(a)], numbers[len(a) :]


def _balanced(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """Rows of both runs with the same mixture of classes and contexts; all of them where it is nearly the same already.

    A quota makes more attempts where fewer are accepted, so that an easy class is a larger part where it became easier.
    Of a class and context that has more in one run the first ones by key are kept, as many as the other run has.
    """
    sides: tuple[dict[tuple[str, str], list[int]], ...] = ({}, {})
    for strata, run, rows in zip(sides, (old, new), (a, b), strict=True):
        for row in sorted(rows.tolist(), key=lambda row: str(run.keys[row])):
            strata.setdefault((run.classes[row], run.contexts[row]), []).append(row)
    ratios = [len(sides[1][name]) / len(rows) for name, rows in sides[0].items()]
    if not ratios or max(ratios) <= MAX_IMBALANCE * min(ratios):
        return a, b
    kept = [
        [row for name, rows in strata.items() for row in rows[: min(len(sides[0][name]), len(sides[1][name]))]]
        for strata in sides
    ]
    return np.array(sorted(kept[0]), dtype=np.intp), np.array(sorted(kept[1]), dtype=np.intp)
