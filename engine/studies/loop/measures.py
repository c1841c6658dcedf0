"""What is measured of a round's samples, lane by lane, as `loop.json` has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.methods.curation.bounds import gain_bounds, sample_correlation
from engine.methods.curation.measures import class_balance, class_shares
from engine.studies.intervals import mean_interval
from engine.studies.loop.samples import Real, RoundSamples
from engine.studies.loop.spec import MAX_REWARD

# Samples that bounds over all pairs of them are computed from.
MAX_BOUND_SAMPLES = 250
# Samples of a mixture that are compared with real ones.
MAX_COMPARED = 500


def measure(
    samples: RoundSamples, rewards: Tensor, curating: Tensor | None, num_classes: int, real: Real | None
) -> list[dict[str, Any]]:
    """Measures of every lane.

    Args:
        samples: of the round.
        rewards: [..., N] r of the users, in nats, as it stands in `e^r`.
        curating: [..., N] r~ of curation; None where nothing is curated.
        num_classes: n.
        real: to compare with; None for no distance.
    """
    shares = _flat(class_shares(samples.classes, num_classes), 1)
    balance = class_balance(shares)
    plain, scaled = _flat(samples.rewards, 1), _flat(rewards, 1)
    learned = None if curating is None else _flat(curating, 1)
    features = _flat(samples.features, 2)
    lanes = []
    for lane in range(len(plain)):
        mean = mean_interval(plain[lane].tolist())
        lanes.append(
            {
                "samples": plain.shape[-1],
                "reward": {"value": mean.value, "low": mean.low, "high": mean.high},
                "variance": _finite(scaled[lane].exp().var(correction=0)),
                "shares": shares[lane].tolist(),
                "balance": float(balance[lane]),
                "kid": _distance(features[lane], real, lane),
                "agreement": samples.agreement,
                "oracle_reward": samples.oracle_reward,
                **_bounds(scaled[lane], None if learned is None else learned[lane]),
            }
        )
    return lanes


def _bounds(rewards: Tensor, curating: Tensor | None) -> dict[str, Any]:
    """Covariance and correlation of `e^r` and `e^r~`, and what curation does to `E[e^r]`, with its bounds.

    A learned reward is known up to a constant alone: it is shifted to a largest value of 0.
    """
    names = ("covariance", "correlation", "gain", "gain_low", "gain_high")
    if curating is None:
        return dict.fromkeys(names)
    own, other = rewards, (curating - curating.max()).to(rewards.dtype)
    correlation = float(sample_correlation(own, other))
    own, other = own[:MAX_BOUND_SAMPLES], other[:MAX_BOUND_SAMPLES]
    uniform = torch.full_like(own, 1 / len(own))
    bounds = gain_bounds(uniform, own, other, share=1.0, num_candidates=None)
    values: tuple[Tensor | float, ...] = (bounds.covariance, correlation, bounds.gain, bounds.lower, bounds.upper)
    return {name: _finite(value) for name, value in zip(names, values, strict=True)}


def _distance(features: Tensor, real: Real | None, lane: int) -> dict[str, Any] | None:
    """KID to the real samples, with the spread over subsets."""
    if real is None:
        return None
    from engine.studies.evaluate.distances import kernel_distance

    own = features[:MAX_COMPARED].double().numpy()
    others = _flat(real.features, 2)
    other = others[lane if len(others) > 1 else 0].double().numpy()
    if min(len(own), len(other)) < 4:
        return None
    estimate = kernel_distance(own, other, subsets=10)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "space": real.space}


def _finite(value: Tensor | float) -> float | None:
    """A number that `loop.json` can hold; None for one that is too large, such as `e^r` of a large reward."""
    number = float(value)
    return number if math.isfinite(number) and abs(number) <= MAX_REWARD else None


def _flat(values: Tensor, num_kept: int) -> Tensor:
    return values.reshape(-1, *values.shape[values.ndim - num_kept :])
