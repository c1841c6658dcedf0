"""The one contract of class distributions: whoever draws does not ask which estimator it draws from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ClassDistributions(Protocol):
    """A distribution of image embeddings for every class."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order."""

    @property
    def dim(self) -> int:
        """Entries d of an embedding."""

    def check(self, class_index: int) -> None:
        """Raise a ValueError that names the class where it cannot be drawn from."""

    def draw(self, class_index: int, generator: torch.Generator) -> Tensor:
        """One embedding [d], float32, on the CPU; the same amount of randomness is consumed by every draw."""
