"""The loop on Gaussian mixtures: attacks and defences over many seeds at once, in seconds.

Raters have one or several tastes. Every round has new preference records of the present generator's samples, of which
the last ones are audited and do not train; the attacker exchanges labels of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curation_mixtures.guard import Guard, GuardOptions
from curation_mixtures.raters import MODEL, GroupRecords, Raters
from curation_mixtures.rounds import Choosers, RoundMeasures, measure_round, next_generator
from engine.methods.curation.attacks import ATTACKS, AttackOptions, flips_by
from engine.methods.curation.defences import RemovalOptions
from engine.methods.curation.generators import GaussianMixture, circle_mixture, monomials
from engine.methods.curation.loop import LoopOptions
from engine.methods.curation.reward_models import FitOptions

CLEAN = "clean"
DEFENCES = ("none", "influence", "group", "trusted-only")
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
        attack: `clean`, or one of `attacks.ATTACKS`.
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
        if self.attack not in (CLEAN, *ATTACKS) or self.defence not in DEFENCES:
            raise ValueError(
                f"attack '{self.attack}': one of {', '.join((CLEAN, *ATTACKS))}; defence '{self.defence}': one of"
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


def simulate(options: StudyOptions) -> Trajectory:
    """Run the loop for all seeds of a study."""
    return _Study(options).run()


class _Study:
    """The state of a study: generators, raters, guard."""

    def __init__(self, options: StudyOptions) -> None:
        self._options = options
        self._random = torch.Generator().manual_seed(options.seed)
        self._real = replace(circle_mixture(options.num_modes), em_steps=options.em_steps).expanded(options.num_seeds)
        self._raters = [Raters(self._real.means[0, taste.mode], options.reward_scale) for taste in options.tastes]
        fixed = self._raters[0].records(self._real, options.num_fixed, self._random)
        # Records are removed for the sake of the reward that is trained on the others.
        removal = replace(options.removal, fit=options.fit)
        guard = GuardOptions(defence=options.defence, removal=removal, fit=options.fit, pooled=options.pooled)
        self._guard = Guard(len(options.tastes), fixed, guard)
        self._attack = AttackOptions(
            share=options.attack_share,
            distance_weight=options.distance_weight,
            num_stages=options.num_stages,
        )

    def run(self) -> Trajectory:
        current = self._real
        rewards, measures, alarms, removed, caught = [], [], [], [], []
        for _ in range(self._options.num_rounds):
            groups = [
                self._collect(current, raters, taste.share)
                for raters, taste in zip(self._raters, self._options.tastes, strict=True)
            ]
            learned = self._guard.fit(groups)
            alarms.append(self._guard.watch(groups, learned))
            weights, defended = self._guard.defended(groups, learned, alarms[-1])
            tampered = [group.flips for group in groups]
            removed.append(_removed_shares(weights, [~flips for flips in tampered]))
            caught.append(_removed_shares(weights, tampered))
            rewards.append(self._taste_rewards(current))
            measures.append(self._measure(current, defended))
            current = self._retrained(current, defended)
        rewards.append(self._taste_rewards(current))
        return Trajectory(
            rewards=torch.stack(rewards, 1),
            measures=measures,
            alarms=torch.stack(alarms, 1),
            fixed_alarms=self._guard.fixed_alarms(),
            removed=torch.stack(removed, 1),
            caught=torch.stack(caught, 1),
        )

    def _collect(self, current: GaussianMixture, raters: Raters, share: float) -> GroupRecords:
        """The records of a round, of which a share of those asked for is due to these raters."""
        options = self._options
        num_training, num_audited = (round(share * count) for count in (options.num_records, options.num_audited))
        honest = raters.records(current, num_training + num_audited, self._random)
        probes = monomials(current.sample(_NUM_PROBES, self._random))
        flips = torch.zeros_like(honest.labels, dtype=torch.bool)
        if options.attack != CLEAN:
            flips = flips_by(options.attack, MODEL, honest, probes, self._attack, self._random)
        attacked = honest.flipped(flips)
        training, audited = torch.arange(num_training), torch.arange(num_training, len(honest))
        trusted = raters.choose_again(honest.take(audited), self._random)
        return GroupRecords(attacked.take(training), attacked.take(audited), trusted, flips[:, :num_training])

    def _taste_rewards(self, current: GaussianMixture) -> Tensor:
        samples = current.sample(_NUM_PROBES, self._random)
        return torch.stack([raters.rewards(samples).mean(-1) for raters in self._raters], -1)

    def _measure(self, current: GaussianMixture, fits: Sequence[Tensor]) -> RoundMeasures:
        samples = current.sample(_NUM_MEASURED, self._random)
        shares, features = [taste.share for taste in self._options.tastes], monomials(samples)
        true = [share * raters.rewards(samples) for share, raters in zip(shares, self._raters, strict=True)]
        learned = [share * MODEL(fit, features) for share, fit in zip(shares, fits, strict=True)]
        real = self._real.sample(_NUM_MEASURED, self._random)
        modes = torch.cdist(samples, self._real.means).argmin(-1)
        totals = torch.stack(true).sum(0), torch.stack(learned).sum(0)
        return measure_round(samples, *totals, modes, self._options.num_modes, real)

    def _retrained(self, current: GaussianMixture, fits: Sequence[Tensor]) -> GaussianMixture:
        choosers = [
            Choosers(taste.share, lambda samples, fit=fit: MODEL(fit, monomials(samples)))  # type: ignore[misc]
            for taste, fit in zip(self._options.tastes, fits, strict=True)
        ]
        return next_generator(current, choosers, self._options.loop, self._random, self._real)


def _removed_shares(weights: Sequence[Tensor], members: Sequence[Tensor]) -> Tensor:
    """Share of the members [S, N] of each taste whose weight is 0, [S, G]; 0 where there is none."""
    shares = [
        ((1 - kept) * chosen).sum(-1) / chosen.sum(-1).clamp_min(1)
        for kept, chosen in zip(weights, members, strict=True)
    ]
    return torch.stack(shares, -1)
