"""Raters of samples of a Gaussian mixture: what they like, and the records they make.

A taste is a mode of the mixture: the reward falls with the squared distance to it, so that a linear reward on
monomials can be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.curation.generators import GaussianMixture, monomials
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import LinearReward
from engine.methods.curation.selection import draw_preferences

# The reward of all raters, on `monomials`.
MODEL = LinearReward(5)


@dataclass(frozen=True, slots=True, eq=False)
class Raters:
    """Honest raters of one taste.

    Attributes:
        centre: [2], the point they like best.
        scale: reward lost for each squared unit of distance (nats).
    """

    centre: Tensor
    scale: float

    def rewards(self, samples: Tensor) -> Tensor:
        """True rewards [..., N] of samples [..., N, 2]."""
        return -self.scale * (samples - self.centre).square().sum(-1)

    def records(self, mixture: GaussianMixture, count: int, generator: torch.Generator) -> Pairs:
        """Records [..., count] of pairs of new samples."""
        samples = mixture.sample(2 * count, generator)
        first, second = samples[:, :count], samples[:, count:]
        labels = draw_preferences(self.rewards(first), self.rewards(second), generator)
        return Pairs(monomials(first), monomials(second), labels)

    def choose_again(self, pairs: Pairs, generator: torch.Generator) -> Tensor:
        """New labels [..., N] for pairs of monomials."""
        x, y = self.centre.tolist()
        # -|x - centre|^2 in monomials, up to a constant, which differences do not see.
        truth = self.scale * torch.tensor([4 * x, 4 * y, -4.0, -4.0, 0.0], dtype=torch.float64)
        return draw_preferences(MODEL(truth, pairs.first), MODEL(truth, pairs.second), generator)


@dataclass(frozen=True, slots=True, eq=False)
class GroupRecords:
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


def joined_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The records of several groups, one after the other."""
    return Pairs(
        torch.cat([part.first for part in parts], -2),
        torch.cat([part.second for part in parts], -2),
        torch.cat([part.labels for part in parts], -1),
    )
