"""From right and wrong predictions to figures: accuracies of the arms by context, and error rates of both kinds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.retrain.arm_records import BEFORE, NONE
from engine.studies.retrain.changes import ArmChange, Right, compare_arms, rows_by_context

NO_CONTEXT = "no context"
ALL = "all images"
HELD_OUT = "generated, held out"
MIN_RANKED_SAMPLES = 10
MIN_RANKED_CONTEXTS = 3


class Attempt(NamedTuple):
    """The target's prediction for a generated sample, and whether the sample shows the requested class."""

    context: str
    is_valid: bool
    is_error: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """Accuracies on the test images of one context, or on all.

    Attributes:
        before: of the target as it is, with Wilson's interval over the images.
        accuracies: by arm, seed by seed.
        differences: by arm, the mean paired difference to `none` with its interval over seeds and images.
    """

    context: str
    num_images: int
    before: Estimate
    accuracies: dict[str, tuple[float, ...]]
    differences: dict[str, Estimate]

    def mean(self, arm: str) -> float:
        """Mean accuracy of an arm over the seeds."""
        return math.fsum(self.accuracies[arm]) / len(self.accuracies[arm])


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All arms on the test images: overall, and by context from the weakest to the strongest before.

    Attributes:
        changes: of every arm against `none`, then of every arm against `before`.
        held_out: on the generated samples that none was trained on; None where there are none.
    """

    overall: AccuracyRow
    contexts: tuple[AccuracyRow, ...]
    changes: tuple[ArmChange, ...]
    held_out: AccuracyRow | None = None

    def change(self, arm: str, base: str) -> ArmChange:
        """What an arm changes against another."""
        return next(change for change in self.changes if (change.arm, change.base) == (arm, base))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextErrors:
    """Error rates in a context that both the generated samples and the test images have.

    Attributes:
        generated: error rate of the target among valid generated samples; None without any.
        test: its error rate among the test images.
    """

    context: str
    num_generated: int
    generated: Estimate | None
    num_test: int
    test: Estimate

    @property
    def is_ranked(self) -> bool:
        """Whether both sides have enough samples for the correlation."""
        return min(self.num_generated, self.num_test) >= MIN_RANKED_SAMPLES


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAgreement:
    """Whether the target errs on generated samples in the same contexts as on test images.

    Attributes:
        spearman: rank correlation over the ranked contexts; None where it is undefined, for this `reason`.
    """

    rows: tuple[ContextErrors, ...]
    spearman: float | None
    reason: str

    @property
    def num_ranked(self) -> int:
        """Contexts in the correlation."""
        return sum(row.is_ranked for row in self.rows)


def compare(
    right: Right, contexts: Sequence[tuple[str, ...]], held_out: Right | None = None, origins: Sequence[str] = ()
) -> Comparison:
    """Figures of all arms.

    Args:
        right: by arm and seed, whether the prediction of each test image is right, [N]; of `before` once.
        contexts: of each test image; an image without any only counts overall.
        held_out: as `right`, of the generated samples that are held out of training.
        origins: of each test image, as `compare_arms` takes them.
    """
    pairs = [(arm, base) for base in (NONE, BEFORE) for arm in right if arm not in (base, BEFORE)]
    changes = tuple(compare_arms(right, contexts, arm=arm, base=base, origins=origins) for arm, base in pairs)
    to_none = [change for change in changes if change.base == NONE]
    differences = {
        row.context: {change.arm: change.contexts[place].change for change in to_none}
        for place, row in enumerate(changes[0].contexts)
    }
    rows = [_row(tag, right, members, differences[tag]) for tag, members in rows_by_context(contexts).items()]
    return Comparison(
        overall=_row(ALL, right, np.arange(len(contexts)), {change.arm: change.overall for change in to_none}),
        held_out=_held_out_row(held_out) if held_out else None,
        contexts=tuple(sorted(rows, key=lambda row: (row.before.value, row.context))),
        changes=changes,
    )


def _held_out_row(right: Right) -> AccuracyRow:
    """Figures of the generated samples that are held out."""
    samples = np.arange(len(right[BEFORE][0]))
    arms = [arm for arm in right if arm not in (BEFORE, NONE)]
    differences = {arm: compare_arms(right, [()] * len(samples), arm=arm, base=NONE).overall for arm in arms}
    return _row(HELD_OUT, right, samples, differences)


def _row(context: str, right: Right, members: NDArray[np.int64], differences: dict[str, Estimate]) -> AccuracyRow:
    before = right[BEFORE][0][members]
    return AccuracyRow(
        context=context,
        num_images=len(members),
        before=wilson_interval(int(before.sum()), len(members)),
        accuracies={
            arm: tuple(float(of_seed[members].mean()) for of_seed in seeds)
            for arm, seeds in right.items()
            if arm != BEFORE
        },
        differences=differences,
    )


def compare_errors(generated: Iterable[Attempt], comparison: Comparison) -> ErrorAgreement:
    """Errors of the target on valid generated samples compared with those on the test images, context by context."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for attempt in generated:
        counts[attempt.context][attempt.is_error] += attempt.is_valid
    rows = tuple(_context_errors(row, *counts[row.context]) for row in comparison.contexts if row.context in counts)
    spearman, reason = _spearman([row for row in rows if row.is_ranked])
    return ErrorAgreement(rows=rows, spearman=spearman, reason=reason)


def _context_errors(row: AccuracyRow, num_right: int, num_errors: int) -> ContextErrors:
    wrong = row.num_images - round(row.before.value * row.num_images)
    total = num_right + num_errors
    return ContextErrors(
        context=row.context,
        num_generated=total,
        generated=wilson_interval(num_errors, total) if total else None,
        num_test=row.num_images,
        test=wilson_interval(wrong, row.num_images),
    )


def _spearman(rows: list[ContextErrors]) -> tuple[float | None, str]:
    """The rank correlation, or None and why it is undefined."""
    from scipy.stats import spearmanr

    if len(rows) < MIN_RANKED_CONTEXTS:
        return None, (
            f"{len(rows)} contexts have {MIN_RANKED_SAMPLES} valid generated samples and as many test images; a rank"
            f" correlation needs {MIN_RANKED_CONTEXTS}"
        )
    pairs = np.array([[row.generated.value, row.test.value] for row in rows if row.generated])
    if (pairs == pairs[0]).all(0).any():
        return None, "one of the two error rates is the same in all contexts"
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic), ""


def context_name(context: str) -> str:
    """The displayed name of a context."""
    return context or NO_CONTEXT


def points(difference: Estimate) -> str:
    """A difference of shares with its interval, in percentage points."""
    value, low, high = (round(100 * share, 1) + 0.0 for share in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
