"""Raters: their controls and repetitions, and how far they agree with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.data.reading.people.results import Count, RaterResult
from engine.data.review.agreements import says_label
from engine.data.review.answers import CONTROL_PLAIN, CONTROL_REAL, REPEAT
from engine.methods.agreement import MISSING, Agreement, krippendorff_alpha

if TYPE_CHECKING:
    import pyarrow as pa


def rater_results(answers: pa.Table) -> tuple[RaterResult, ...]:
    """Each rater by name.

    Args:
        answers: to the choices of one design.
    """
    import pyarrow.compute as pc

    names = sorted(set(answers["rater"].to_pylist()))
    return tuple(_rater(name, answers.filter(pc.equal(answers["rater"], name)).combine_chunks()) for name in names)


def _rater(name: str, answers: pa.Table) -> RaterResult:
    kinds = np.array(answers["kind"].to_pylist(), dtype=object)
    says, given = says_label(answers), answers["answer_class"].to_numpy()
    keys = answers["key"].to_pylist()
    first = {key: int(value) for key, value, kind in zip(keys, given, kinds, strict=True) if kind != REPEAT}
    pairs = [
        (first[key], int(value))
        for key, value, kind in zip(keys, given, kinds, strict=True)
        if kind == REPEAT and key in first
    ]
    return RaterResult(
        name=name,
        num_answers=len(answers),
        num_none=int((given < 0).sum()),
        real=_right(says[kinds == CONTROL_REAL]),
        plain=_right(says[kinds == CONTROL_PLAIN]),
        repeats=Count(num_right=sum(one == other for one, other in pairs), total=len(pairs)),
        seconds=float(np.median(answers["seconds"].to_numpy())),
    )


def _right(says: np.ndarray) -> Count:
    return Count(num_right=int(says.sum()), total=len(says))


def agreement_of(samples: pa.Table) -> Agreement:
    """Krippendorff's alpha over the samples; "none of these" is a category as the classes are."""
    keys, raters = (samples[name].combine_chunks().dictionary_encode() for name in ("key", "rater"))
    answers = np.full((len(keys.dictionary), len(raters.dictionary)), MISSING, dtype=np.int64)
    # The last answer of a rater counts where designs were mixed.
    answers[keys.indices.to_numpy(), raters.indices.to_numpy()] = np.maximum(samples["answer_class"].to_numpy(), -1)
    return krippendorff_alpha(answers)
