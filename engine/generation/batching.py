"""The sizes of batches: found from the peak memory of two, even within a shard, lowered where one fails, raised again.

Peak memory is nearly affine in the batch size: models and workspaces, plus a constant per sample. Pure Python.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from engine.job.plan import Plan
    from engine.job.records import SampleResult
    from engine.job.spec import JobSpec
    from engine.models.hardware import Hardware

FIRST_BATCH = 8
MAX_BATCH = 4096
# Rows of 64 x 64 latents that keep a GPU busy: more of them buy nothing. Of smaller latents it takes as many more, as
# launches of kernels dominate there.
BUSY_ROWS, BUSY_LATENT_PIXELS = 64, 64 * 64
# Sizes found from the memory are multiples of this: kernels work in tiles.
MULTIPLE = 8
# Share of the memory that is used; the rest is for fragments and for deviations from the line.
MEMORY_SHARE = 0.85
# Batches that must go through before a size that was lowered is raised; twice as many after each further failure.
GOOD_BATCHES = 20


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak of the allocated memory while a batch was made.

    Attributes:
        size: samples of the batch.
        num_bytes: at the peak.
    """

    size: int
    num_bytes: int


class MadeBatch(NamedTuple):
    """A batch that was made.

    Attributes:
        results: of its samples, in their order.
        seconds: duration of sampling and scoring it, without what was done for other batches meanwhile.
    """

    results: list[SampleResult]
    seconds: float


Batches = Generator[MadeBatch, None, None]


class Cut(NamedTuple):
    """The next batch of a shard.

    Attributes:
        num_samples: its samples.
        num_rows: rows that it is filled up to.
        is_compiled: whether compiled kernels may be used: not for shapes that come once.
    """

    num_samples: int
    num_rows: int
    is_compiled: bool = True


def even_size(num_samples: int, size: int) -> int:
    """The largest batch where samples are divided evenly into as few batches as a size allows; both at least 1."""
    return -(-num_samples // -(-num_samples // size))


def useful_size(latent_pixels: int) -> int:
    """The largest batch that is of use on a GPU, for latents of height * width pixels."""
    return max(1, min(MAX_BATCH, BUSY_ROWS * BUSY_LATENT_PIXELS // latent_pixels))


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
    """A batch size that adapts to the memory.

    Attributes:
        size: largest size of the next batch.
        grows: whether peaks still raise it.
        most: largest size that is wanted: by the job, the latents, and the memory as peaks showed it.
        limit: largest size since a batch failed here, or on a machine of the same kind; 0 where nothing limits it. A
            size above it is a trial.
    """

    size: int = FIRST_BATCH
    grows: bool = True
    most: int = MAX_BATCH
    limit: int = 0
    _first: Peak | None = field(default=None, repr=False)
    _proven: int = field(default=0, repr=False)
    _num_good: int = field(default=0, repr=False)
    _num_failures: int = field(default=0, repr=False)

    @classmethod
    def fixed(cls, size: int) -> BatchSize:
        """A size that the job names: a smaller one replaces it where it fails, a larger one never."""
        return cls(size, grows=False, most=size)

    def bound(self, most: int) -> None:
        """Want no larger batch than this, if the size is to be found."""
        if self.grows:
            self.most = min(self.most, most)
            self.size = min(self.size, self.most)

    def observe(self, peak: Peak, memory_bytes: int) -> None:
        """Update from a batch that fit: the first doubles the size, the second determines it."""
        if not self.grows or peak.size < self.size:
            return
        if self._first is None:
            self._first, self.size = peak, min(2 * peak.size, self.limit or self.most, self.most)
            self.grows = self.size == 2 * peak.size
            return
        self.most = fitting_size(self._first, peak, memory_bytes, self.most)
        self.size, self.grows = min(self.limit or self.most, self.most), False

    def went_through(self, size: int) -> None:
        """Note that a batch of `size` was made: enough of them raise a size that was lowered."""
        self._proven = max(self._proven, size)
        # A small batch, the rest of a shard, shows nothing.
        if not self.limit or self.grows or 2 * size <= self.size:
            return
        if self.size > self.limit and size > self.limit:
            self.limit, self._num_good = self.size if self.size < self.most else 0, 0
            return
        self._num_good += 1
        if self._num_good >= GOOD_BATCHES * 2 ** max(0, self._num_failures - 1):
            # By halves: a line through two peaks errs by less than a factor of two.
            self._num_good, self.size = 0, min(self.most, self.limit + max(1, self.limit // 2))

    def shrink(self, failed: int, through: int) -> None:
        """Make smaller batches.

        Args:
            failed: size of a batch that failed, though its samples do not.
            through: size of the largest of its parts that was made.
        """
        proven = self._proven if self._proven < failed else 0
        self.size = self.limit = self._proven = max(1, through, proven)
        self.grows, self._num_good = False, 0
        self._num_failures += 1

    def cap(self, limit: int) -> None:
        """Heed that no more than `limit` fit on another machine of the same kind, unless more did fit here."""
        bound = max(limit, self._proven)
        if bound >= min(self.limit or self.most, self.most):
            return
        self.limit = bound
        if self.size >= bound:
            self.size, self.grows = bound, False


class BatchSizes:
    """The batch sizes of a job's requests.

    Each request finds its own, as they differ in what a sample takes. Compiled kernels are made for one shape: with
    them the requests of a model and an image size share theirs.

    Args:
        kernels: diffusion model and image size of a request, by any name.
    """

    def __init__(self, job: JobSpec, plan: Plan, hardware: Hardware, kernels: Callable[[int], str]) -> None:
        self._hardware = hardware
        wanted = job.runtime.batch_size
        shared: dict[int | str, BatchSize] = {}
        largest: dict[int | str, int] = {}
        self._keys = [kernels(number) if hardware.compile else number for number in range(len(plan.requests))]
        for key in self._keys:
            shared[key] = BatchSize() if wanted == "auto" else BatchSize.fixed(wanted)
        for extent in plan.extents:
            key, size = self._keys[extent.request], min(extent.samples_per_shard, extent.stop - extent.start)
            largest[key] = max(largest.get(key, 1), size)
        self._sizes, self._largest_shard = shared, largest

    def of(self, request: int) -> BatchSize:
        """The size of a request's batches."""
        return self._sizes[self._keys[request]]

    def is_found(self, request: int) -> bool:
        """Whether the size does not depend on the peak memory of the batch before."""
        return not (self.of(request).grows and self._hardware.is_cuda)

    def next(self, request: int, num_left: int, cpu_rows: int | None) -> Cut:
        """The next batch of a shard of a request.

        Args:
            num_left: samples of the shard that are not made yet, at least 1.
            cpu_rows: rows of every model call on a CPU; None on a GPU.
        """
        size = self.of(request).size
        if cpu_rows or self._hardware.deterministic:
            # The shape decides bytes.
            rows = cpu_rows or size
            return Cut(min(num_left, rows), rows)
        if not self.is_found(request):
            num = min(num_left, size)
            return Cut(num, num, is_compiled=False)
        if self._hardware.compile:
            rows = even_size(self._largest_shard.get(self._keys[request], size), size)
            # Of a size that is on trial nothing is compiled: it may fail, as it did before.
            return Cut(even_size(num_left, rows), rows, is_compiled=not 0 < self.of(request).limit < rows)
        num = even_size(num_left, size)
        return Cut(num, num)

    def limit(self, request: int, limit: int) -> None:
        """Heed a limit of another machine, unless the size decides bytes."""
        if not self._hardware.deterministic:
            self.of(request).cap(limit)
