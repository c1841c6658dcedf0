"""Reward models: functions of features with a flat vector of parameters, and how well they predict choices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.methods.curation.preferences import Pairs
from engine.methods.intervals import LEVEL, Estimate, wilson_interval


class RewardModel(Protocol):
    """A reward function; parameters are an argument, so that training can be differentiated."""

    @property
    def num_parameters(self) -> int:
        """P."""

    def initial(self, generator: torch.Generator) -> Tensor:
        """Parameters [P] before training."""

    def __call__(self, parameters: Tensor, features: Tensor) -> Tensor:
        """Rewards [..., N] of features [..., N, d]."""


@dataclass(frozen=True, slots=True)
class LinearReward:
    """`r(x) = parameters . features`; without a constant, of which preferences know nothing.

    Attributes:
        num_features: d.
    """

    num_features: int

    @property
    def num_parameters(self) -> int:
        """P = d."""
        return self.num_features

    def initial(self, generator: torch.Generator) -> Tensor:
        """Zeros [d]; the loss is convex, so that the start does not matter."""
        return torch.zeros(self.num_features, dtype=torch.float64)

    def __call__(self, parameters: Tensor, features: Tensor) -> Tensor:
        """Rewards [..., N] of features [..., N, d] by parameters [..., d]."""
        return (features @ parameters[..., None])[..., 0]


@dataclass(frozen=True, slots=True)
class NetworkReward:
    """A network d -> width -> 1 with tanh, smooth because attacks and influence use second derivatives.

    Attributes:
        num_features: d.
        width: hidden units.
        dtype: of the parameters.
    """

    num_features: int
    width: int
    dtype: torch.dtype = torch.float64

    @property
    def num_parameters(self) -> int:
        """P = width (d + 2); the last layer has no constant, of which preferences know nothing."""
        return self.width * (self.num_features + 2)

    def initial(self, generator: torch.Generator) -> Tensor:
        """Normal weights with variance one over the number of inputs, biases zero; [P]."""
        hidden = torch.randn(self.width, self.num_features, generator=generator, dtype=torch.float64)
        last = torch.randn(self.width, generator=generator, dtype=torch.float64)
        parts = [hidden.flatten() / math.sqrt(self.num_features), torch.zeros(self.width), last / math.sqrt(self.width)]
        return torch.cat([part.to(self.dtype) for part in parts])

    def __call__(self, parameters: Tensor, features: Tensor) -> Tensor:
        """Rewards [..., N] of features [..., N, d] by parameters [P]."""
        hidden, bias, last = parameters.split([self.width * self.num_features, self.width, self.width])
        return torch.tanh(features @ hidden.view(self.width, self.num_features).T + bias) @ last


def margins(model: RewardModel, parameters: Tensor, pairs: Pairs) -> Tensor:
    """Reward of the first less that of the second sample, [..., N]."""
    return model(parameters, pairs.first) - model(parameters, pairs.second)


def agreements(margin: Tensor, labels: Tensor) -> Tensor:
    """1 where a reward's margin [..., N] predicts the label, 0 where it does not, one half at a tie."""
    return 0.5 + 0.5 * torch.sign(margin) * (2 * labels - 1)


@dataclass(frozen=True, slots=True)
class Accuracy(Estimate):
    """Share of held-out preferences that a reward predicts, a tie counting as half, with its score interval.

    Attributes:
        num_pairs: records that it is measured on.
    """

    num_pairs: int


def held_out_accuracy(model: RewardModel, parameters: Tensor, pairs: Pairs, level: float = LEVEL) -> Accuracy:
    """How often a reward predicts the choices of records it was not trained on.

    Args:
        model: P parameters.
        parameters: [P].
        pairs: N records of one run, N >= 1.
        level: of the interval.

    Raises:
        ValueError: there is no record.
    """
    total = pairs.labels.numel()
    if not total:
        raise ValueError("pairs: no record is held out; accuracy needs at least one")
    agreement = agreements(margins(model, parameters, pairs), pairs.labels)
    share = wilson_interval(float(agreement.sum()), total, level)
    return Accuracy(share.value, share.low, share.high, total)
