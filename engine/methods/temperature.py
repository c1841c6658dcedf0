"""The calibration temperature of a classifier: the T with the least negative log-likelihood (Guo et al., ICML 2017).

Fitted over the full class distribution. The negative log-likelihood is convex in 1 / T, so the zero of its slope is
its minimum, and bisection finds it. Natural logarithms (nats).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = 1e-3
HIGHEST = 1e3
# Half the 95 % quantile of chi-square with one degree of freedom: noise alone gains more in 5 % of cases.
_NOISE_GAIN = 1.9207
_STEPS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureFit:
    """The fit of a classifier's temperature.

    Attributes:
        current: the temperature that the classifier has.
        current_nll: mean negative log-likelihood at it.
        fitted: the temperature with the lowest one.
        fitted_nll: mean negative log-likelihood there.
        bound: `lower` or `upper` where the fit ends at a bound, empty where it is a minimum.
        num_images: images that it is fitted on.
    """

    current: float
    current_nll: float
    fitted: float
    fitted_nll: float
    bound: str
    num_images: int

    @property
    def is_better(self) -> bool:
        """Whether the images show that the fitted temperature is better than the current one."""
        return not self.bound and self.num_images * (self.current_nll - self.fitted_nll) >= _NOISE_GAIN

    @property
    def verdict(self) -> str:
        """For a reader: keep the temperature, or change it."""
        if self.bound == "lower":
            return (
                f"no minimum: NLL falls down to the lower bound {LOWEST:g}, as it does where the target is right on"
                " every image; add images on which it errs"
            )
        if self.bound == "upper":
            return f"no minimum: NLL falls up to the upper bound {HIGHEST:g}; the target is no better than chance"
        if not self.is_better:
            return f"as good as any: on {self.num_images} images nothing shows that another temperature is better"
        return f"better at {self.fitted:.4g}"


def fit_temperature(logits: Tensor, labels: Tensor, current: float) -> TemperatureFit:
    """Fit the temperature of a classifier on labelled images; nothing is changed.

    Args:
        logits: [N, n], not divided by any temperature.
        labels: [N] class indices.
        current: the temperature that the classifier has.

    Raises:
        ValueError: there is no image, shapes disagree, or a logit is not finite.
    """
    if logits.ndim != 2 or not len(logits) or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}: [N, n] and [N] are expected")
    if not torch.isfinite(logits).all():
        raise ValueError("logits: some are not finite; run the classifier in fp32")
    # Shifts change no probability, and keep products with 1 / T far from overflow.
    centred = logits.double() - logits.double().amax(1, keepdim=True)
    fitted, bound = _minimum(centred, labels)
    return TemperatureFit(
        current=current,
        current_nll=_nll(centred, labels, current),
        fitted=fitted,
        fitted_nll=_nll(centred, labels, fitted),
        bound=bound,
        num_images=len(logits),
    )


def _minimum(logits: Tensor, labels: Tensor) -> tuple[float, str]:
    """The best temperature, and the bound that it lies at."""
    if _slope(logits, labels, LOWEST) <= 0:
        return LOWEST, "lower"
    if _slope(logits, labels, HIGHEST) >= 0:
        return HIGHEST, "upper"
    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _slope(logits, labels, math.exp(middle)) > 0:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2), ""


def _nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return float(torch.nn.functional.cross_entropy(logits / temperature, labels))


def _slope(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Derivative of the NLL by 1 / T: what the prediction expects of the logits, less the logits of the labels."""
    expected = (torch.softmax(logits / temperature, 1) * logits).sum(1)
    return float((expected - logits.gather(1, labels[:, None])[:, 0]).mean())
