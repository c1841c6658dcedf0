"""How many samples a GPU takes at a time: from the peaks of two batches, and less after each out-of-memory.

Peak memory is close to a line in the batch size: models and workspaces, and so many bytes a sample. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_BATCH = 8
MAX_BATCH = 4096
# Sizes are multiples of this: kernels work in tiles.
MULTIPLE = 8
# Of the memory that is free; the rest is for what does not grow along the line, and for fragments.
MEMORY_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Peak:
    """Most bytes that were allocated while a batch was made.

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
        memory_bytes: what this process may come to hold, all in all.
        most: what is asked for.

    Returns:
        A multiple of `MULTIPLE`, unless `most` is below it; never less than the second batch, which did fit.

    Raises:
        ValueError: the second batch is not the larger one.
    """
    if second.size <= first.size:
        raise ValueError(f"second: a batch of {second.size} is not larger than one of {first.size}")
    a_sample = (second.num_bytes - first.num_bytes) / (second.size - first.size)
    if a_sample <= 0:
        return _rounded(most)
    room = MEMORY_SHARE * memory_bytes - second.num_bytes
    return min(_rounded(most), max(second.size, _rounded(second.size + int(room / a_sample))))


def _rounded(size: int) -> int:
    return size - size % MULTIPLE if size >= MULTIPLE else size


@dataclass(slots=True)
class BatchSize:
    """The batch size of a request, as it is found out.

    Attributes:
        size: samples of the next batch.
        grows: whether peaks still raise it.
        limit: largest batch, since memory has run out here or on a machine of the same kind; 0 where it never has.
    """

    size: int = FIRST_BATCH
    grows: bool = True
    limit: int = 0
    _first: Peak | None = field(default=None, repr=False)

    def observe(self, peak: Peak, memory_bytes: int) -> None:
        """Learn from a batch that fit: a first one doubles the size, a second one settles it."""
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
        """No batch is larger than `limit` from now on; below it the size is still found out."""
        self.limit = min(self.limit or limit, limit)
        if self.size >= self.limit:
            self.size, self.grows = self.limit, False
