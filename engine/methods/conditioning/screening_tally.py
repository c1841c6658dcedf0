"""Counts of screening by class: samples, screened ones and draws. Without torch, as the driver adds them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreeningCount:
    """Counts of screening of a class.

    Attributes:
        num_samples: samples that were drawn for.
        num_screened: those with a draw that passed.
        num_draws: draws of all of them.
    """

    num_samples: int = 0
    num_screened: int = 0
    num_draws: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the draws that passed; 0 without draws."""
        return self.num_screened / self.num_draws if self.num_draws else 0.0

    def __add__(self, other: ScreeningCount) -> ScreeningCount:
        return ScreeningCount(
            num_samples=self.num_samples + other.num_samples,
            num_screened=self.num_screened + other.num_screened,
            num_draws=self.num_draws + other.num_draws,
        )


@dataclass(frozen=True, slots=True)
class ScreeningTally:
    """Counts of screening, class by class; tallies of shards add up.

    Attributes:
        per_class: count by class index.
    """

    per_class: dict[int, ScreeningCount] = field(default_factory=dict)

    def add(self, class_index: int, *, screened: bool, num_draws: int) -> None:
        """Count a sample."""
        count = ScreeningCount(num_samples=1, num_screened=int(screened), num_draws=num_draws)
        self.per_class[class_index] = self.per_class.get(class_index, ScreeningCount()) + count

    def add_rows(self, rows: Iterable[Sequence[int]]) -> None:
        """Count the samples of another tally, given by its `rows`."""
        for index, samples, screened, draws in rows:
            count = ScreeningCount(num_samples=samples, num_screened=screened, num_draws=draws)
            self.per_class[index] = self.per_class.get(index, ScreeningCount()) + count

    def rows(self) -> list[list[int]]:
        """Plain values, for `add_rows`: `[class index, samples, screened, draws]` a class."""
        return [[i, c.num_samples, c.num_screened, c.num_draws] for i, c in sorted(self.per_class.items())]
