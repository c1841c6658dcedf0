"""A round of the loop: sample, curate, mix with real data, refit; and what is measured of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from engine.methods.curation.bounds import sample_covariance
from engine.methods.curation.loop import LoopOptions, curate
from engine.methods.curation.measures import class_balance, class_shares
from engine.methods.kernel_distance import unbiased_mmd


class Generator(Protocol):
    """What generates samples and is retrained on a selection of them."""

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Samples [..., N, d]."""

    def refit(self, samples: Tensor) -> Self:
        """The generator of the next round, trained on samples [..., N, d]."""


GeneratorT = TypeVar("GeneratorT", bound=Generator)


@dataclass(frozen=True, slots=True, eq=False)
class Choosers:
    """Some of those who choose, and what they choose by.

    Attributes:
        share: of all choices, that they make.
        rewards: of samples [..., N, d], [..., N].
    """

    share: float
    rewards: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class RoundMeasures:
    """What is measured of the samples of a round; [...] unless stated.

    Attributes:
        covariance: `Cov(e^r, e^r~)` of true and curating reward.
        occupancy: [..., n] share of each mode or class.
        balance: entropy of the shares in [0, 1].
        real_distance: squared kernel distance of the features to those of real samples, as in KID.
    """

    covariance: Tensor
    occupancy: Tensor
    balance: Tensor
    real_distance: Tensor


def next_generator(
    current: GeneratorT,
    choosers: Sequence[Choosers],
    options: LoopOptions,
    generator: torch.Generator,
    real: Generator | None = None,
) -> GeneratorT:
    """The generator of the next round.

    Args:
        current: the generator of this round.
        choosers: who curates; several where tastes differ, or where some are adversarial.
        options: sizes and mix.
        generator: of samples and choices.
        real: source of real samples; needed where `curated_weight` is finite.

    Raises:
        ValueError: the shares of the choosers do not add up to 1, or real samples are to be mixed in and there are
            none.
    """
    num_curated = options.num_curated
    if num_curated < options.num_training and real is None:
        raise ValueError("real: no source of real samples is given; set `curated_weight` to infinity, or give one")
    parts = []
    for part, count in zip(choosers, _counts([group.share for group in choosers], num_curated), strict=True):
        candidates = current.sample(count * options.num_candidates, generator)
        parts.append(curate(candidates, part.rewards(candidates), options.num_candidates, generator)[0])
    if real is not None and num_curated < options.num_training:
        parts.append(real.sample(options.num_training - num_curated, generator))
    return current.refit(torch.cat(parts, -2))


def _counts(shares: Sequence[float], total: int) -> list[int]:
    """A total divided by shares, in whole numbers."""
    if not math.isclose(sum(shares), 1):
        raise ValueError(f"choosers: their shares add up to {sum(shares)}, not to 1")
    ends = [round(total * sum(shares[: index + 1])) for index in range(len(shares))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def measure_round(
    features: Tensor,
    true_rewards: Tensor,
    curating_rewards: Tensor,
    classes: Tensor,
    num_classes: int,
    real_features: Tensor,
) -> RoundMeasures:
    """Measures of the samples of a round.

    Args:
        features: [..., N, d].
        true_rewards: [..., N], r.
        curating_rewards: [..., N], r~.
        classes: [..., N] mode or class indices.
        num_classes: n.
        real_features: [..., M, d].
    """
    shares = class_shares(classes, num_classes)
    return RoundMeasures(
        covariance=sample_covariance(true_rewards, curating_rewards),
        occupancy=shares,
        balance=class_balance(shares),
        real_distance=unbiased_mmd(features, real_features),
    )
