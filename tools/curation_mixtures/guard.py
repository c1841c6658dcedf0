"""The guard of the loop on mixtures: audits of every taste, fixed trusted sets, and what is done on an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curation_mixtures.raters import MODEL, GroupRecords, joined_pairs
from engine.methods.curation.defences import RemovalOptions, remove_by_group, remove_by_influence
from engine.methods.curation.monitor import (
    Audit,
    accuracy_log_e_value,
    combined_e_value,
    continue_audit,
    start_audit,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import FitOptions, agreements, fit_reward, margins

LEVEL = 0.05
FIXED_SIZES = (25, 50, 100, 200, 400)
FIXED_FLOORS = (0.5, 0.65)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOptions:
    """What the guard does.

    Attributes:
        defence: `none`, `influence`, `group` or `trusted-only`.
        removal: of the defences that remove records.
        fit: of the reward models.
        pooled: whether one reward is trained on the records of all tastes, instead of one for each.
    """

    defence: str
    removal: RemovalOptions
    fit: FitOptions
    pooled: bool


class Guard:
    """What the audits have shown so far, and the rewards that follow from it.

    Args:
        num_tastes: G.
        fixed: records of a fixed trusted set, [S, F].
        options: what is done on an alarm.
    """

    def __init__(self, num_tastes: int, fixed: Pairs, options: GuardOptions) -> None:
        self._options, self._fixed = options, fixed
        runs = tuple(fixed.labels.shape[:-1])
        self._audits = [start_audit(runs, MODEL.num_features) for _ in range(num_tastes)]
        self._fixed_log_e_values: list[Tensor] = []

    def fit(self, groups: Sequence[GroupRecords], weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Parameters [S, 5] of the reward of each taste, from records with weights [S, N] each."""
        kept = [torch.ones_like(group.pairs.labels) for group in groups] if weights is None else list(weights)
        if self._options.pooled:
            pooled = joined_pairs([group.pairs for group in groups])
            fitted = fit_reward(MODEL, pooled, self._options.fit, weights=torch.cat(kept, -1)).parameters
            return [fitted] * len(groups)
        return [
            fit_reward(MODEL, group.pairs, self._options.fit, weights=part).parameters
            for group, part in zip(groups, kept, strict=True)
        ]

    def watch(self, groups: Sequence[GroupRecords], fits: Sequence[Tensor]) -> Tensor:
        """Take in the audits of a round; returns whether an alarm was ever raised, [S]. Tastes share the level."""
        for index, (group, parameters) in enumerate(zip(groups, fits, strict=True)):
            state, audited = self._audits[index], group.audited
            audit = Audit(
                audited.first - audited.second, audited.labels, group.trusted, margins(MODEL, parameters, audited)
            )
            self._audits[index] = continue_audit(state, audit, MODEL(parameters, state.differences))
        agreement = agreements(margins(MODEL, fits[0], self._fixed), self._fixed.labels)
        by_size = [agreement[:, :size] for size in FIXED_SIZES]
        self._fixed_log_e_values.append(
            torch.stack(
                [torch.stack([accuracy_log_e_value(part, floor) for part in by_size]) for floor in FIXED_FLOORS]
            )
        )
        alarms = [audit.alarm(LEVEL / len(self._audits)) for audit in self._audits]
        return torch.stack(alarms).any(0)

    def fixed_alarms(self) -> Tensor:
        """[L, F, S, T] whether a fixed set of each size and floor had raised an alarm by a round."""
        combined = combined_e_value(torch.stack(self._fixed_log_e_values, -1))
        return (combined >= 1 / LEVEL).cummax(-1).values

    def defended(
        self, groups: Sequence[GroupRecords], fits: Sequence[Tensor], alarm: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Weights [S, N] of the records of each taste and parameters [S, 5]; as they were where there is no alarm."""
        judged = [Pairs(audit.differences, torch.zeros_like(audit.differences), audit.trusted)
                  for audit in self._audits]  # fmt: skip
        everyone = [torch.ones_like(group.pairs.labels) for group in groups]
        if self._options.defence == "none":
            return everyone, list(fits)
        if self._options.defence == "trusted-only":
            weights = everyone
            renewed = [fit_reward(MODEL, part, self._options.fit).parameters for part in judged]
        else:
            kept = self._kept(groups, judged)
            weights = [torch.where(alarm[:, None], part, 1.0) for part in kept]
            renewed = self.fit(groups, weights)
        return weights, [torch.where(alarm[:, None], new, old) for new, old in zip(renewed, fits, strict=True)]

    def _kept(self, groups: Sequence[GroupRecords], judged: Sequence[Pairs]) -> list[Tensor]:
        """Weights [S, N] of the records of each taste after removal."""
        sizes = [len(group.pairs) for group in groups]
        records, trusted = joined_pairs([group.pairs for group in groups]), joined_pairs(judged)
        if self._options.defence == "influence":
            kept = remove_by_influence(MODEL, records, trusted, self._options.removal)
        else:
            members, judges = (
                torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
                for counts in (sizes, [len(part) for part in judged])
            )
            kept = remove_by_group(MODEL, records, members, trusted, judges, self._options.removal)
        return list(kept.split(sizes, -1))
