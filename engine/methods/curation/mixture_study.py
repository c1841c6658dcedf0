"""The loop on Gaussian mixtures: attacks and defences over many seeds at once, in seconds.

Raters have one or several tastes: a taste is a mode of the mixture, and the reward falls with the squared distance to
it, so that a linear reward on monomials can be right. Every round has new preference records of the present
generator's samples, of which the last ones are audited and do not train; the attacker exchanges labels of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.methods.curation.attacks import (
    AttackOptions,
    curated_reward_objective,
    gradient_flips,
    highest_reward_flips,
    largest_difference_flips,
    random_flips,
)
from engine.methods.curation.defences import RemovalOptions, remove_by_group, remove_by_influence
from engine.methods.curation.generators import GaussianMixture, circle_mixture
from engine.methods.curation.loop import Choosers, LoopOptions, RoundMeasures, measure_round, next_generator
from engine.methods.curation.monitor import (
    Audit,
    AuditState,
    accuracy_log_e_value,
    combined_e_value,
    continue_audit,
    start_audit,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import LinearReward, agreements, margins
from engine.methods.curation.reward_training import FitOptions, fit_reward
from engine.methods.curation.selection import draw_preferences

ATTACKS = ("clean", "random", "largest-difference", "highest-reward", "gradient", "gradient-reward")
DEFENCES = ("none", "influence", "group", "trusted-only")
LEVEL = 0.05
FIXED_SIZES = (25, 50, 100, 200, 400)
FIXED_FLOORS = (0.5, 0.65)
_MODEL = LinearReward(5)
_FIT = FitOptions()
_NUM_PROBES = 500
_NUM_MEASURED = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Taste:
    """What some raters like.

    Attributes:
        share: of the raters, and of the choices.
        mode: the one they like best.
    """

    share: float
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """A study.

    Attributes:
        num_seeds: S, independent runs.
        num_rounds: T.
        num_modes: of the mixture, on a circle.
        reward_scale: reward lost for each squared unit of distance (nats).
        tastes: of the raters, shares adding up to 1.
        pooled: whether one reward is trained on the records of all tastes, instead of one for each.
        num_records: preference records of a round that train.
        num_audited: further records of a round, which trusted raters judge again.
        num_fixed: records of the fixed trusted set, of the first generator's samples.
        loop: curation and retraining.
        attack: one of `ATTACKS`; `gradient-reward` minimises the curated reward instead of the covariance.
        attack_share: kappa.
        distance_weight: alpha, of the gradient attacks.
        num_stages: of the gradient attacks.
        defence: one of `DEFENCES`; it acts from the round on in which the monitor raises its alarm.
        removal: of the defences.
        fit: of the reward model; few steps are an optimisation cut short.
        em_steps: of a refit of the generator; likewise.
        seed: of everything.
    """

    num_seeds: int = 200
    num_rounds: int = 10
    num_modes: int = 8
    reward_scale: float = 0.25
    tastes: tuple[Taste, ...] = (Taste(share=1.0, mode=0),)
    pooled: bool = False
    num_records: int = 400
    num_audited: int = 50
    num_fixed: int = 400
    loop: LoopOptions = field(default_factory=LoopOptions)
    attack: str = "clean"
    attack_share: float = 0.2
    distance_weight: float = 0.0
    num_stages: int = 5
    defence: str = "none"
    removal: RemovalOptions = field(default_factory=RemovalOptions)
    fit: FitOptions = field(default_factory=FitOptions)
    em_steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attack not in ATTACKS or self.defence not in DEFENCES:
            raise ValueError(
                f"attack '{self.attack}': one of {', '.join(ATTACKS)}; defence '{self.defence}': one of"
                f" {', '.join(DEFENCES)}"
            )
        if not math.isclose(sum(taste.share for taste in self.tastes), 1):
            raise ValueError("tastes: their shares do not add up to 1")


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """What was measured.

    Attributes:
        rewards: [S, T + 1, G] mean reward of every taste over the samples before each round, and at the end.
        measures: of every round, by the users' mean reward and the mean curating one.
        alarms: [S, T] whether the monitor had raised its alarm by the end of a round's audit.
        fixed_alarms: [L, F, S, T] likewise by fixed trusted sets, of which a share `FIXED_FLOORS` is to be predicted,
            of the sizes `FIXED_SIZES`.
        removed: [S, T, G] share of the untampered records of every taste that the defence removed.
        caught: [S, T, G] share of the tampered ones.
    """

    rewards: Tensor
    measures: list[RoundMeasures]
    alarms: Tensor
    fixed_alarms: Tensor
    removed: Tensor
    caught: Tensor


def monomials(samples: Tensor) -> Tensor:
    """Features [..., N, 5] of samples [..., N, 2]: all monomials of degree one and two, of about unit size."""
    x, y = samples[..., 0], samples[..., 1]
    return torch.stack([x, y, x * x / 2, y * y / 2, x * y], -1) / 2


def simulate(options: StudyOptions) -> Trajectory:
    """Run the loop for all seeds of a study."""
    return _Study(options).run()


@dataclass(slots=True, eq=False)
class _Group:
    """The records of one taste in a round.

    Attributes:
        pairs: that train, as attacked.
        audited: records that do not.
        trusted: [S, m] labels of the latter by trusted raters.
        flips: [S, N] which of the former were tampered with.
    """

    pairs: Pairs
    audited: Pairs
    trusted: Tensor
    flips: Tensor


class _Study:
    """The state of a study: generators, audits, figures."""

    def __init__(self, options: StudyOptions) -> None:
        self._options = options
        self._random = torch.Generator().manual_seed(options.seed)
        self._real = replace(circle_mixture(options.num_modes), em_steps=options.em_steps).expanded(options.num_seeds)
        self._audits = [start_audit((options.num_seeds,), _MODEL.num_features) for _ in options.tastes]
        self._fixed = self._records(self._real, options.tastes[0], options.num_fixed)
        self._fixed_log_e_values: list[Tensor] = []

    def run(self) -> Trajectory:
        current = self._real
        rewards, measures, alarms, removed, caught = [], [], [], [], []
        for _ in range(self._options.num_rounds):
            groups = [self._collect(current, taste) for taste in self._options.tastes]
            fits = self._fit(groups, [torch.ones_like(group.pairs.labels) for group in groups])
            self._monitor(groups, fits)
            alarms.append(self._alarm())
            weights = [torch.where(alarms[-1][:, None], kept, 1.0) for kept in self._defended_weights(groups)]
            defended = self._defended_fits(groups, weights, fits, alarms[-1])
            tampered = [group.flips for group in groups]
            removed.append(_removed_shares(weights, [~flips for flips in tampered]))
            caught.append(_removed_shares(weights, tampered))
            rewards.append(self._taste_rewards(current))
            measures.append(self._measure(current, defended))
            current = self._retrained(current, defended)
        rewards.append(self._taste_rewards(current))
        log_e_values = torch.stack(self._fixed_log_e_values, -1)
        return Trajectory(
            rewards=torch.stack(rewards, 1),
            measures=measures,
            alarms=torch.stack(alarms, 1),
            fixed_alarms=(combined_e_value(log_e_values) >= 1 / LEVEL).cummax(-1).values,
            removed=torch.stack(removed, 1),
            caught=torch.stack(caught, 1),
        )

    def _reward(self, samples: Tensor, taste: Taste) -> Tensor:
        distance = samples - self._real.means[0, taste.mode]
        return -self._options.reward_scale * distance.square().sum(-1)

    def _records(self, current: GaussianMixture, taste: Taste, count: int) -> Pairs:
        """Records of honest raters."""
        samples = current.sample(2 * count, self._random)
        first, second = samples[:, :count], samples[:, count:]
        labels = draw_preferences(self._reward(first, taste), self._reward(second, taste), self._random)
        return Pairs(monomials(first), monomials(second), labels)

    def _collect(self, current: GaussianMixture, taste: Taste) -> _Group:
        options = self._options
        num_training, num_audited = (round(taste.share * count) for count in (options.num_records, options.num_audited))
        honest = self._records(current, taste, num_training + num_audited)
        flips = self._attack(honest, monomials(current.sample(_NUM_PROBES, self._random)))
        attacked = honest.flipped(flips)
        training, audited = torch.arange(num_training), torch.arange(num_training, len(honest))
        again = honest.take(audited)
        # The linear model of squared distance is exact in the monomials, so that margins follow from differences.
        truth = _true_parameters(self._real.means[0, taste.mode], options.reward_scale)
        trusted = draw_preferences(_MODEL(truth, again.first), _MODEL(truth, again.second), self._random)
        return _Group(attacked.take(training), attacked.take(audited), trusted, flips[:, :num_training])

    def _attack(self, honest: Pairs, probes: Tensor) -> Tensor:
        options = self._options
        if options.attack == "clean":
            return torch.zeros_like(honest.labels, dtype=torch.bool)
        if options.attack == "random":
            return random_flips(honest.labels, options.attack_share, self._random)
        clean = fit_reward(_MODEL, honest, _FIT).parameters
        if options.attack == "largest-difference":
            return largest_difference_flips(_MODEL, clean, honest, options.attack_share)
        if options.attack == "highest-reward":
            return highest_reward_flips(_MODEL, clean, honest, options.attack_share)
        attack = AttackOptions(
            share=options.attack_share, distance_weight=options.distance_weight, num_stages=options.num_stages
        )
        if options.attack == "gradient-reward":
            attack = replace(attack, objective=curated_reward_objective)
        return gradient_flips(_MODEL, clean, honest, probes, attack)

    def _fit(self, groups: Sequence[_Group], weights: Sequence[Tensor]) -> list[Tensor]:
        """Parameters [S, 5] of the reward of each taste."""
        fit = self._options.fit
        if self._options.pooled:
            pooled = _joined([group.pairs for group in groups])
            return [fit_reward(_MODEL, pooled, fit, weights=torch.cat(list(weights), -1)).parameters] * len(groups)
        return [
            fit_reward(_MODEL, group.pairs, fit, weights=kept).parameters
            for group, kept in zip(groups, weights, strict=True)
        ]

    def _monitor(self, groups: Sequence[_Group], fits: Sequence[Tensor]) -> None:
        for index, (group, parameters) in enumerate(zip(groups, fits, strict=True)):
            state, audited = self._audits[index], group.audited
            audit = Audit(
                audited.first - audited.second, audited.labels, group.trusted, margins(_MODEL, parameters, audited)
            )
            self._audits[index] = continue_audit(state, audit, _MODEL(parameters, state.differences))
        agreement = agreements(margins(_MODEL, fits[0], self._fixed), self._fixed.labels)
        by_size = [agreement[:, :size] for size in FIXED_SIZES]
        self._fixed_log_e_values.append(
            torch.stack(
                [torch.stack([accuracy_log_e_value(part, floor) for part in by_size]) for floor in FIXED_FLOORS]
            )
        )

    def _alarm(self) -> Tensor:
        """[S]; several tastes share the level."""
        alarms = [audit.alarm(LEVEL / len(self._audits)) for audit in self._audits]
        return torch.stack(alarms).any(0)

    def _trusted(self, index: int) -> Pairs:
        audit: AuditState = self._audits[index]
        return Pairs(audit.differences, torch.zeros_like(audit.differences), audit.trusted)

    def _defended_weights(self, groups: Sequence[_Group]) -> list[Tensor]:
        """[S, N] weights of the records of each taste, as if the alarm was raised."""
        options, sizes = self._options, [len(group.pairs) for group in groups]
        if options.defence in ("none", "trusted-only"):
            return [torch.ones_like(group.pairs.labels) for group in groups]
        records = _joined([group.pairs for group in groups])
        judged = [self._trusted(index) for index in range(len(groups))]
        trusted, removal = _joined(judged), replace(options.removal, fit=options.fit)
        if options.defence == "influence":
            kept = remove_by_influence(_MODEL, records, trusted, removal)
        else:
            labels, judges = (torch.arange(len(sizes)).repeat_interleave(torch.tensor(counts))
                              for counts in (sizes, [len(part) for part in judged]))  # fmt: skip
            kept = remove_by_group(_MODEL, records, labels, trusted, judges, removal)
        return list(kept.split(sizes, -1))

    def _defended_fits(
        self, groups: Sequence[_Group], weights: Sequence[Tensor], fits: Sequence[Tensor], alarm: Tensor
    ) -> list[Tensor]:
        if self._options.defence == "none":
            return list(fits)
        if self._options.defence == "trusted-only":
            judged = [self._trusted(index) for index in range(len(groups))]
            defended = [fit_reward(_MODEL, part, self._options.fit).parameters for part in judged]
        else:
            defended = self._fit(groups, weights)
        return [torch.where(alarm[:, None], new, old) for new, old in zip(defended, fits, strict=True)]

    def _taste_rewards(self, current: GaussianMixture) -> Tensor:
        samples = current.sample(_NUM_PROBES, self._random)
        return torch.stack([self._reward(samples, taste).mean(-1) for taste in self._options.tastes], -1)

    def _measure(self, current: GaussianMixture, fits: Sequence[Tensor]) -> RoundMeasures:
        samples = current.sample(_NUM_MEASURED, self._random)
        tastes, features = self._options.tastes, monomials(samples)
        true = sum((taste.share * self._reward(samples, taste) for taste in tastes), torch.zeros(()))
        learned = sum(
            (taste.share * _MODEL(fit, features) for taste, fit in zip(tastes, fits, strict=True)), torch.zeros(())
        )
        real = self._real.sample(_NUM_MEASURED, self._random)
        modes = torch.cdist(samples, self._real.means).argmin(-1)
        return measure_round(samples, true, learned, modes, self._options.num_modes, real)

    def _retrained(self, current: GaussianMixture, fits: Sequence[Tensor]) -> GaussianMixture:
        choosers = [
            Choosers(taste.share, lambda samples, fit=fit: _MODEL(fit, monomials(samples)))  # type: ignore[misc]
            for taste, fit in zip(self._options.tastes, fits, strict=True)
        ]
        return next_generator(current, choosers, self._options.loop, self._random, self._real)


def _true_parameters(centre: Tensor, scale: float) -> Tensor:
    """The taste's reward in monomials, up to a constant: `-scale |x - centre|^2`."""
    x, y = centre.tolist()
    return scale * torch.tensor([4 * x, 4 * y, -4.0, -4.0, 0.0], dtype=torch.float64)


def _joined(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(
        torch.cat([part.first for part in parts], -2),
        torch.cat([part.second for part in parts], -2),
        torch.cat([part.labels for part in parts], -1),
    )


def _removed_shares(weights: Sequence[Tensor], members: Sequence[Tensor]) -> Tensor:
    """Share of the members [S, N] of each taste whose weight is 0, [S, G]; 0 where there is none."""
    shares = [
        ((1 - kept) * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)
        for kept, chosen in zip(weights, members, strict=True)
    ]
    return torch.stack(shares, -1)
