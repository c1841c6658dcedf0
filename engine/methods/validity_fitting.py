"""Fitting `p_valid` on people's answers, by binomial likelihood, with a verdict on whether the fit can be used.

The number of people who said the label of an image, of those who were asked, is taken as binomial with `p_valid` as its
probability. The answers of one image depend on each other, so the likelihood is scaled to one unit of information an
image, whoever was asked more often weighing more. Where enough images fool the target, half of the weight is theirs:
they are what acceptance decides about. A ridge draws the weights of the oracles to their mean, which decides where
images are few. The problem is convex; what has no maximum, or too few answers, ends in a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.methods.validity import MAX_P, MIN_P, ValidityModel
from engine.methods.validity_quality import StratumQuality, qualities, rounded

# Images that are needed in all, and of each kind: those whose label most people say, and those whose label most do not.
MIN_IMAGES = 40
MIN_EACH = 10
# Images on which the target errs, and others, from which on each group has half of the weight.
MIN_STRATUM = 30
# Ridge on the weights' differences from their mean, in images: of 0 to 300 the best or nearly the best on 40 to 200
# images (docs/validity.md), and without effect on thousands.
RIDGE = 30.0
# With no larger weight than this nothing is left of the oracles.
MIN_WEIGHT = 1e-3
# A larger weight, or intercept, is that of a likelihood without a maximum.
MAX_WEIGHT = 5.0
MAX_INTERCEPT = 30.0
NUM_FOLDS = 10


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Answers:
    """What oracles and people say of the labels of N images, in an order that their files do not decide.

    Attributes:
        p_labels: [N, K], each oracle's probability of the label.
        num_agreeing: [N], people who said the label.
        num_asked: [N], people who were asked, at least 1.
        target_errs: [N] booleans.
    """

    p_labels: np.ndarray
    num_agreeing: np.ndarray
    num_asked: np.ndarray
    target_errs: np.ndarray

    def __post_init__(self) -> None:
        if self.p_labels.ndim != 2 or not self.p_labels.shape[1]:
            raise ValueError(f"p_labels: {self.p_labels.shape}, a column for each oracle is expected")
        if not ((self.num_agreeing >= 0) & (self.num_agreeing <= self.num_asked) & (self.num_asked >= 1)).all():
            raise ValueError("num_agreeing: not between 0 and the number of people who were asked")
        if not ((self.p_labels >= 0) & (self.p_labels <= 1)).all():
            raise ValueError("p_labels: not between 0 and 1")

    @property
    def shares(self) -> np.ndarray:
        """Share of people who said the label, [N]."""
        return self.num_agreeing / self.num_asked

    @property
    def log_odds(self) -> np.ndarray:
        """The features, [N, K]: log-odds as `engine.methods.validity.log_odds`."""
        p = np.clip(self.p_labels.astype(np.float64), MIN_P, MAX_P)
        return np.log(p) - np.log1p(-p)

    @property
    def is_balanced(self) -> bool:
        """Whether there are enough images of both groups for each to have half of the weight."""
        num_errors = int(self.target_errs.sum())
        return min(num_errors, len(self.target_errs) - num_errors) >= MIN_STRATUM

    @property
    def weights(self) -> np.ndarray:
        """Of each image, [N]: by the number of people who were asked, half for either group; N in all."""
        weights = self.num_asked.astype(np.float64)
        if self.is_balanced:
            for group in (self.target_errs, ~self.target_errs):
                weights[group] /= 2 * weights[group].sum()
        return weights * (len(weights) / weights.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidityFit:
    """The outcome of a fit.

    Attributes:
        model: None where there is none that can be used.
        verdict: for a reader.
        num_images, num_answers: that it is fitted on.
        is_balanced: whether half of the weight is that of images on which the target errs.
        nll: mean negative log-likelihood of held-out answers, in nats; None without a model.
        constant_nll: that of a constant.
        quality: on held-out images, by group: all, those on which the target errs, and the others.
    """

    model: ValidityModel | None
    verdict: str
    num_images: int
    num_answers: int
    is_balanced: bool
    nll: float | None = None
    constant_nll: float | None = None
    quality: tuple[StratumQuality, ...] = ()


def fit_validity(answers: Answers) -> ValidityFit:
    """Fit the model, and evaluate it by cross-validation: every image is judged by a model that did not see it.

    Returns:
        The model, or the reason why there is none that can be used: too few answers are no fault.
    """
    counts: dict[str, Any] = {
        "num_images": len(answers.shares),
        "num_answers": int(answers.num_asked.sum()),
        "is_balanced": answers.is_balanced,
    }
    if reason := _too_few(answers):
        return ValidityFit(model=None, verdict=f"no usable fit: {reason}", **counts)
    everything = np.ones(len(answers.shares), dtype=bool)
    solution = _solve(answers, everything)
    if _is_unbounded(solution):
        return ValidityFit(model=None, verdict=f"no usable fit: {_SEPARABLE}", **counts)
    p_valid, constant = _held_out(answers)
    nll, constant_nll = _nll(answers, p_valid), _nll(answers, constant)
    quality = qualities(p_valid, answers.num_agreeing, answers.num_asked, answers.target_errs)
    measured: dict[str, Any] = {"nll": rounded(nll), "constant_nll": rounded(constant_nll), "quality": quality}
    if nll >= constant_nll or not solution[1:].max() > MIN_WEIGHT:
        reason = (
            f"on held-out images its likelihood ({-nll:.4f}) is no better than that of a constant"
            f" ({-constant_nll:.4f}); these oracles do not order what people see"
        )
        return ValidityFit(model=None, verdict=f"no usable fit: {reason}", **counts, **measured)
    intercept, *weights = (rounded(float(value)) for value in solution)
    model = ValidityModel(intercept=intercept, weights=tuple(weights))
    return ValidityFit(model=model, verdict=_verdict(answers, quality[0]), **counts, **measured)


_SEPARABLE = (
    "the oracles separate the answers without an exception, so that the likelihood has no maximum; add images of which"
    " they are unsure"
)


def _too_few(answers: Answers) -> str:
    """Why the answers are too few, or an empty text."""
    num_images, num_agreed = len(answers.shares), int((answers.shares >= 0.5).sum())
    if num_images < MIN_IMAGES:
        return f"{num_images} images have answers, and {MIN_IMAGES} are needed"
    for number, verb in ((num_agreed, "say"), (num_images - num_agreed, "do not say")):
        if number < MIN_EACH:
            return (
                f"of {num_images} images there are {number} whose label most people {verb}, and {MIN_EACH} are needed;"
                " ask about images of another kind too"
            )
    return ""


def _verdict(answers: Answers, quality: StratumQuality) -> str:
    """What a usable fit is worth, for a reader."""
    order = "" if quality.auc is None else f"; AUC {quality.auc:.3f}"
    text = f"usable{order}, calibration error {quality.calibration_error:.3f} on held-out images"
    if answers.num_asked.max() == 1:
        text += "; one answer an image, so that it predicts single answers"
    if not answers.is_balanced:
        num_errors = int(answers.target_errs.sum())
        text += f"; the target errs on {num_errors} of {len(answers.shares)} images"
    return text


def _held_out(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """By models that did not see the image: its `p_valid`, and the share of a model without oracles; [N] each."""
    folds, features, weights = _folds(answers), answers.log_odds, answers.weights
    p_valid, constant = np.empty(len(folds)), np.empty(len(folds))
    for fold in range(NUM_FOLDS):
        held_out = folds == fold
        solution = _solve(answers, ~held_out)
        p_valid[held_out] = _sigmoid(solution[0] + features[held_out] @ solution[1:])
        constant[held_out] = np.average(answers.shares[~held_out], weights=weights[~held_out])
    return p_valid, constant


def _folds(answers: Answers) -> np.ndarray:
    """The fold of each image, [N]: in turn, within images that people and the target judge alike."""
    groups = 2 * (answers.shares >= 0.5) + answers.target_errs
    folds = np.empty(len(groups), dtype=int)
    first = 0
    for group in range(4):
        rows = np.flatnonzero(groups == group)
        folds[rows] = (first + np.arange(len(rows))) % NUM_FOLDS
        first += len(rows)
    return folds


def _solve(answers: Answers, rows: np.ndarray) -> np.ndarray:
    """Intercept and weights with the least penalised loss on some of the images, [1 + K]."""
    from scipy.optimize import minimize

    features, shares, weights = answers.log_odds[rows], answers.shares[rows], answers.weights[rows]

    def loss(solution: np.ndarray) -> tuple[float, np.ndarray]:
        scores = solution[0] + features @ solution[1:]
        residuals = weights * (_sigmoid(scores) - shares)
        differences = solution[1:] - solution[1:].mean()
        value = weights @ (np.logaddexp(0, scores) - shares * scores) + RIDGE / 2 * differences @ differences
        slopes = np.concatenate([[residuals.sum()], features.T @ residuals + RIDGE * differences])
        return value / len(shares), slopes / len(shares)

    num_oracles = features.shape[1]
    bounds = [(-MAX_INTERCEPT, MAX_INTERCEPT), *[(0.0, MAX_WEIGHT)] * num_oracles]
    start = np.concatenate([[0.0], np.full(num_oracles, 1 / num_oracles)])
    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-10}
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x)


def _is_unbounded(solution: np.ndarray) -> bool:
    return bool(abs(solution[0]) >= MAX_INTERCEPT or solution[1:].max() >= MAX_WEIGHT)


def _nll(answers: Answers, p: np.ndarray) -> float:
    """Weighted mean negative log-likelihood of an answer, in nats."""
    p, shares = np.clip(p, 1e-12, 1 - 1e-12), answers.shares
    return float(np.average(-(shares * np.log(p) + (1 - shares) * np.log1p(-p)), weights=answers.weights))


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -scores))
