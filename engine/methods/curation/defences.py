"""Defences of a reward model against tampered preference records: removal by influence, trimming by group.

Both compare with a few trusted preferences, and return weights of the records, 1 kept and 0 removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.methods.curation.hypergradient import (
    SolverOptions,
    conjugate_gradient,
    hessian_product,
    margin_derivatives,
    objective_gradient,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import FitOptions, RewardModel, fit_reward, margins, preference_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalOptions:
    """How many records are removed, and how.

    Attributes:
        share: of the records that is removed at most: an upper bound of what may be tampered with.
        num_stages: the share is removed in so many equal parts, with a new fit and a new ranking before each.
        fit: of the reward model.
        solver: of the linear system.
    """

    share: float = 0.4
    num_stages: int = 10
    fit: FitOptions = field(default_factory=FitOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.num_stages < 1:
            raise ValueError(f"share {self.share}: 0 or more, below 1; num_stages {self.num_stages}: 1 or more")


def removal_effects(
    model: RewardModel, parameters: Tensor, pairs: Pairs, trusted: Pairs, options: RemovalOptions, weights: Tensor
) -> Tensor:
    """Predicted change of the mean trusted loss if each record were left out of training, [..., N].

    The influence function of Koh and Liang 2017: `grad loss_i . H^-1 grad L_trusted / N`. Negative where the removal
    brings the learned reward closer to the trusted choices.

    Args:
        model: P parameters.
        parameters: [..., P] trained on the records with these weights.
        pairs: N records.
        trusted: m trusted records.
        options: fit and solver.
        weights: [..., N] of the records in training, 0 or 1; the result has no meaning for those with 0.
    """
    target = objective_gradient(
        lambda point: preference_losses(margins(model, point, trusted), trusted.labels).mean(-1), parameters
    )
    product = hessian_product(model, parameters, pairs, options.fit.l2, weights)
    vector = conjugate_gradient(product, target, options.solver).vector
    missed = torch.sigmoid(margins(model, parameters, pairs)) - pairs.labels
    return missed * margin_derivatives(model, parameters, pairs, vector) / len(pairs)


def remove_by_influence(
    model: RewardModel, pairs: Pairs, trusted: Pairs, options: RemovalOptions, start: Tensor | None = None
) -> Tensor:
    """Weights [..., N] of the records without those whose removal most lowers the trusted loss.

    Records are removed in stages, and never return: once the learned reward is right, tampered records no longer
    stand out. Of the stages that one with the fewest removals is taken whose trusted loss is within one standard
    error of the least, so that where nothing is wrong little is removed.

    It serves the taste of the trusted raters alone: records of an honest minority with another taste are removed
    first. Where there are several tastes, remove group by group (`remove_by_group`).

    Args:
        model: P parameters.
        pairs: N records.
        trusted: m trusted records.
        options: how many.
        start: [..., P] of the first fit; networks need it.
    """
    limit = round(options.share * len(pairs))
    weights = torch.ones_like(pairs.labels)
    parameters = fit_reward(model, pairs, options.fit, start=start).parameters
    path, losses = [weights], [_trusted_losses(model, parameters, trusted)]
    for stage in range(1, options.num_stages + 1):
        effects = removal_effects(model, parameters, pairs, trusted, options, weights)
        part = limit * stage // options.num_stages - limit * (stage - 1) // options.num_stages
        weights = weights - _harmful(effects.masked_fill(weights == 0, torch.inf), part)
        parameters = fit_reward(model, pairs, options.fit, start=parameters, weights=weights).parameters
        path.append(weights)
        losses.append(_trusted_losses(model, parameters, trusted))
    chosen = _earliest_within_error(torch.stack(losses, -2))
    stacked = torch.stack(path, -2)
    index = chosen[..., None, None].expand(*chosen.shape, 1, stacked.shape[-1])
    return torch.gather(stacked, -2, index)[..., 0, :]


def _trusted_losses(model: RewardModel, parameters: Tensor, trusted: Pairs) -> Tensor:
    return preference_losses(margins(model, parameters, trusted), trusted.labels)


def _harmful(effects: Tensor, count: int) -> Tensor:
    """1 for the `count` most negative effects of a run, as far as they are negative; [..., N]."""
    lowest = effects.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(effects).scatter(-1, lowest, 1.0) * (effects < 0)


def _earliest_within_error(losses: Tensor) -> Tensor:
    """The first stage whose mean loss is within a standard error of the least, [..., T, m] to [...]."""
    means = losses.mean(-1)
    best = means.argmin(-1)
    index = best[..., None, None].expand(*best.shape, 1, losses.shape[-1])
    excess = losses - torch.gather(losses, -2, index)
    error = excess.std(-1) / losses.shape[-1] ** 0.5
    return (excess.mean(-1) <= error).double().argmax(-1)


def remove_by_group(
    model: RewardModel,
    pairs: Pairs,
    groups: Tensor,
    trusted: Pairs,
    trusted_groups: Tensor,
    options: RemovalOptions,
    start: Tensor | None = None,
) -> Tensor:
    """Weights [..., N] of the records, each group being compared with its own trusted records alone.

    The taste of a small group is no fault there, and at most the same share of every group is removed.

    Args:
        model: P parameters.
        pairs: N records.
        groups: [N] group of each record.
        trusted: m trusted records.
        trusted_groups: [m] group of each trusted record.
        options: how many of each group.
        start: [..., P] of the first fits; networks need it.

    Raises:
        ValueError: a group has no trusted record.
    """
    weights = torch.ones_like(pairs.labels)
    for group in groups.unique().tolist():
        members, judges = (groups == group).nonzero()[:, 0], (trusted_groups == group).nonzero()[:, 0]
        if not len(judges):
            raise ValueError(f"trusted_groups: group {group} has records but no trusted one; have some judged")
        kept = remove_by_influence(model, pairs.take(members), trusted.take(judges), options, start)
        weights[..., members] = kept
    return weights
