"""`p_valid`: the estimated share of people who say the label of an image, by the oracles' probabilities of that label.

A logistic model with few parameters, `p_valid = sigmoid(b + sum_k w_k logit p_k)`, and monotone: no `w_k` is negative,
so that an oracle that is surer of the label never lowers it. Imports nothing: `engine.methods.validity_fitting` fits it
on people's answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Log-odds are taken within these probabilities: above, a classifier is sure of everything that it was trained on.
MIN_P = 1e-4
MAX_P = 1 - MIN_P


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidityModel:
    """A fitted model over K oracles.

    Attributes:
        intercept: b, in nats.
        weights: w_k by oracle, none negative.
    """

    intercept: float
    weights: tuple[float, ...]

    def p_valid(self, p_labels: Sequence[float]) -> float:
        """The estimated share of people who say the label, in [0, 1].

        Args:
            p_labels: each oracle's probability of the label, in the order of the weights; of a joint prompt the
                probability of its subset.

        Raises:
            ValueError: their number is another one than the model's.
        """
        pairs = zip(self.weights, p_labels, strict=True)
        return _sigmoid(self.intercept + sum(weight * log_odds(p) for weight, p in pairs))


def log_odds(p: float) -> float:
    """`log p / (1 - p)`, in nats, of a probability that is first brought between `MIN_P` and `MAX_P`."""
    p = min(max(p, MIN_P), MAX_P)
    return math.log(p) - math.log1p(-p)


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))
