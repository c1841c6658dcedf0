"""One round of the loop: sample, curate, mix with real data, refit; and what is measured of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from engine.methods.curation.bounds import sample_covariance
from engine.methods.curation.generators import Generator
from engine.methods.curation.measures import class_balance, class_shares
from engine.methods.curation.selection import select
from engine.methods.kernel_distance import unbiased_mmd

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How the loop retrains.

    Attributes:
        num_training: samples that a generator is refitted on, real ones included.
        num_candidates: K.
        curated_weight: lambda, curated samples for each real one; infinity for a loop without real data.
    """

    num_training: int = 500
    num_candidates: int = 4
    curated_weight: float = math.inf

    def __post_init__(self) -> None:
        if self.num_training < 1 or self.num_candidates < 1 or self.curated_weight < 0:
            raise ValueError(
                f"num_training {self.num_training}, num_candidates {self.num_candidates}: 1 or more;"
                f" curated_weight {self.curated_weight}: 0 or more"
            )

    @property
    def num_curated(self) -> int:
        """Curated samples of a round, `lambda / (1 + lambda)` of all."""
        if math.isinf(self.curated_weight):
            return self.num_training
        return round(self.num_training * self.curated_weight / (1 + self.curated_weight))


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


def curate(samples: Tensor, rewards: Tensor, num_candidates: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Select one of every K samples by Bradley-Terry.

    Args:
        samples: [..., N K, d]; a choice is among K consecutive ones.
        rewards: [..., N K].
        num_candidates: K.
        generator: of the choices.

    Returns:
        The selected samples [..., N, d], and their positions [..., N] among those given.

    Raises:
        ValueError: the number of samples is no multiple of K.
    """
    count = rewards.shape[-1]
    if count % num_candidates:
        raise ValueError(f"samples: {count} are no multiple of {num_candidates} candidates; drop the rest")
    groups = rewards.unflatten(-1, (count // num_candidates, num_candidates))
    offset = torch.arange(0, count, num_candidates)
    positions = offset + select(groups, generator)
    return torch.gather(samples, -2, positions[..., None].expand(*positions.shape, samples.shape[-1])), positions


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
