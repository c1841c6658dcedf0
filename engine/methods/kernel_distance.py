"""The kernel distance of two sets of features: the estimator beneath KID."""

from __future__ import annotations

from torch import Tensor


def unbiased_mmd(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy under the kernel `(x . y / d + 1)^3`.

    Gretton et al. 2012; the kernel is that of KID (Binkowski et al. 2018). Unbiased, so that it may fall below zero.

    Args:
        first: features [..., N, d]; leading dimensions are independent pairs of sets.
        second: features [..., M, d].

    Returns:
        [...].
    """
    within = _off_diagonal_mean(_cubic(first, first)) + _off_diagonal_mean(_cubic(second, second))
    return within - 2 * _cubic(first, second).mean((-2, -1))


def _cubic(first: Tensor, second: Tensor) -> Tensor:
    gram = first @ second.mT / first.shape[-1] + 1
    return gram * gram * gram


def _off_diagonal_mean(gram: Tensor) -> Tensor:
    count = gram.shape[-1]
    return (gram.sum((-2, -1)) - gram.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))
