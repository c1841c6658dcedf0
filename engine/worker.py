"""The worker: one shard in, one committed shard out. A plain class; it runs in an actor or in the driver alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.conditioning.tally import ScreeningTally
from engine.dataset.commits import commit_shard
from engine.dataset.counts import ShardCounts
from engine.dataset.shards import shard_name, stage_shard
from engine.dataset.state import read_run
from engine.dataset.store import open_store
from engine.errors import JobError
from engine.plan import Plan, ShardSpec
from engine.records import SampleResult
from engine.spec import JobSpec

if TYPE_CHECKING:
    from engine.generator import Generator

Report = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOutcome:
    """What a worker says of a finished shard.

    Attributes:
        sampling_seconds: time in sampling and scoring.
        total_seconds: time from start to commit.
    """

    counts: ShardCounts
    sampling_seconds: float
    total_seconds: float


class Worker:
    """Holds all models of a job and makes its shards.

    Args:
        job: the job.
        plan: its plan.
        name: who this is, for the record.

    Raises:
        JobError: a model cannot be loaded, the hardware lacks what `runtime` asks for, or the output is not shared
            with the driver.
    """

    def __init__(self, job: JobSpec, plan: Plan, *, name: str) -> None:
        self._job = job
        self._plan = plan
        self._name = name
        self._store = open_store(job.output.uri)
        stored = read_run(self._store)
        if stored is None or stored.digest != plan.digest:
            raise JobError(
                f"output.uri: '{job.output.uri}' as worker {name} sees it does not hold this run; use a folder that"
                " all machines share"
            )
        quiet_libraries()
        from engine.generator import Generator

        self._generator: Generator = Generator(job, plan)

    def run_shard(self, shard: ShardSpec, attempt: int, report: Report) -> ShardOutcome:
        """Make, stage and commit a shard; `report` hears the number of samples done so far.

        Side effects: publishes the shard's files and its commit record in the job's output.
        """
        started = time.monotonic()
        name = shard_name(self._job.name, shard.number)
        timing, tally = {"sampling_seconds": 0.0}, ScreeningTally()
        results = self._results(shard, attempt, report, timing, tally)
        image_format, version = self._job.output.image_format, self._plan.schema_version
        staged = stage_shard(self._store.staging(), name, results, image_format, version)
        record = commit_shard(
            self._store,
            self._plan.digest,
            shard,
            name,
            staged,
            attempt=attempt,
            worker=self._name,
            timing=timing,
            screening=tally.rows(),
        )
        return ShardOutcome(counts=record.counts, total_seconds=time.monotonic() - started, **timing)

    def _results(
        self, shard: ShardSpec, attempt: int, report: Report, timing: dict[str, float], tally: ScreeningTally
    ) -> Iterator[SampleResult]:
        """The results of a shard, batch by batch; adds the time they took to `timing`, draws to `tally`."""
        done = 0
        specs = list(self._plan.samples(shard))
        while specs:
            started = time.monotonic()
            results = self._generator.next_batch(shard.request, specs)
            seconds = time.monotonic() - started
            timing["sampling_seconds"] += seconds
            specs = specs[len(results) :]
            for result in results:
                spent = {"duration_seconds": seconds / len(results)}
                result.run |= {**spent, "attempt": attempt, "worker": self._name}
                if result.num_draws:
                    about = result.record
                    tally.add(about["class_index"], screened=about["screened"], num_draws=result.num_draws)
                yield result
            done += len(results)
            report(done)


def quiet_libraries() -> None:
    """Keep loading bars and advice of the model libraries out of the terminal; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
