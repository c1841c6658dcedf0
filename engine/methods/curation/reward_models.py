"""Reward models: functions of features with a flat vector of parameters, trained on preferences by logistic loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from engine.methods.curation.minimisers import Minimum, minimise_lbfgs, minimise_newton
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How a reward model is trained.

    Attributes:
        l2: weight of half the squared parameters in the loss; above 0, as preferences may be separable.
        tolerance: largest entry of the gradient at which training has converged. L-BFGS compares losses, so that
            below about 1e-8 in float64 it cannot tell; Newton's method can.
        max_steps: Newton steps (linear) or L-BFGS iterations (network); fewer cut training short on purpose.
    """

    l2: float = 1e-2
    tolerance: float = 1e-8
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.l2 <= 0 or self.tolerance <= 0 or self.max_steps < 1:
            raise ValueError(f"l2 {self.l2}, tolerance {self.tolerance}, max_steps {self.max_steps}: all are above 0")


def preference_losses(margin: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss of every record, [..., N]; both arguments have that shape.

    Raises:
        ValueError: the shapes differ. Broadcast, [N, 1] and [N] would give [N, N] and teach the mean label alone.
    """
    if margin.shape != labels.shape:
        raise ValueError(f"margins {list(margin.shape)}, labels {list(labels.shape)}: the shapes must be equal")
    return softplus(margin) - labels * margin


def training_loss(
    model: RewardModel, parameters: Tensor, pairs: Pairs, l2: float, weights: Tensor | None = None
) -> Tensor:
    """Mean logistic loss and `l2 / 2 |parameters|^2`, [...].

    Args:
        model: P parameters.
        parameters: [..., P].
        pairs: N records.
        l2: weight of the penalty.
        weights: [..., N] of the records, 1 unless given: 0 leaves a record out. The sum is divided by N either way.
    """
    losses = preference_losses(margins(model, parameters, pairs), pairs.labels)
    weighted = losses if weights is None else losses * weights
    return weighted.mean(-1) + 0.5 * l2 * parameters.square().sum(-1)


def fit_reward(
    model: RewardModel,
    pairs: Pairs,
    options: FitOptions,
    *,
    start: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Minimum:
    """Train a reward model: Newton steps for a linear one (many runs at once), L-BFGS for others.

    Args:
        model: P parameters.
        pairs: N records; leading dimensions (linear models only) are independent runs.
        options: when training ends.
        start: [..., P]; the model's own start unless given.
        weights: [..., N], see `training_loss`.
        generator: of the model's own start.

    Raises:
        ValueError: a network has neither a start nor a generator, or several runs.
    """
    if isinstance(model, LinearReward):
        return _fit_linear(model, pairs, options, start, weights)
    if pairs.labels.ndim != 1:
        raise ValueError(f"labels: {list(pairs.labels.shape)}; a network is trained on one run, [N]")
    if start is None:
        if generator is None:
            raise ValueError("generator: a network that has no start needs one")
        start = model.initial(generator)
    return minimise_lbfgs(
        lambda point: training_loss(model, point, pairs, options.l2, weights), start,
        tolerance=options.tolerance, max_steps=options.max_steps,
    )  # fmt: skip


def _fit_linear(
    model: LinearReward, pairs: Pairs, options: FitOptions, start: Tensor | None, weights: Tensor | None
) -> Minimum:
    """By derivatives in closed form; the loss is convex, so that every run has one minimum."""
    differences = pairs.first - pairs.second
    record_weights = torch.ones_like(pairs.labels) if weights is None else weights
    eye = torch.eye(model.num_features, dtype=differences.dtype)

    def loss_at(parameters: Tensor) -> Tensor:
        losses = preference_losses((differences @ parameters[..., None])[..., 0], pairs.labels)
        return (losses * record_weights).mean(-1) + 0.5 * options.l2 * parameters.square().sum(-1)

    def derivatives_at(parameters: Tensor) -> tuple[Tensor, Tensor]:
        predicted = torch.sigmoid((differences @ parameters[..., None])[..., 0])
        residual = (predicted - pairs.labels) * record_weights
        gradient = (residual[..., None, :] @ differences)[..., 0, :] / len(pairs) + options.l2 * parameters
        curvature = (predicted * (1 - predicted) * record_weights)[..., None] * differences
        return gradient, differences.mT @ curvature / len(pairs) + options.l2 * eye

    shape = (*pairs.labels.shape[:-1], model.num_features)
    first = torch.zeros(shape, dtype=differences.dtype) if start is None else start.expand(shape).clone()
    return minimise_newton(loss_at, derivatives_at, first, tolerance=options.tolerance, max_steps=options.max_steps)


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


def held_out_accuracy(
    model: RewardModel, parameters: Tensor, pairs: Pairs, level: float = LEVEL, pair_numbers: Tensor | None = None
) -> Accuracy:
    """How often a reward predicts the choices of records it was not trained on.

    Args:
        model: P parameters.
        parameters: [P].
        pairs: N records of one run, N >= 1.
        level: of the interval.
        pair_numbers: [N] of the unordered pairs; all records are of different ones unless given. Those of one pair
            are right or wrong together, so that the interval takes them as one (the effective number of Kish 1965).

    Raises:
        ValueError: there is no record.
    """
    total = pairs.labels.numel()
    if not total:
        raise ValueError("pairs: no record is held out; accuracy needs at least one")
    agreement = agreements(margins(model, parameters, pairs), pairs.labels)
    counts = torch.ones(total) if pair_numbers is None else pair_numbers.unique(return_counts=True)[1].double()
    num_independent = max(1, int(counts.sum().square() / counts.square().sum()))
    share = wilson_interval(float(agreement.mean()) * num_independent, num_independent, level)
    return Accuracy(share.value, share.low, share.high, total)
