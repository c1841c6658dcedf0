"""What is measured of every round: rewards, modes, classes, distance to the real distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def mode_occupancy(samples: Tensor, centres: Tensor) -> Tensor:
    """Share of samples [..., N, d] whose nearest centre is each of `centres` [k, d], [..., k]."""
    nearest = torch.cdist(samples, centres.expand(*samples.shape[:-2], *centres.shape)).argmin(-1)
    return class_shares(nearest, len(centres))


def class_shares(labels: Tensor, num_classes: int) -> Tensor:
    """Share of each class among labels [..., N], [..., n] in float64."""
    return torch.nn.functional.one_hot(labels, num_classes).double().mean(-2)


def class_balance(shares: Tensor) -> Tensor:
    """Entropy of class shares [..., n] over that of equal ones, [...] in [0, 1]."""
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return entropy / torch.log(torch.tensor(float(shares.shape[-1]), dtype=shares.dtype))


def kernel_distance(samples: Tensor, real: Tensor) -> Tensor:
    """KID of features [..., N, d] and [..., M, d], [...]: unbiased squared MMD, kernel `(x . y / d + 1)^3`.

    Binkowski et al. 2018, on the given features. Unbiased, so that it may fall below zero.
    """
    within = _off_diagonal_mean(_cubic(samples, samples)) + _off_diagonal_mean(_cubic(real, real))
    return within - 2 * _cubic(samples, real).mean((-2, -1))


def _cubic(first: Tensor, second: Tensor) -> Tensor:
    gram = first @ second.mT / first.shape[-1] + 1
    return gram * gram * gram


def _off_diagonal_mean(gram: Tensor) -> Tensor:
    count = gram.shape[-1]
    return (gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))
