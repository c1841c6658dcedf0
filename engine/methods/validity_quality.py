"""How well estimates of the share of people who say a label order and predict what people said of N images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# From this share of people on, people agree with a label.
AGREED = 0.8
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)
ALL, ERRS, RIGHT = "all", "target errs", "target right"
_MAX_BINS = 10
_MIN_PER_BIN = 10
_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdQuality:
    """What becomes of images that are accepted from a threshold on; None where there is no image to count.

    Attributes:
        share_kept: of the images.
        precision: share of the kept images with whose label people agree (at least `AGREED` of them).
        people: mean share of people who say the label of a kept image.
        wrong_pass: wrong-label pass rate: share kept of the images with whose label people do not agree.
        rejected_pass: the same of the images whose label fewer than half of the people say.
    """

    threshold: float
    share_kept: float
    precision: float | None
    people: float | None
    wrong_pass: float | None
    rejected_pass: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumQuality:
    """Quality on a group of images. A figure that needs images of both kinds is None without them.

    Attributes:
        name: `ALL`, `ERRS` or `RIGHT`.
        num_agreed: images with whose label people agree.
        auc: probability that an image of those has the higher estimate than one of the others.
        calibration_error: mean distance of estimates and shares of people, over bins of equally many images (ECE).
        calibration_error_agreed: the same to the share of images that people agree with.
        brier: mean squared distance of the estimates and single answers.
    """

    name: str
    num_images: int
    num_agreed: int
    auc: float | None
    calibration_error: float
    calibration_error_agreed: float
    brier: float
    thresholds: tuple[ThresholdQuality, ...]


def qualities(
    estimates: np.ndarray, num_agreeing: np.ndarray, num_asked: np.ndarray, target_errs: np.ndarray
) -> tuple[StratumQuality, ...]:
    """The quality of estimates [N] on all images, on those on which the target errs, and on the others.

    Args:
        num_agreeing, num_asked: people who said the label, and who were asked, [N] each.
        target_errs: [N] booleans.

    Groups without an image are left out.
    """
    groups = ((ALL, np.ones(len(estimates), dtype=bool)), (ERRS, target_errs), (RIGHT, ~target_errs))
    shares = num_agreeing / num_asked
    return tuple(_quality(name, estimates[rows], shares[rows]) for name, rows in groups if rows.any())


def _quality(name: str, estimates: np.ndarray, shares: np.ndarray) -> StratumQuality:
    agreed = has_agreed(shares)
    answers = shares * (1 - estimates) ** 2 + (1 - shares) * estimates**2
    return StratumQuality(
        name=name,
        num_images=len(shares),
        num_agreed=int(agreed.sum()),
        auc=auc(estimates, agreed),
        calibration_error=rounded(calibration_error(estimates, shares)),
        calibration_error_agreed=rounded(calibration_error(estimates, agreed.astype(float))),
        brier=rounded(float(answers.mean())),
        thresholds=tuple(kept_quality(estimates >= threshold, shares, threshold) for threshold in THRESHOLDS),
    )


def has_agreed(shares: np.ndarray) -> np.ndarray:
    """Whether people agree with the labels, by the share of them who say it, [N]."""
    # 4 of 5 are 0.8, whatever the rounding of the quotient.
    return shares >= AGREED - 1e-9


def kept_quality(kept: np.ndarray, shares: np.ndarray, threshold: float = math.nan) -> ThresholdQuality:
    """What a rule that keeps some of N images does.

    Args:
        kept: [N] booleans.
        shares: of people who say the label, [N].
        threshold: of the rule, where it has one.
    """
    agreed, rejected = has_agreed(shares), shares < 0.5
    return ThresholdQuality(
        threshold=threshold,
        share_kept=rounded(float(kept.mean())),
        precision=_mean(agreed[kept]),
        people=_mean(shares[kept]),
        wrong_pass=_mean(kept[~agreed]),
        rejected_pass=_mean(kept[rejected]),
    )


def auc(estimates: np.ndarray, agreed: np.ndarray) -> float | None:
    """Area under the ROC curve by the rank sum, ties counting half; None without images of both kinds."""
    num_agreed = int(agreed.sum())
    num_pairs = num_agreed * (len(agreed) - num_agreed)
    if not num_pairs:
        return None
    _, places, counts = np.unique(estimates, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return rounded(float(ranks[agreed].sum() - num_agreed * (num_agreed + 1) / 2) / num_pairs)


def calibration_error(estimates: np.ndarray, outcomes: np.ndarray) -> float:
    """Expected calibration error over bins of equally many images, [N] each."""
    bins = calibration_bins(estimates, outcomes)
    return float(sum(count * abs(estimate - outcome) for estimate, outcome, count in bins) / len(estimates))


def calibration_bins(estimates: np.ndarray, outcomes: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean estimate, mean outcome and number of images of up to ten bins of equally many images, in rising order."""
    num_bins = max(1, min(_MAX_BINS, len(estimates) // _MIN_PER_BIN))
    parts = np.array_split(np.argsort(estimates, kind="stable"), num_bins)
    return [(float(estimates[rows].mean()), float(outcomes[rows].mean()), len(rows)) for rows in parts]


def _mean(values: np.ndarray) -> float | None:
    return rounded(float(values.mean())) if len(values) else None


def rounded(value: float) -> float:
    """A figure with as many digits as are equal on all processors: an artefact is named by its content."""
    return float(f"{value:.{_DIGITS}g}")
