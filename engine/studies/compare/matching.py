"""Which samples of two runs are compared with each other: pairs, or two groups of one mixture.

A sample of one run is the pair of a sample of the other where request, prompt and seed are equal: both began with the
same noise. A request whose samples are pairs is compared pair by pair, any other as two groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.studies.compare.scored_run import Rows, ScoredRun

if TYPE_CHECKING:
    pass

# Fewer samples than this on a side are not compared.
MIN_SAMPLES = 5
# With fewer pairs than this share of the smaller side, a request is compared as two groups.
MIN_PAIRED_SHARE = 0.8
# How much more one class and context may have grown in number than another, before groups are cut to equal parts.
MAX_IMBALANCE = 1.1


def match_rows(old: ScoredRun, new: ScoredRun, request: str) -> tuple[tuple[Rows, Rows] | None, bool, list[str]]:
    """Rows of a request in both runs, whether they are pairs, and what is left out; no rows where there are too few.

    Without pairs only classes and contexts count that both runs have, and in equal parts: another mixture would differ
    by itself.
    """
    a, b = (np.flatnonzero(one.requests == request) for one in (old, new))
    first, second = _identities(old, new, a, b)
    is_unique = all(len(np.unique(side)) == len(side) for side in (first, second))
    shared, of_a, of_b = np.intersect1d(first, second, return_indices=True)
    if is_unique and len(shared) >= max(MIN_SAMPLES, MIN_PAIRED_SHARE * min(len(a), len(b))):
        order = np.argsort(of_a)
        rows = (a[of_a[order]], b[of_b[order]])
        left = [len(side) - len(shared) for side in (first, second)]
        about = (
            [f"request {request!r}: {left[0]} and {left[1]} samples without a pair are left out"] if any(left) else []
        )
        return (rows[0], rows[1]), True, about
    strata = [set(zip(one.classes[rows], one.contexts[rows], strict=True)) for one, rows in ((old, a), (new, b))]
    common, about = strata[0] & strata[1], []
    if strata[0] != strata[1]:
        about = [f"request {request!r}: only the {len(common)} classes and contexts that both runs have are compared"]
        a, b = (
            np.array([row for row in rows if (one.classes[row], one.contexts[row]) in common], dtype=np.intp)
            for one, rows in ((old, a), (new, b))
        )
    before = len(a) + len(b)
    a, b = _balanced(old, new, a, b)
    if left_out := before - len(a) - len(b):
        about.append(
            f"request {request!r}: {left_out} samples are left out, so that both runs have each class and context"
            " equally often"
        )
    if min(len(a), len(b)) < MIN_SAMPLES:
        return None, False, [f"request {request!r}: {len(a)} and {len(b)} samples are too few to compare"]
    return (a, b), False, about


def _identities(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A number for each row of both runs, equal where prompt and seed are."""
    known: dict[str, int] = {}
    sides = ((old, a), (new, b))
    prompts = np.array([known.setdefault(text, len(known)) for one, rows in sides for text in one.prompts[rows]])
    seeds, codes = np.unique(np.concatenate([one.seeds[rows] for one, rows in sides]), return_inverse=True)
    numbers = prompts.astype(np.int64) * len(seeds) + codes
    return numbers[: len(a)], numbers[len(a) :]


def _balanced(old: ScoredRun, new: ScoredRun, a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """Rows of both runs with one mixture of classes and contexts; all of them where it is about one already.

    A quota makes more attempts where fewer are accepted, so that an easy class is a larger part where it became easier.
    Of a class and context that has more in one run the first ones by key are kept, as many as the other run has.
    """
    found: tuple[dict[tuple[str, str], list[int]], ...] = ({}, {})
    for strata, one, rows in zip(found, (old, new), (a, b), strict=True):
        for row in sorted(rows.tolist(), key=lambda row: str(one.keys[row])):
            strata.setdefault((one.classes[row], one.contexts[row]), []).append(row)
    ratios = [len(found[1][name]) / len(rows) for name, rows in found[0].items()]
    if not ratios or max(ratios) <= MAX_IMBALANCE * min(ratios):
        return a, b
    kept = [
        [row for name, rows in strata.items() for row in rows[: min(len(found[0][name]), len(found[1][name]))]]
        for strata in found
    ]
    return np.array(sorted(kept[0]), dtype=np.intp), np.array(sorted(kept[1]), dtype=np.intp)
