"""The contract of class distributions, which all estimators share."""

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
        """Check that a class can be drawn from.

        Raises:
            ValueError: it cannot; the message names the class.
        """

    def draw(self, class_index: int, generator: torch.Generator) -> Tensor:
        """One embedding [d], float32, on the CPU; every draw consumes the same amount of randomness."""
