"""Attacks on preference records: which labels to exchange within a budget. For red-teaming one's own loop.

All of them exchange `budget(kappa, N)` labels. The gradient attack of Wei and Zhang ranks records here by the *signed*
change of the objective that exchanging a label predicts. The size alone, by which the authors' public code ranks, puts
exchanges that help the users as high as those that harm them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.methods.curation.bounds import sample_covariance
from engine.methods.curation.hypergradient import SolverOptions, hypergradient
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import FitOptions, RewardModel, fit_reward, margins

ATTACKS = ("random", "largest-difference", "highest-reward", "gradient", "gradient-reward")
# Objectives take true and learned rewards of probe samples, [..., M] both, and return [...]; attackers minimise.
Objective = Callable[[Tensor, Tensor], Tensor]


def covariance_objective(true: Tensor, learned: Tensor) -> Tensor:
    """`Cov(e^R, e^R~)`, Wei and Zhang's objective. It is unbounded: a learned reward of a large scale lowers it too."""
    return sample_covariance(true, learned)


def curated_reward_objective(true: Tensor, learned: Tensor) -> Tensor:
    """Expected true reward after one round of curation by many candidates, `E[R e^R~] / E[e^R~]`: what is at stake."""
    return (torch.softmax(learned, -1) * true).sum(-1)


def budget(share: float, num_records: int) -> int:
    """Labels that an attacker of budget kappa exchanges among N records.

    Raises:
        ValueError: kappa is no share.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: {share} is not between 0 and 1")
    return round(share * num_records)


def random_flips(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Exchange labels [..., N] at random; booleans [..., N]."""
    return _lowest(torch.rand(labels.shape, generator=generator, dtype=torch.float64), budget(share, labels.shape[-1]))


def largest_difference_flips(model: RewardModel, parameters: Tensor, pairs: Pairs, share: float) -> Tensor:
    """Exchange the labels of pairs with the largest |R(x) - R(z)|, a heuristic of Wei and Zhang; booleans [..., N]."""
    return _lowest(-margins(model, parameters, pairs).abs(), budget(share, len(pairs)))


def highest_reward_flips(model: RewardModel, parameters: Tensor, pairs: Pairs, share: float) -> Tensor:
    """Exchange the labels of pairs with the highest max(R(x), R(z)), their other heuristic; booleans [..., N]."""
    highest = torch.maximum(model(parameters, pairs.first), model(parameters, pairs.second))
    return _lowest(-highest, budget(share, len(pairs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackOptions:
    """The gradient attack.

    Attributes:
        share: kappa, share of the labels that are exchanged.
        objective: what is minimised.
        distance_weight: alpha, weight of the mean squared distance of learned to true rewards on the probes: an
            attack that stays close is harder to see. Its slope is zero where nothing is exchanged yet, so that it acts
            from the second stage on.
        num_stages: the budget is spent in so many equal parts; the model is trained again before each, and the records
            that are left are ranked again. One stage is the papers' algorithm without the labels between 0 and 1 of
            its search.
        signed: rank by the signed change; False ranks by its size, as the authors' public code does: to compare.
        fit: how the attacker expects the reward model to be trained.
        solver: of the linear system.
    """

    share: float
    objective: Objective = covariance_objective
    distance_weight: float = 0.0
    num_stages: int = 1
    signed: bool = True
    fit: FitOptions = field(default_factory=FitOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)

    def __post_init__(self) -> None:
        if self.num_stages < 1 or self.distance_weight < 0:
            raise ValueError(
                f"num_stages {self.num_stages}: 1 or more; distance_weight {self.distance_weight}: 0 or more"
            )


def flips_by(
    attack: str,
    model: RewardModel,
    honest: Pairs,
    probes: Tensor,
    options: AttackOptions,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> Tensor:
    """Exchange labels by an attack whose author knows honest records, and so the reward that they teach.

    Args:
        attack: one of `ATTACKS`; `gradient-reward` minimises the curated reward instead of the covariance.
        model: P parameters.
        honest: N records.
        probes: [..., M, d] features of samples of the present generator.
        options: budget; of the gradient attacks all but the objective.
        generator: of random exchanges.
        start: [..., P] of the fit of the honest reward; networks need it.

    Returns:
        Booleans [..., N].
    """
    if attack == "random":
        return random_flips(honest.labels, options.share, generator)
    believed = fit_reward(model, honest, options.fit, start=start).parameters
    if attack == "largest-difference":
        return largest_difference_flips(model, believed, honest, options.share)
    if attack == "highest-reward":
        return highest_reward_flips(model, believed, honest, options.share)
    objective = curated_reward_objective if attack == "gradient-reward" else covariance_objective
    return gradient_flips(model, believed, honest, probes, replace(options, objective=objective))


def gradient_flips(
    model: RewardModel, true_parameters: Tensor, pairs: Pairs, probes: Tensor, options: AttackOptions
) -> Tensor:
    """Exchange the labels that most lower the objective of the reward model trained on them; booleans [..., N].

    Args:
        model: P parameters.
        true_parameters: [..., P] of the reward R that the attacker believes users to have, trained on `pairs`.
        pairs: N records before the attack.
        probes: [..., M, d] features of samples over which the objective is taken.
        options: budget, objective, stages.
    """
    true_rewards = model(true_parameters, probes)
    flips = torch.zeros_like(pairs.labels, dtype=torch.bool)
    parameters, total = true_parameters, budget(options.share, len(pairs))

    def objective(point: Tensor) -> Tensor:
        learned = model(point, probes)
        distance = (learned - true_rewards).square().mean(-1)
        return options.objective(true_rewards, learned) + options.distance_weight * distance

    for stage in range(1, options.num_stages + 1):
        attacked = pairs.flipped(flips)
        parameters = fit_reward(model, attacked, options.fit, start=parameters).parameters
        by_label = hypergradient(
            model, parameters, attacked, objective, l2=options.fit.l2, solver=options.solver
        ).labels
        predicted = (by_label * (1 - 2 * pairs.labels)).masked_fill(flips, torch.inf)
        count = total * stage // options.num_stages - total * (stage - 1) // options.num_stages
        if options.signed:
            # Where fewer exchanges than the budget lower the objective, the rest of the budget is not spent.
            flips = flips | (_lowest(predicted, count) & (predicted < 0))
        else:
            flips = flips | _lowest((-predicted.abs()).masked_fill(flips, torch.inf), count)
    return flips


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Booleans [..., N] that mark the `count` lowest scores of each run."""
    chosen = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
