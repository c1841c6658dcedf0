"""The batch size that fits a GPU: extrapolated from the peak memory of two batches, halved after each out-of-memory.

Peak memory is nearly affine in the batch size: models and workspaces, plus a constant per sample. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_BATCH = 8
MAX_BATCH = 4096
# Sizes are multiples of this: kernels work in tiles.
MULTIPLE = 8
# Share of the memory that is used; the rest is for fragments and for deviations from the line.
MEMORY_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak of the allocated memory while a batch was made.

    Attributes:
        size: samples of the batch.
        num_bytes: at the peak.
    """

    size: int
    num_bytes: int


def fitting_size(first: Peak, second: Peak, memory_bytes: int, most: int = MAX_BATCH) -> int:
    """The largest batch that the line through two peaks lets fit into a share of the memory.

    Args:
        first: of a batch.
        second: of a larger batch.
        memory_bytes: what this process may hold in total.
        most: largest batch that is wanted.

    Returns:
        A multiple of `MULTIPLE`, unless `most` is below it; never less than the second batch, which did fit.

    Raises:
        ValueError: the second batch is not the larger one.
    """
    if second.size <= first.size:
        raise ValueError(f"second: a batch of {second.size} is not larger than one of {first.size}")
    per_sample = (second.num_bytes - first.num_bytes) / (second.size - first.size)
    if per_sample <= 0:
        return _rounded(most)
    available = MEMORY_SHARE * memory_bytes - second.num_bytes
    return min(_rounded(most), max(second.size, _rounded(second.size + int(available / per_sample))))


def _rounded(size: int) -> int:
    return size - size % MULTIPLE if size >= MULTIPLE else size


@dataclass(slots=True)
class BatchSize:
    """The batch size of a request, adapted to the memory.

    Attributes:
        size: samples of the next batch.
        grows: whether peaks still raise it.
        limit: largest batch, after an out-of-memory here or on a machine of the same kind; 0 without one.
    """

    size: int = FIRST_BATCH
    grows: bool = True
    limit: int = 0
    _first: Peak | None = field(default=None, repr=False)

    def observe(self, peak: Peak, memory_bytes: int) -> None:
        """Update from a batch that fit: the first doubles the size, the second determines it."""
        if not self.grows or peak.size < self.size:
            return
        most = self.limit or MAX_BATCH
        if self._first is None:
            self._first, self.size = peak, min(2 * peak.size, most)
            self.grows = self.size < most
            return
        self.size, self.grows = fitting_size(self._first, peak, memory_bytes, most), False

    def halve(self, size: int) -> None:
        """A batch of `size` did not fit: half of it, and no more growth."""
        self.cap(max(1, size // 2))
        self.grows = False

    def cap(self, limit: int) -> None:
        """No batch is larger than `limit` from now on; below it the size is still adapted."""
        self.limit = min(self.limit or limit, limit)
        if self.size >= self.limit:
            self.size, self.grows = self.limit, False
