"""Preference records, and the tensors that reward models are trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A rater's choice between two samples.

    Attributes:
        first: key of a sample.
        second: key of another one.
        choice: 0 where the first is preferred, 1 where the second is.
        rater: who chose.
        time: seconds since the epoch.

    Raises:
        ValueError: a value is not what its field says; the message names the field.
    """

    first: str
    second: str
    choice: int
    rater: str
    time: float

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"second: '{self.second}' is the first sample too; a preference needs two")
        if self.choice not in (0, 1):
            raise ValueError(f"choice: {self.choice!r} is neither 0 (the first) nor 1 (the second)")
        if not math.isfinite(self.time):
            raise ValueError(f"time: {self.time} is not a time in seconds")


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Features and labels of preference records.

    Attributes:
        first: [..., N, d] features of the first samples.
        second: [..., N, d] features of the second samples.
        labels: [..., N] 1 where the first is preferred, 0 where the second is; values between are soft labels.

    Raises:
        ValueError: the shapes disagree.
    """

    first: Tensor
    second: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape or self.labels.shape != self.first.shape[:-1]:
            shapes = ", ".join(str(list(part.shape)) for part in (self.first, self.second, self.labels))
            raise ValueError(f"first, second, labels: {shapes}; [..., N, d] twice and [..., N] are expected")

    def __len__(self) -> int:
        return self.labels.shape[-1]

    def with_labels(self, labels: Tensor) -> Pairs:
        """The same pairs with other labels [..., N]."""
        return Pairs(self.first, self.second, labels)

    def flipped(self, flips: Tensor) -> Pairs:
        """The pairs with some labels exchanged, `flips` [..., N] booleans."""
        return self.with_labels(torch.where(flips, 1 - self.labels, self.labels))

    def take(self, index: Tensor) -> Pairs:
        """The records at positions [n], the same in all runs."""
        return Pairs(self.first[..., index, :], self.second[..., index, :], self.labels[..., index])
