"""Which samples of a batch have arrived where they are guided: their gradient need not be taken.

Legend: B samples, K criteria.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Arrivals:
    """The samples that had arrived at the last guided step, and are likely to be there at the next one.

    What it says saves work and decides nothing: at every guided step each sample is looked at.

    Args:
        num_samples: B.
        row_multiple: as in `GuidanceScene`.
    """

    def __init__(self, num_samples: int, row_multiple: int | None) -> None:
        self._resting = torch.zeros(num_samples, dtype=torch.bool)
        self._multiple = row_multiple

    def note(self, losses: Tensor) -> None:
        """Note the criteria [K, B] of a guided step; waits for a GPU, unless all rows always stay together."""
        if self._multiple is not None:
            self._resting = (losses == 0).all(0).cpu()

    def split(self) -> tuple[Tensor, Tensor]:
        """The numbers of the samples that are expected to move, filled up to the multiple, and those of the others."""
        resting = self._resting.nonzero()[:, 0]
        moving = self.filled((~self._resting).nonzero()[:, 0], resting)
        return moving, resting[~torch.isin(resting, moving)]

    def filled(self, rows: Tensor, among: Tensor) -> Tensor:
        """Rows with as many others of `among` as the multiple asks for, if there are so many."""
        others = among[~torch.isin(among, rows)]
        return torch.cat([rows, others[: -len(rows) % (self._multiple or 1)]])
