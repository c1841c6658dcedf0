"""Quality of the error predictor: precision, recall and AUC with an interval, and a verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.methods.conditioning.input_checks import check_kind, class_text

_Z95 = 1.959963984540054
POOLED = -1
# With fewer held-out errors an interval that includes 0.5 does not show that the predictor is near chance.
FEW_ERRORS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorQuality:
    """Quality on a set of held-out images. A figure that is not defined, or has too few images, is None.

    Attributes:
        name: the class for messages, or `all classes`.
        class_index: -1 for all classes.
        num_errors: images on which the target errs.
        num_right: the others.
        precision: share of errors among the alarms; None without an alarm.
        recall: share of the errors that raise an alarm.
        auc: probability that an error has a higher score than an image without error.
        auc_low: lower end of its 95 % interval.
        auc_high: upper end.
        verdict: for a reader.
    """

    name: str
    class_index: int
    num_errors: int
    num_right: int
    precision: float | None = None
    recall: float | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorEvaluation:
    """Quality over all held-out images, and class by class.

    Attributes:
        pooled: over all classes.
        per_class: of every class that has held-out images, in index order; only counts where they are too few.
        threshold: confidence above which an alarm was counted.
        min_per_class: errors, and images without error, that a class needed for a figure of its own.
    """

    pooled: PredictorQuality
    per_class: tuple[PredictorQuality, ...]
    threshold: float
    min_per_class: int

    def state(self) -> dict[str, Any]:
        """Plain values, for `from_state`."""
        return {"kind": "evaluation", **dataclasses.asdict(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PredictorEvaluation:
        """An evaluation from its `state`.

        Raises:
            ValueError: it is a state of another kind.
        """
        check_kind(state, "evaluation")
        return cls(
            pooled=PredictorQuality(**state["pooled"]),
            per_class=tuple(PredictorQuality(**quality) for quality in state["per_class"]),
            threshold=state["threshold"],
            min_per_class=state["min_per_class"],
        )


def evaluate(
    log_odds: Tensor,
    errors: Tensor,
    classes: Tensor,
    labels: Sequence[str],
    *,
    threshold: float = 0.5,
    min_per_class: int = 10,
) -> PredictorEvaluation:
    """Evaluate predictions on images that were not trained on.

    Args:
        log_odds: [N], predicted log-odds of an error.
        errors: [N] booleans, both outcomes among them.
        classes: [N] class indices.
        labels: n class names in index order.
        threshold: confidence above which an alarm is counted.
        min_per_class: errors, and images without error, that a class needs for a figure of its own.

    Raises:
        ValueError: one of the outcomes is missing.
    """
    num_errors = int(errors.sum())
    if num_errors in (0, len(errors)):
        raise ValueError(f"errors: {num_errors} of {len(errors)} held-out images; both outcomes are needed")
    alarms = torch.sigmoid(log_odds).float() > threshold
    pooled = _quality("all classes", POOLED, log_odds, alarms, errors)
    per_class = []
    for index in classes.unique().tolist():
        rows, name = classes == index, class_text(labels, index)
        quality = _too_few(name, index, errors[rows], min_per_class)
        per_class.append(quality or _quality(name, index, log_odds[rows], alarms[rows], errors[rows]))
    return PredictorEvaluation(
        pooled=pooled, per_class=tuple(per_class), threshold=threshold, min_per_class=min_per_class
    )


def auc_interval(auc: float, num_errors: int, num_right: int) -> tuple[float, float]:
    """95 % interval of an AUC: every theta with `|auc - theta| <= z * sqrt(V(theta))`.

    V is Hanley and McNeil's variance (1982) with equal weight on both samples (Newcombe 2006, method 5). Solving for
    theta, rather than taking V at the estimate, gives an AUC of 1 on few images a wide interval; at 0.5, V is
    the null variance of the Mann-Whitney test.
    """
    excess = (num_errors + num_right) / 2 - 1

    def is_inside(theta: float) -> bool:
        spread = 1 + excess * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * spread / (num_errors * num_right)
        return abs(auc - theta) <= _Z95 * math.sqrt(variance)

    def boundary(outside: float) -> float:
        inside = min(max(auc, 1e-12), 1 - 1e-12)
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_inside(middle) else (inside, middle)
        return inside

    return (boundary(0.0) if auc > 0 else 0.0), (boundary(1.0) if auc < 1 else 1.0)


def _quality(name: str, index: int, scores: Tensor, alarms: Tensor, errors: Tensor) -> PredictorQuality:
    from sklearn.metrics import roc_auc_score

    hits, num_alarms, num_errors = int((alarms & errors).sum()), int(alarms.sum()), int(errors.sum())
    auc = float(roc_auc_score(errors.numpy(), scores.numpy()))
    low, high = auc_interval(auc, num_errors, len(errors) - num_errors)
    return PredictorQuality(
        name=name,
        class_index=index,
        num_errors=num_errors,
        num_right=len(errors) - num_errors,
        precision=hits / num_alarms if num_alarms else None,
        recall=hits / num_errors,
        auc=auc,
        auc_low=low,
        auc_high=high,
        verdict=_verdict(auc, low, high, num_errors),
    )


def _verdict(auc: float, low: float, high: float, num_errors: int) -> str:
    figures = f"AUC {auc:.2f} on {num_errors} held-out errors, 95 % interval {low:.2f} to {high:.2f}"
    if low > 0.5:
        return f"better than chance: {figures}"
    if high < 0.5:
        return f"worse than chance: {figures}; what was learned does not carry over"
    doubt = "near chance" if num_errors >= FEW_ERRORS else "too few errors to tell"
    return f"{doubt}: {figures} includes 0.5; nothing shows that screening selects errors"


def _too_few(name: str, index: int, errors: Tensor, needed: int) -> PredictorQuality | None:
    num_errors = int(errors.sum())
    num_right = len(errors) - num_errors
    counts = ((num_errors, "errors"), (num_right, "images without error"))
    reasons = [f"too few {what} ({number} held out, {needed} needed)" for number, what in counts if number < needed]
    if not reasons:
        return None
    return PredictorQuality(
        name=name, class_index=index, num_errors=num_errors, num_right=num_right, verdict="; ".join(reasons)
    )
