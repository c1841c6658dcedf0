"""Shares of modes and classes among the samples of a round, and how even they are."""

from __future__ import annotations

import torch
from torch import Tensor


def class_shares(labels: Tensor, num_classes: int) -> Tensor:
    """Share of each class among labels [..., N], [..., n] in float64."""
    return torch.nn.functional.one_hot(labels, num_classes).double().mean(-2)


def class_balance(shares: Tensor) -> Tensor:
    """Entropy of class shares [..., n] over that of equal ones, [...] in [0, 1]."""
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return entropy / torch.log(torch.tensor(float(shares.shape[-1]), dtype=shares.dtype))
