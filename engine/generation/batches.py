"""The batches of a shard, one after the other: what the next one waits for, and what becomes of one that fails.

A batch has three steps: sampling, preprocessing for the models that score, and scoring. The first and the last run on
the thread that asks for batches, as all work on a GPU does; preprocessing, which is work for the CPU, runs on another
one while the next batch is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from engine.errors import JobError
from engine.generation.batching import Batches, BatchSizes, Cut, MadeBatch, Peak
from engine.generation.faults import is_out_of_memory
from engine.generation.isolation import Failure, Isolation, Parts, described
from engine.generation.loading import reachable_memory
from engine.generation.notices import Notices
from engine.job.plan import SampleSpec
from engine.job.records import SampleResult
from engine.models.hardware import Hardware
from engine.terminal import redacted

# Of an exception in a notice.
MAX_ERROR_CHARS = 160


class SampledBatch(Protocol):
    """A batch after sampling."""

    def preprocess(self) -> None:
        """Prepare what the models that score take; may run on any thread."""
        ...

    def score(self) -> list[SampleResult]:
        """The results of its samples; after `preprocess`, on the thread that samples."""
        ...


# Samples of a request, filled up to so many rows.
Sample = Callable[[int, Sequence[SampleSpec], int], SampledBatch]


@dataclass(slots=True)
class _Begun:
    """A batch that was sampled, and is preprocessed meanwhile; or that failed.

    Attributes:
        seconds: duration of sampling.
    """

    specs: Sequence[SampleSpec]
    cut: Cut
    outcome: tuple[SampledBatch, Future[None]] | Exception
    seconds: float


class BatchLoop:
    """Makes the samples of shards batch by batch.

    Args:
        isolation: finds out what is at fault when a batch raises.
        notices: where it is reported that batches are made smaller.
        rows: of every model call of a request, on a CPU; None on a GPU.
        sample: makes the images of a batch.
        uncompiled: within it a request's models do without compiled kernels.
    """

    def __init__(
        self,
        sizes: BatchSizes,
        isolation: Isolation,
        notices: Notices,
        hardware: Hardware,
        *,
        rows: Callable[[int], int | None],
        sample: Sample,
        uncompiled: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self._sizes = sizes
        self._isolation = isolation
        self._notices = notices
        self._hardware = hardware
        self._rows = rows
        self._sample = sample
        self._uncompiled = uncompiled
        # Requests and rows of the batches that were made while a size was to be found.
        self._warm: set[tuple[int, int]] = set()

    def cut(self, request: int, num_left: int) -> Cut:
        """The next batch of a shard with so many samples left."""
        return self._sizes.next(request, num_left, self._rows(request))

    def batches(self, request: int, specs: Sequence[SampleSpec]) -> Batches:
        """The batches of samples of a request, in their order.

        Raises:
            EverySampleFailedError: this is the first batch of the request, and every sample of it raised.
            JobError: what the job asks for is impossible.
        """
        waiting: _Begun | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="preprocessing") as pool:
            while specs:
                cut = self.cut(request, len(specs))
                begun = self._begin(request, specs[: cut.num_samples], cut, pool)
                specs = specs[cut.num_samples :]
                if waiting is not None:
                    yield self._finish(request, waiting)
                    waiting = None
                if isinstance(begun.outcome, Exception) or not self._sizes.is_found(request):
                    # The next size depends on what becomes of this one.
                    yield self._finish(request, begun)
                else:
                    waiting = begun
            if waiting is not None:
                yield self._finish(request, waiting)

    def _begin(self, request: int, specs: Sequence[SampleSpec], cut: Cut, pool: ThreadPoolExecutor) -> _Begun:
        """Sample a batch, and let it be preprocessed."""
        if not self._sizes.is_found(request):
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        sampled = self._isolation.attempt(partial(self._sampled, request, specs, cut))
        seconds = time.monotonic() - started
        if isinstance(sampled, Exception):
            return _Begun(specs, cut, sampled, seconds)
        return _Begun(specs, cut, (sampled, pool.submit(sampled.preprocess)), seconds)

    def _sampled(self, request: int, specs: Sequence[SampleSpec], cut: Cut) -> SampledBatch:
        if cut.is_compiled:
            return self._sample(request, specs, cut.num_rows)
        with self._uncompiled(request):
            return self._sample(request, specs, cut.num_rows)

    def _finish(self, request: int, begun: _Begun) -> MadeBatch:
        """Score a batch; make it in parts where a step of it failed."""
        started = time.monotonic()
        outcome: list[SampleResult] | Exception
        if isinstance(begun.outcome, Exception):
            outcome = begun.outcome
        else:
            sampled, preprocessing = begun.outcome
            outcome = self._isolation.attempt(partial(_scored, sampled, preprocessing))
        if isinstance(outcome, Exception):
            results = self._in_parts(request, begun.specs, begun.cut, outcome)
        else:
            results = outcome
            self._note_success(request, begun)
        return MadeBatch(results, begun.seconds + time.monotonic() - started)

    def _note_success(self, request: int, begun: _Begun) -> None:
        size, is_found = self._sizes.of(request), self._sizes.is_found(request)
        self._isolation.went_through(request)
        size.went_through(len(begun.specs))
        if is_found:
            return
        shape = (request, begun.cut.num_rows)
        if shape in self._warm:
            peak, memory = torch.cuda.max_memory_allocated(), reachable_memory(self._hardware.memory_share)
            size.observe(Peak(begun.cut.num_rows, peak), memory)
        # The first batch of a shape also searches for its convolutions: its peak is that of their largest workspace.
        self._warm.add(shape)

    def _in_parts(self, request: int, specs: Sequence[SampleSpec], cut: Cut, error: Exception) -> list[SampleResult]:
        """Results of a batch that failed."""
        on_cpu = self._rows(request) is not None
        # On a CPU every call has the same rows.
        size = len(specs) if on_cpu else cut.num_rows
        if is_out_of_memory(error) and (on_cpu or self._hardware.deterministic):
            raise self._no_memory(on_cpu, size, error) from error
        try:
            parts = self._isolation.in_parts(request, specs, Failure(size, error), partial(self._made, request))
        except Exception as failure:
            if is_out_of_memory(failure) and (on_cpu or not self._isolation.has_worked(request)):
                raise self._no_memory(on_cpu, 1, failure) from failure
            raise
        if parts.at_fault is not None:
            self._blame_size(request, parts.at_fault, parts.through, on_cpu=on_cpu)
        if self._hardware.deterministic and not on_cpu:
            return self._in_shape(request, specs, cut, parts)
        return parts.results

    def _made(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Results of a part of a batch, which is not filled up but on a CPU."""
        rows = self._rows(request) or len(specs)
        return self._whole(request, specs, Cut(len(specs), rows, is_compiled=False))

    def _whole(self, request: int, specs: Sequence[SampleSpec], cut: Cut) -> list[SampleResult]:
        """Results of a batch, step after step."""
        sampled = self._sampled(request, specs, cut)
        sampled.preprocess()
        return sampled.score()

    def _in_shape(self, request: int, specs: Sequence[SampleSpec], cut: Cut, parts: Parts) -> list[SampleResult]:
        """Results of a batch without the samples that raise, in the shape that decides their bytes."""
        places = [place for place in range(len(specs)) if place not in parts.raised]
        if not places:
            return parts.results
        outcome = self._isolation.attempt(partial(self._whole, request, [specs[place] for place in places], cut))
        if isinstance(outcome, Exception):
            self._blame_size(request, Failure(cut.num_rows, outcome), parts.through, on_cpu=False)
        else:
            for place, result in zip(places, outcome, strict=True):
                parts.results[place] = result
        return parts.results

    def _blame_size(self, request: int, failure: Failure, through: int, *, on_cpu: bool) -> None:
        """Make smaller batches where the size is at fault and may change.

        Raises:
            JobError: it decides bytes.
        """
        text = redacted(described(failure.error))[:MAX_ERROR_CHARS]
        where = self._isolation.where(request)
        what = f"{where}: a batch of {failure.size} samples failed ({text}), smaller parts of it did not"
        if on_cpu:
            self._notices.add(f"{what}; the size stays, as on a CPU it decides bytes")
            return
        if self._hardware.deterministic:
            raise JobError(
                f"runtime.batch_size: {failure.size} samples at a time fail ({text}) where {through} do not, and with"
                f" deterministic the size decides bytes; give a smaller one for the whole run, such as {through}"
            )
        size = self._sizes.of(request)
        size.shrink(failure.size, through)
        self._notices.add(f"{what}; it goes on with batches of {size.size}, and tries larger ones again later")

    def _no_memory(self, on_cpu: bool, size: int, error: Exception) -> JobError:
        """The error of memory that no smaller batch can spare."""
        if on_cpu:
            text = redacted(described(error))[:MAX_ERROR_CHARS]
            return JobError(
                f"runtime.device: the models are on a CPU, and a GPU's memory ran out ({text}); let the factories that"
                " the job names use the CPU, or set device: auto"
            )
        is_shared = self._hardware.memory_share < 1
        if size == 1:
            fewer = "fewer workers, or fewer models" if is_shared else "or fewer models"
            return JobError(
                "runtime: a single sample does not fit the GPU's memory; use precision fp16, gradient_checkpointing on,"
                f" {fewer}"
            )
        return JobError(
            f"runtime.batch_size: {size} samples do not fit the GPU's memory, and with deterministic the size decides"
            f" bytes; give a smaller one for the whole run, such as {size // 2}{', or fewer workers' * is_shared}"
        )


def _scored(sampled: SampledBatch, preprocessing: Future[None]) -> list[SampleResult]:
    preprocessing.result()
    return sampled.score()
