"""Selection among consecutive candidates, and the sizes of a retraining of the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.curation.selection import select


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
