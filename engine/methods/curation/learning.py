"""A reward learned from preference records: standardised features, held-out pairs, the fit, and suspect records.

The learned reward is in nats, as Bradley-Terry selection takes it. Its penalty is chosen by the loss on records that it
was not trained on, since a reward that is fitted too closely has margins that are too large, and selects too sharply.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from engine.methods.curation.bounds import sample_covariance
from engine.methods.curation.defences import RemovalOptions, removal_effects, remove_by_group, remove_by_influence
from engine.methods.curation.monitor import Agreement, trusted_agreement
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import (
    Accuracy,
    FitOptions,
    LinearReward,
    NetworkReward,
    fit_reward,
    held_out_accuracy,
    margins,
    preference_losses,
)

ModelKind = Literal["linear", "network"]

# Penalties that the fit chooses from, for standardised features: almost none, and almost no reward.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Of records that are too few for a choice.
DEFAULT_PENALTY = 1.0
_NUM_FOLDS = 3
# Penalty for each feature of the fit by which suspects are found. Cross-validation would take tampered records for
# noise, and choose a penalty that leaves no reward to find them by (tests/test_curation_learning.py).
_SUSPECT_PENALTY = 1 / 640
# A feature that varies by less than this share of the typical feature is constant up to rounding.
_LEAST_VARIATION = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnOptions:
    """How a reward is learned.

    Attributes:
        model: `linear` in the standardised features, or a `network` with one hidden layer.
        width: hidden units of a network.
        l2: penalty of the parameters; None chooses among `PENALTIES` by cross-validation.
        held_out: share of the unordered pairs that does not train, for the accuracy.
        max_steps: of the fit.
        seed: of the split and of a network's start.
    """

    model: ModelKind = "linear"
    width: int = 16
    l2: float | None = None
    held_out: float = 0.2
    max_steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in ("linear", "network") or self.width < 1:
            raise ValueError(f"model '{self.model}': linear or network; width {self.width}: 1 or more")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out {self.held_out}: 0 or more, below 1")

    def fit_options(self, l2: float) -> FitOptions:
        """The options of a fit with a penalty; the gradient of L-BFGS does not get as small as Newton's."""
        return FitOptions(l2=l2, tolerance=1e-8 if self.model == "linear" else 1e-4, max_steps=self.max_steps)

    def new_model(self, num_features: int) -> LinearReward | NetworkReward:
        """A model of standardised features."""
        return LinearReward(num_features) if self.model == "linear" else NetworkReward(num_features, self.width)


@dataclass(frozen=True, slots=True, eq=False)
class Standardisation:
    """Features of mean 0 and standard deviation 1.

    Attributes:
        mean: [d].
        scale: [d] standard deviations; 1 for a constant feature.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Standardised features [..., d], in float64."""
        return (features.double() - self.mean) / self.scale

    def pairs(self, pairs: Pairs) -> Pairs:
        """Pairs with standardised features."""
        return Pairs(self(pairs.first), self(pairs.second), pairs.labels.double())


def standardise(features: Tensor) -> Standardisation:
    """The standardisation of features [N, d], N >= 1.

    Raises:
        ValueError: there is no row, or a value is not finite.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features: {list(features.shape)}; [N, d] with at least one row is expected")
    if not bool(features.isfinite().all()):
        raise ValueError("features: a value is not finite; leave its sample out")
    values = features.double()
    scale = values.std(0, correction=0)
    typical = values.square().mean().sqrt()
    return Standardisation(values.mean(0), torch.where(scale <= _LEAST_VARIATION * typical, 1.0, scale))


def unordered_pairs(first: Sequence[Hashable], second: Sequence[Hashable]) -> Tensor:
    """Number [N] of the unordered pair of each record: equal where two records compare the same two samples."""
    numbers: dict[frozenset[Hashable], int] = {}
    pairs = (frozenset(pair) for pair in zip(first, second, strict=True))
    return torch.tensor([numbers.setdefault(pair, len(numbers)) for pair in pairs], dtype=torch.long)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Records that train and records that do not, by position; all records of a pair are on one side.

    Attributes:
        training: [n].
        held_out: [N - n].
    """

    training: Tensor
    held_out: Tensor


def split_pairs(pair_numbers: Tensor, held_out: float, generator: torch.Generator) -> Split:
    """Split N records by their unordered pairs [N], since records of one pair know each other's choice.

    At least one pair trains. One is held out where there are two or more, unless the share is 0.
    """
    distinct, members = pair_numbers.unique(return_inverse=True)
    count = len(distinct)
    least = 1 if held_out > 0 else 0
    num_held_out = min(max(round(held_out * count), least), count - 1)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=generator)[:num_held_out]] = True
    is_held_out = chosen[members]
    return Split((~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LearnedReward:
    """A reward of raw features.

    Attributes:
        model: of standardised features; P parameters.
        parameters: [P].
        standardisation: of the features.
        accuracy: on held-out records; None where none is held out.
        split: which records trained it.
        num_used: records of weight above 0 that trained it.
        l2: penalty of its fit.
        converged: whether the fit reached its tolerance.
    """

    model: LinearReward | NetworkReward
    parameters: Tensor
    standardisation: Standardisation
    accuracy: Accuracy | None
    split: Split
    num_used: int
    l2: float
    converged: bool

    def __call__(self, features: Tensor) -> Tensor:
        """Rewards [..., N] in nats of raw features [..., N, d]; known up to a constant, which selection ignores."""
        return self.model(self.parameters, self.standardisation(features))

    def margins(self, pairs: Pairs) -> Tensor:
        """Reward of the first less that of the second sample of pairs with raw features, [..., N]."""
        return margins(self.model, self.parameters, self.standardisation.pairs(pairs))


def learn_reward(
    pairs: Pairs,
    pair_numbers: Tensor,
    options: LearnOptions,
    *,
    standardisation: Standardisation | None = None,
    weights: Tensor | None = None,
) -> LearnedReward:
    """Train a reward on preference records, and measure it on those held out.

    The same options and pairs give the same split, whatever the labels and weights.

    Args:
        pairs: N >= 1 records with raw features [N, d].
        pair_numbers: [N] of `unordered_pairs`.
        options: model, penalty and split.
        standardisation: of the features; that of the samples in the records unless given.
        weights: [N] of the records in training, 0 leaves one out.

    Raises:
        ValueError: there is no record, or features are not finite.
    """
    if not len(pairs):
        raise ValueError("pairs: there is no record; a reward is learned from one or more")
    standardisation = standardisation or standardise(torch.cat([pairs.first, pairs.second]))
    scaled = standardisation.pairs(pairs)
    generator = torch.Generator().manual_seed(options.seed)
    split = split_pairs(pair_numbers, options.held_out, generator)
    training = scaled.take(split.training)
    kept = torch.ones_like(scaled.labels) if weights is None else weights.double()
    training_weights = kept[split.training]
    model = options.new_model(pairs.first.shape[-1])
    start = model.initial(generator)
    l2 = options.l2 or _choose_penalty(
        model, start, training, pair_numbers[split.training], training_weights, options, generator
    )
    fit = fit_reward(model, training, options.fit_options(l2), start=start, weights=training_weights)
    held_out, held_out_numbers = scaled.take(split.held_out), pair_numbers[split.held_out]
    accuracy = (
        held_out_accuracy(model, fit.parameters, held_out, pair_numbers=held_out_numbers) if len(held_out) else None
    )
    return LearnedReward(
        model=model,
        parameters=fit.parameters,
        standardisation=standardisation,
        accuracy=accuracy,
        split=split,
        num_used=int((training_weights > 0).sum()),
        l2=l2,
        converged=fit.converged,
    )


def _choose_penalty(
    model: LinearReward | NetworkReward,
    start: Tensor,
    pairs: Pairs,
    pair_numbers: Tensor,
    weights: Tensor,
    options: LearnOptions,
    generator: torch.Generator,
) -> float:
    """The penalty with the least mean loss on records of other pairs than it was trained on."""
    distinct, members = pair_numbers.unique(return_inverse=True)
    if len(distinct) < 2 * _NUM_FOLDS:
        return DEFAULT_PENALTY
    folds = (torch.randperm(len(distinct), generator=generator) % _NUM_FOLDS)[members]
    losses = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for fold in range(_NUM_FOLDS):
        rest, judged = (folds != fold).nonzero()[:, 0], (folds == fold).nonzero()[:, 0]
        for index, l2 in enumerate(PENALTIES):
            fit = fit_reward(model, pairs.take(rest), options.fit_options(l2), start=start, weights=weights[rest])
            part = pairs.take(judged)
            judged_losses = preference_losses(margins(model, fit.parameters, part), part.labels)
            losses[index] += (judged_losses * weights[judged]).sum()
    return PENALTIES[int(losses.argmin())]


@dataclass(frozen=True, slots=True, eq=False)
class Suspects:
    """Records that a defence removes from training.

    Attributes:
        weights: [N] 0 for those removed, 1 for all others, held-out ones included.
        effects: [N] predicted change of the mean trusted loss (nats) if each record were left out of training, while
            all others stay; 0 for held-out records. Negative is suspect.
    """

    weights: Tensor
    effects: Tensor

    @property
    def num_removed(self) -> int:
        """How many are removed."""
        return int((self.weights == 0).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Groups of raters.

    Attributes:
        records: [N] group of each record.
        trusted: [m] group of each trusted record.
    """

    records: Tensor
    trusted: Tensor


def find_suspects(
    learned: LearnedReward,
    pairs: Pairs,
    trusted: Pairs,
    learn_options: LearnOptions,
    removal: RemovalOptions,
    groups: Groups | None = None,
) -> Suspects:
    """The records that pull a learned reward away from trusted choices.

    Args:
        learned: trained on these pairs, all with weight 1.
        pairs: N records with raw features.
        trusted: m records of trusted raters with raw features, m >= 1.
        learn_options: with which the reward was learned.
        removal: how many at most; its `fit` is replaced by one with the penalty of `learn_options`, or a moderate one.
        groups: of the raters; each is then compared with its own trusted records alone.

    Raises:
        ValueError: there is no trusted record, or a group has records and no trusted one.
    """
    if not len(trusted):
        raise ValueError("trusted: there is no record; suspects are found by comparison with trusted choices")
    index = learned.split.training
    training = learned.standardisation.pairs(pairs).take(index)
    judges = learned.standardisation.pairs(trusted)
    l2 = learn_options.l2 or _SUSPECT_PENALTY * training.first.shape[-1]
    removal = replace(removal, fit=learn_options.fit_options(l2))
    start = learned.model.initial(torch.Generator().manual_seed(learn_options.seed))
    parameters = fit_reward(learned.model, training, removal.fit, start=start).parameters
    if groups is None:
        kept = remove_by_influence(learned.model, training, judges, removal, parameters)
    else:
        kept = remove_by_group(learned.model, training, groups.records[index], judges, groups.trusted, removal, start)
    every = torch.ones_like(training.labels)
    effects = removal_effects(learned.model, parameters, training, judges, removal, every)
    total = len(pairs)
    return Suspects(
        weights=torch.ones(total, dtype=torch.float64).index_copy(0, index, kept),
        effects=torch.zeros(total, dtype=torch.float64).index_copy(0, index, effects.detach()),
    )


def agreement_with_trusted(
    learned: LearnedReward, trusted: Pairs, probes: Tensor, learn_options: LearnOptions, num_resamples: int = 100
) -> Agreement:
    """Does a learned reward vary over samples with a linear reward that is fitted to trusted choices alone?

    The penalised fit lies in the span of the trusted differences, so that it is made in their coordinates: many
    features cost no more than there are records. The learned reward, of any model, is one more coordinate, on which
    the trusted records do not depend.

    Args:
        learned: of raw features.
        trusted: m >= 1 records with raw features.
        probes: [M, d] raw features of the samples.
        learn_options: with which the reward was learned.
        num_resamples: for the interval.
    """
    pairs, samples = _in_trusted_span(learned, trusted, probes)
    num_features = samples.shape[-1]
    last = torch.zeros(num_features, dtype=torch.float64).index_fill(0, torch.tensor(num_features - 1), 1)
    return trusted_agreement(
        LinearReward(num_features),
        pairs,
        last,
        samples,
        _trusted_fit(learned, learn_options),
        torch.Generator().manual_seed(learn_options.seed),
        num_resamples=num_resamples,
    )


def covariance_with_trusted(
    learned: LearnedReward, trusted: Pairs, probes: Tensor, learn_options: LearnOptions
) -> float:
    """The covariance of the papers' condition, `Cov[e^r, e^r~]`, with the reward that is fitted to trusted choices.

    A reward is known up to a constant; both `e^r` are scaled to a mean of 1, so that the covariance is a number.

    Args:
        learned: of raw features.
        trusted: m >= 1 records with raw features.
        probes: [M, d] raw features of the samples, M >= 2.
        learn_options: with which the reward was learned.
    """
    pairs, samples = _in_trusted_span(learned, trusted, probes)
    model = LinearReward(samples.shape[-1])
    fitted = fit_reward(model, pairs, _trusted_fit(learned, learn_options)).parameters
    own, other = (rewards - rewards.logsumexp(-1) for rewards in (model(fitted, samples), samples[:, -1]))
    return float(sample_covariance(own, other)) * len(samples) ** 2


def _trusted_fit(learned: LearnedReward, learn_options: LearnOptions) -> FitOptions:
    return replace(learn_options, model="linear").fit_options(learned.l2)


def _in_trusted_span(learned: LearnedReward, trusted: Pairs, probes: Tensor) -> tuple[Pairs, Tensor]:
    """Trusted records and samples in coordinates of the records' span; the last coordinate is the learned reward."""
    scale = learned.standardisation
    differences = scale(trusted.first) - scale(trusted.second)
    basis = torch.linalg.qr(differences.mT).Q
    coordinates = torch.cat([differences @ basis, torch.zeros(len(trusted), 1, dtype=torch.float64)], -1)
    samples = torch.cat([scale(probes) @ basis, learned(probes)[:, None]], -1)
    return Pairs(coordinates, torch.zeros_like(coordinates), trusted.labels.double()), samples
