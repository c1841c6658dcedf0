"""How many rows a batch is denoised in on a CPU: no more than its samples need, where that leaves every byte equal.

Whether it does is up to kernels, which other machines and models have others of. So one step is made in the whole shape
and in the smallest one, and compared, before a request's batches are made smaller: once in a process. Shapes between
the two take the kernels of both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from engine.generation.batching import MULTIPLE

# Kernels of matrix products take rows by four.
ROW_MULTIPLE = 4


class RowShapes:
    """What comparisons of shapes have shown, by what decides kernels: models, method and sampling."""

    def __init__(self) -> None:
        self._agree: dict[Hashable, bool] = {}

    def agree(self, key: Hashable, compute: Callable[[int], Sequence[Tensor] | None], num_rows: int) -> bool:
        """Whether `ROW_MULTIPLE` rows get the bytes that they have among `num_rows`.

        Args:
            key: what kernels depend on.
            compute: tensors [rows, ...] of a step with so many of the same samples; None where they show nothing.
        """
        if key not in self._agree:
            self._agree[key] = _are_equal(compute(num_rows), compute(ROW_MULTIPLE))
        return self._agree[key]


def _are_equal(whole: Sequence[Tensor] | None, part: Sequence[Tensor] | None) -> bool:
    if whole is None or part is None:
        return False
    return all(torch.equal(large[: len(small)], small) for large, small in zip(whole, part, strict=True))


def fewest_rows(num_samples: int, num_rows: int) -> int:
    """The smallest shape that holds samples: a multiple of `ROW_MULTIPLE`, at most `num_rows`."""
    return min(num_rows, -(-num_samples // ROW_MULTIPLE) * ROW_MULTIPLE)


def gpu_multiple(num_rows: int) -> int:
    """Of the rows that gradients are taken for on a GPU: four shapes, as kernels are searched for each of them."""
    return max(MULTIPLE, -(-num_rows // 4))
