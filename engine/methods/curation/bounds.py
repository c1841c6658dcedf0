"""What one round of curation does to the expected reward: exact on a finite support, and its bounds.

`a = e^r` is the weight of a choice by the reward r of the users, `b = e^r~` that by the reward r~ which curates a
share phi of the choices. Of K candidates, curation by b raises the mean of a by the sample covariance of (a, b) over
the sample mean of b, so that in the setting of Wei and Zhang

    E_t+1[a] - E_t[a] = (1 - phi) E[S_aa / mean a] + phi E[S_ab / mean b],    E[S_ab] = (K - 1) / K Cov(a, b).

The variance term is at least (K - 1) / K Var(a) / max a, which for phi = 0 is lemma 2.2 of Ferbach et al. The
covariance term has the sign of Cov(a, b) in the limit of many candidates, where it is Cov(a, b) / E[b], and wherever a
and b rank all pairs alike or all in reverse. For other rewards and finite K it has not: pairs are discounted by b. So
its bounds take apart the pairs that a and b rank alike and those that they rank in reverse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.curation.selection import curation_weights


@dataclass(frozen=True, slots=True, eq=False)
class GainBounds:
    """Terms and bounds of the change of the expected choice weight in a round without real data; all [...].

    Attributes:
        gain: `E_t+1[e^r] - E_t[e^r]`, exact.
        variance: `Var_t(e^r)`.
        covariance: `Cov_t(e^r, e^r~)`.
        lower: a bound that holds for all rewards and K.
        upper: likewise.
        by_sign: `(K - 1) / K ((1 - phi) Var / max e^r + phi Cov / max e^r~)`, a lower bound where the rewards rank
            all pairs alike, not in general.
    """

    gain: Tensor
    variance: Tensor
    covariance: Tensor
    lower: Tensor
    upper: Tensor
    by_sign: Tensor


def gain_bounds(
    probabilities: Tensor, rewards: Tensor, other: Tensor, *, share: float, num_candidates: int | None
) -> GainBounds:
    """The change of `E[e^r]` in one round, and bounds of it from variance and covariance.

    Args:
        probabilities: [..., M] of the points of the support.
        rewards: r [..., M].
        other: r~ [..., M].
        share: phi, share of the choices that follow r~.
        num_candidates: K; None for the limit of many.
    """
    own, others = rewards.exp(), other.exp()
    mean = (probabilities * own).sum(-1)
    curated = mixed_weights(probabilities, rewards, other, share=share, num_candidates=num_candidates)
    factor = 1.0 if num_candidates is None else (num_candidates - 1) / num_candidates
    alike, reverse = _concordance(probabilities, own, others)
    variance = (probabilities * (own - mean[..., None]).square()).sum(-1)
    own_min, own_max = _extremes(own, probabilities)
    other_min, other_max = _extremes(others, probabilities)
    return GainBounds(
        gain=(probabilities * curated * own).sum(-1) - mean,
        variance=variance,
        covariance=alike - reverse,
        lower=factor * ((1 - share) * variance / own_max + share * (alike / other_max - reverse / other_min)),
        upper=factor * ((1 - share) * variance / own_min + share * (alike / other_min - reverse / other_max)),
        by_sign=factor * ((1 - share) * variance / own_max + share * (alike - reverse) / other_max),
    )


def mixed_weights(
    probabilities: Tensor, rewards: Tensor, other: Tensor, *, share: float, num_candidates: int | None
) -> Tensor:
    """Factor [..., M] of curation of whose choices a share follows another reward; see `gain_bounds`."""
    honest = curation_weights(probabilities, rewards, num_candidates)
    return (1 - share) * honest + share * curation_weights(probabilities, other, num_candidates)


def updated_probabilities(
    probabilities: Tensor, weights: Tensor, real: Tensor | None = None, curated_weight: float = math.inf
) -> Tensor:
    """The next distribution, `(p_data + lambda p_t H) / (1 + lambda)`, [..., M].

    Args:
        probabilities: p_t.
        weights: H, of `curation_weights` or `mixed_weights`.
        real: p_data; None for a loop without real data.
        curated_weight: lambda, curated samples for each real one.
    """
    curated = probabilities * weights
    if real is None or math.isinf(curated_weight):
        return curated
    return (real + curated_weight * curated) / (1 + curated_weight)


def real_data_divergence_bound(num_candidates: int, curated_weight: float) -> float:
    """Bound of `KL(p_t || p_data)` for all t where the loop starts at p_data: `-log(1 - lambda (K - 1))`, in nats.

    As H <= K, the largest ratio of p_t to p_data obeys `s' <= (1 + lambda K s) / (1 + lambda)`, whose fixed point is
    the bound; Ferbach et al. prove the like for their loop with real data. It bounds the drift and not the reward:
    p_data itself may be what the users dislike.

    Returns:
        infinity where `lambda (K - 1) >= 1`, for which there is no bound.
    """
    left = 1 - curated_weight * (num_candidates - 1)
    return -math.log(left) if left > 0 else math.inf


def _concordance(probabilities: Tensor, own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the covariance from pairs ranked alike and in reverse, both >= 0; their difference is Cov(a, b)."""
    product = (own[..., :, None] - own[..., None, :]) * (others[..., :, None] - others[..., None, :])
    pair_mass = probabilities[..., :, None] * probabilities[..., None, :]
    alike = 0.5 * (pair_mass * product.clamp_min(0)).sum((-2, -1))
    reverse = 0.5 * (pair_mass * (-product).clamp_min(0)).sum((-2, -1))
    return alike, reverse


def _extremes(values: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of a point that has mass."""
    absent = probabilities <= 0
    lowest = values.masked_fill(absent, math.inf).amin(-1)
    return lowest, values.masked_fill(absent, -math.inf).amax(-1)


def sample_covariance(own_rewards: Tensor, other_rewards: Tensor) -> Tensor:
    """`Cov(e^r, e^r~)` over samples, [..., N] twice to [...]; population form."""
    own, others = own_rewards.exp(), other_rewards.exp()
    centred = (own - own.mean(-1, keepdim=True)) * (others - others.mean(-1, keepdim=True))
    return centred.mean(-1)


def sample_correlation(own_rewards: Tensor, other_rewards: Tensor) -> Tensor:
    """The covariance of `e^r` and `e^r~` as a correlation in [-1, 1], [...]; 0 where one of them is constant."""
    # Shifts of the rewards scale the covariance and both deviations alike, and keep exponentials from overflow.
    own = own_rewards - own_rewards.amax(-1, keepdim=True)
    others = other_rewards - other_rewards.amax(-1, keepdim=True)
    scale = sample_covariance(own, own).sqrt() * sample_covariance(others, others).sqrt()
    return torch.where(scale > 0, sample_covariance(own, others) / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)
