"""The monitor: does the reward that curates still agree with trusted preferences? Valid at any time, by e-values.

An e-value is a non-negative statistic whose mean is at most 1 where nothing is wrong; a process of them exceeds
`1 / alpha` at any time of a whole run with probability at most alpha (Ville's inequality; Ramdas, Grunwald, Vovk
and Shafer 2023, "Game-theoretic statistics and safe anytime-valid inference"). Bets on bounded increments are those of
Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting".

Two tests. The *audit* draws records of a round, withholds them from training and has trusted raters choose again: where
nothing is wrong the two choices of a pair are exchangeable, however noisy the raters, small the differences or
wrong the reward model, so that those that differ are fair coins, whatever can be said of the pair. The monitor bets on
them. The test of a *fixed* set asks less often and less of its raters: does the learned reward predict at least a
given share of its choices?
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from engine.methods.curation.bounds import sample_correlation
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import FitOptions, LinearReward, fit_reward

# Shares of the wealth that are staked on one side of a coin, mixed with equal weight.
_STAKES = (0.25, 0.5, 0.75)
# Initial wealth of the bettors of an audit: one that learns what trusted raters prefer, and two that stake half of
# what they have on the record, or on the trusted choice, agreeing with the learned reward.
_BETTORS = (0.8, 0.1, 0.1)
# Variance over the audited pairs of the learning bettor's correction of a margin, before it has seen a choice. As a
# variance of margins it means the same for any number and scale of features.
_PRIOR_VARIANCE = 4.0
# Below it all audited pairs are alike, and there is nothing to correct.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """Records of a round that trusted raters judged again.

    Attributes:
        differences: [..., m, d] features of the first less those of the second sample.
        choices: [..., m] labels of the records.
        trusted: [..., m] labels of the trusted raters.
        margins: [..., m] of the learned reward, which these records did not train.
    """

    differences: Tensor
    choices: Tensor
    trusted: Tensor
    margins: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AuditState:
    """What the audits of a run have shown so far.

    Attributes:
        log_wealth: [..., 3] logarithms of the wealth of the bettors.
        highest: [...] largest logarithm of their sum at any time so far: an alarm is never taken back.
        differences: [..., n, d] of all records audited so far.
        trusted: [..., n] their trusted labels.
        num_differing: [...] records in which the choices differ.
    """

    log_wealth: Tensor
    highest: Tensor
    differences: Tensor
    trusted: Tensor
    num_differing: Tensor

    @property
    def e_value(self) -> Tensor:
        """The wealth now, [...]."""
        return self.log_wealth.logsumexp(-1).exp()

    def alarm(self, level: float = 0.05) -> Tensor:
        """Whether the wealth ever reached 1 / level, [...]: in at most that share of clean runs, however long."""
        return self.highest >= -math.log(level)


def start_audit(runs: tuple[int, ...], num_features: int) -> AuditState:
    """The state before the first audit of runs [...]."""
    zero = torch.zeros(runs, dtype=torch.float64)
    return AuditState(
        log_wealth=torch.tensor(_BETTORS, dtype=torch.float64).log().expand(*runs, len(_BETTORS)),
        highest=zero,
        differences=torch.zeros(*runs, 0, num_features, dtype=torch.float64),
        trusted=torch.zeros(*runs, 0, dtype=torch.float64),
        num_differing=zero,
    )


def continue_audit(state: AuditState, audit: Audit, earlier_margins: Tensor | None = None) -> AuditState:
    """Bet on the records of a round, one by one in the given order.

    A coin is a record in which the choices differ. Where records follow the learned reward and trusted raters a reward
    with margin `learned + difference . correction`, the odds that it is the record which prefers the first sample are
    `exp(-difference . correction)`. The learning bettor takes the correction from all earlier trusted choices.

    Args:
        state: after the audits of earlier rounds.
        audit: of this round.
        earlier_margins: [..., n] of the present learned reward for the records audited before, in their order; the
            correction starts at zero unless given.
    """
    differs = audit.choices != audit.trusted
    record_side, trusted_side = 2 * audit.choices - 1, 2 * audit.trusted - 1
    agrees = 0.5 * torch.sign(audit.margins) * record_side
    correction = _Correction(torch.cat([state.differences, audit.differences], -2))
    if earlier_margins is not None:
        correction.learn_all(state, earlier_margins)
    log_wealth, highest = state.log_wealth, state.highest
    for index in range(audit.choices.shape[-1]):
        row = audit.differences[..., index, :]
        odds = correction.margin(row) * record_side[..., index]
        stakes = agrees[..., index]
        gains = torch.stack([math.log(2) + logsigmoid(-odds), torch.log1p(stakes), torch.log1p(-stakes)], -1)
        log_wealth = log_wealth + torch.where(differs[..., index, None], gains, 0.0)
        highest = torch.maximum(highest, log_wealth.logsumexp(-1))
        correction.learn(row, audit.margins[..., index], trusted_side[..., index])
    return AuditState(
        log_wealth=log_wealth,
        highest=highest,
        differences=torch.cat([state.differences, audit.differences], -2),
        trusted=torch.cat([state.trusted, audit.trusted], -1),
        num_differing=state.num_differing + differs.sum(-1),
    )


class _Correction:
    """A logistic model of trusted choices, the learned margin being an offset, fitted by online Newton steps.

    Args:
        differences: [..., n, d] of all audited pairs, which say nothing of the choices; they set the scale.
    """

    def __init__(self, differences: Tensor) -> None:
        *runs, _, num_features = differences.shape
        self._mean = torch.zeros(*runs, num_features, dtype=torch.float64)
        square = differences.square().sum(-1).mean(-1).clamp_min(_LEAST_SQUARE)
        eye = torch.eye(num_features, dtype=torch.float64)
        self._covariance = _PRIOR_VARIANCE / square[..., None, None] * eye

    def learn_all(self, state: AuditState, margins: Tensor) -> None:
        """Take in the records that were audited before, at the margins [..., n] of the present reward."""
        for index in range(margins.shape[-1]):
            side = 2 * state.trusted[..., index] - 1
            self.learn(state.differences[..., index, :], margins[..., index], side)

    def margin(self, row: Tensor) -> Tensor:
        """What is to be added to the learned margin of a pair with differences [..., d]."""
        return (row * self._mean).sum(-1)

    def learn(self, row: Tensor, offset: Tensor, side: Tensor) -> None:
        """Take in a trusted choice, `side` 1 for the first sample and -1 for the second."""
        missed = torch.sigmoid(-side * (offset + self.margin(row)))
        curvature = missed * (1 - missed)
        image = (self._covariance @ row[..., None])[..., 0]
        # Sherman and Morrison's formula for the inverse after an update of rank one.
        scale = curvature / (1 + curvature * (row * image).sum(-1))
        self._covariance = self._covariance - scale[..., None, None] * image[..., :, None] * image[..., None, :]
        self._mean = self._mean + (self._covariance @ row[..., None])[..., 0] * (side * missed)[..., None]


def accuracy_log_e_value(agreement: Tensor, floor: float) -> Tensor:
    """Evidence that a learned reward predicts less than a share of trusted choices, [...].

    Args:
        agreement: [..., m] of a fixed trusted set with the reward, 0 or 1; the reward was trained without the set.
        floor: least share that is acceptable, above 0 and below 1.

    Returns:
        Logarithm of an e-value of `P(agreement) >= floor`. Values of several rounds are dependent, as the set is the
        same: combine them by `combined_e_value`.
    """
    stakes = torch.tensor(_STAKES, dtype=torch.float64) / max(floor, 1 - floor)
    gains = torch.log1p(stakes * (floor - agreement.double())[..., None])
    return gains.sum(-2).logsumexp(-1) - math.log(len(stakes))


def combined_e_value(log_e_values: Tensor) -> Tensor:
    """One process of dependent e-values, [..., T] rounds to [..., T].

    Round t counts with weight `1 / (t (t + 1))`. The sum over all rounds ever has a mean of at most 1 whatever the
    dependence (Vovk and Wang 2021), and no partial sum exceeds it, so that a run of any length raises a false alarm
    with at most alpha.
    """
    rounds = torch.arange(1, log_e_values.shape[-1] + 1, dtype=log_e_values.dtype)
    return (log_e_values.exp() / (rounds * (rounds + 1))).cumsum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """Correlation of `e^R` of a reward fitted to trusted choices with `e^R~` of the learned one; all [...].

    Attributes:
        correlation: the covariance of the papers' condition, scaled to [-1, 1].
        low: lower end of the interval.
        high: upper end.
    """

    correlation: Tensor
    low: Tensor
    high: Tensor


def trusted_agreement(
    model: LinearReward,
    trusted: Pairs,
    learned: Tensor,
    probes: Tensor,
    options: FitOptions,
    generator: torch.Generator,
    *,
    num_resamples: int = 100,
    level: float = 0.95,
) -> Agreement:
    """Does the learned reward vary over the samples with what trusted raters prefer?

    Args:
        model: d parameters.
        trusted: m records of trusted raters, [..., m].
        learned: [..., d] parameters of the learned reward.
        probes: [..., M, d] features of the samples of the round.
        options: fit of the trusted reward.
        generator: of the resamples.
        num_resamples: fits on records drawn anew with replacement; their quantiles are the interval.
        level: of the interval.
    """
    rewards = model(learned, probes)
    fitted = fit_reward(model, trusted, options).parameters
    shape = (num_resamples, *trusted.labels.shape)
    drawn = torch.randint(len(trusted), shape, generator=generator)
    counts = torch.zeros(shape, dtype=probes.dtype).scatter_add(-1, drawn, torch.ones(shape, dtype=probes.dtype))
    pairs = Pairs(
        *(part.expand(num_resamples, *part.shape) for part in (trusted.first, trusted.second, trusted.labels))
    )
    resampled = fit_reward(model, pairs, options, start=fitted, weights=counts).parameters
    correlations = sample_correlation(model(resampled, probes), rewards)
    tail = (1 - level) / 2
    return Agreement(
        correlation=sample_correlation(model(fitted, probes), rewards),
        low=correlations.quantile(tail, dim=0),
        high=correlations.quantile(1 - tail, dim=0),
    )
