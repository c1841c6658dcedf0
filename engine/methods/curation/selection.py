"""Selection by Bradley-Terry: pairs, K candidates, and the exact law of what is selected.

A choice is drawn, never the best candidate taken: the bounds of the papers hold for the draw alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Step and lower end of the integral over log u in `curation_weights`; the trapezoid rule is exact there to rounding.
_STEP = 0.25
_LOWEST_LOG = -38.0
_LOG_OF_DECAY = math.log(40.0)


def preference_probability(first: Tensor, second: Tensor) -> Tensor:
    """Probability that the first of two samples is preferred, `sigmoid(r_first - r_second)` (Bradley, Terry 1952)."""
    return torch.sigmoid(first - second)


def draw_preferences(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn for pairs with rewards `first` and `second` [...]: 1 where the first is preferred, else 0."""
    uniform = torch.rand(first.shape, generator=generator, dtype=first.dtype)
    return (uniform < preference_probability(first, second)).to(first.dtype)


def selection_probabilities(rewards: Tensor) -> Tensor:
    """Probability of each of K candidates, `exp(r_k) / sum_j exp(r_j)`: [..., K] to [..., K]."""
    return torch.softmax(rewards, -1)


def select(rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Index of the candidate selected by K-wise Bradley-Terry, [..., K] to [...].

    The largest of `r_k + Gumbel noise` has exactly these probabilities, and no exponential overflows.
    """
    uniform = torch.rand(rewards.shape, generator=generator, dtype=torch.float64)
    # The generator may return 0, whose double logarithm is infinite.
    noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    return (rewards.double() + noise).argmax(-1)


def curation_weights(probabilities: Tensor, rewards: Tensor, num_candidates: int | None) -> Tensor:
    """Factor by which curation multiplies the probability of each point, exact for a finite support.

    `H(x) = K E[e^r(x) / (e^r(x) + sum of K - 1 others)]` (Ferbach et al. 2024), with
    `1 / s = integral of e^(-u s) du` written as an integral over one variable. Its mean over `probabilities` is 1,
    and it lies in [0, K].

    Args:
        probabilities: [..., M], sums to 1.
        rewards: [..., M].
        num_candidates: K; None for the limit of many candidates, `e^r / E[e^r]` (their lemma 2.1).

    Returns:
        [..., M].

    Raises:
        ValueError: K is below 1.
    """
    # Selection ignores a common shift; the largest weight is 1.
    centred = rewards - rewards.amax(-1, keepdim=True)
    choice_weights = centred.exp()
    if num_candidates is None:
        return choice_weights / (probabilities * choice_weights).sum(-1, keepdim=True)
    if num_candidates < 1:
        raise ValueError(f"num_candidates: {num_candidates} is below 1")
    highest = _LOG_OF_DECAY - float(centred.min())
    log_u = torch.arange(_LOWEST_LOG, highest + _STEP, _STEP, dtype=rewards.dtype)
    # [..., M, U]
    decay = torch.exp(-choice_weights[..., None] * log_u.exp())
    others = (probabilities[..., None] * decay).sum(-2, keepdim=True)
    integrand = torch.exp(centred[..., None] + log_u) * decay * others.pow(num_candidates - 1)
    return num_candidates * _STEP * integrand.sum(-1)
