"""A worker without models: it sleeps, and stores bytes that depend on the seed alone. It can be told to fail.

Run as a program, a driver of its own: `python -m tests.sleepy OUTPUT COUNT [local|ray [SECONDS]]`.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image

from engine.dataset.commits import commit_shard
from engine.dataset.shards import shard_name, stage_shard
from engine.dataset.store import open_store
from engine.errors import EXIT_DRAINED, JobError, OutputError, RiskforgeError
from engine.executors.base import Executor
from engine.messages import Report
from engine.plan import Plan, SampleSpec, ShardSpec
from engine.progress import PlainDisplay, Tally
from engine.records import SampleResult, failed_record, new_record
from engine.run import RunSummary, run_job
from engine.spec import JobSpec, parse_job
from engine.worker import ShardOutcome

SAMPLES_PER_SHARD = 4


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, by number of the shard.

    Attributes:
        die: the process is killed, every time.
        die_once: it is killed at the first attempt.
        hang_once: at the first attempt it sleeps for an hour.
        error: an exception, every time.
        user_fault: an `OutputError` with this text, at any shard.
        user_fault_at: the same, at this shard.
        no_start: the worker is not built: `user` for a `JobError`, `defect` for any other exception.
        seconds: time a sample takes.
        bad_samples: of so many classes the first sample fails.
        bad_message: and this is why.
    """

    die: tuple[int, ...] = ()
    die_once: tuple[int, ...] = ()
    hang_once: tuple[int, ...] = ()
    error: tuple[int, ...] = ()
    user_fault: str = ""
    user_fault_at: int = -1
    no_start: str = ""
    seconds: float = 0.0
    bad_samples: int = 0
    bad_message: str = ""


class SleepyWorker:
    """A worker that holds nothing."""

    def __init__(self, job: JobSpec, plan: Plan, faults: Faults) -> None:
        if faults.no_start == "user":
            raise JobError(["models.clip: broken", "models.target: broken too"])
        if faults.no_start:
            raise ZeroDivisionError("no such kernel")
        self._job, self._plan, self._faults = job, plan, faults
        self._store = open_store(job.output.uri)

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: Report, batch_limit: int
    ) -> Callable[[], ShardOutcome]:
        """Sleep and commit."""
        outcome = self._make(shard, attempt, report)
        return lambda: outcome

    def _make(self, shard: ShardSpec, attempt: int, report: Report) -> ShardOutcome:
        started = time.monotonic()
        results = list(self._results(shard, attempt, report))
        name = shard_name(self._job.name, shard.number)
        staged = stage_shard(self._store.staging(), name, results, "png", self._plan.schema_version)
        seconds = time.monotonic() - started
        timing = {"sampling_seconds": seconds}
        commit_shard(self._store, self._plan.digest, shard, name, staged, attempt, "sleepy", timing)
        return ShardOutcome(
            counts=staged.counts,
            sampling_seconds=seconds,
            total_seconds=seconds,
        )

    def _results(self, shard: ShardSpec, attempt: int, report: Report) -> Iterator[SampleResult]:
        for done, spec in enumerate(self._plan.samples(shard)):
            report(done, self._faults.seconds)
            time.sleep(self._faults.seconds)
            self._fail(shard.number, attempt)
            if spec.index == 0 and spec.cell.classes[0] < self._faults.bad_samples:
                yield SampleResult(failed_record(spec, self._faults.bad_message), b"", run_fields(attempt))
            else:
                yield make_result(spec, attempt, self._yield_of(shard))

    def _yield_of(self, shard: ShardSpec) -> float:
        """With a rule of acceptance, the share of samples that class 0 has accepted; others have more, up to all."""
        first = self._plan.requests[shard.request].spec.accept
        return 1.0 if not first else 0.2 + 0.08 * max(0, shard.cell)

    def _fail(self, number: int, attempt: int) -> None:
        if self._faults.user_fault or number == self._faults.user_fault_at:
            raise OutputError(self._faults.user_fault)
        if number in self._faults.hang_once and attempt == 1:
            time.sleep(3600)
        if number in self._faults.error:
            raise ZeroDivisionError(f"shard {number} is cursed")
        if number in self._faults.die or (number in self._faults.die_once and attempt == 1):
            os.kill(os.getpid(), signal.SIGKILL)


def make_result(spec: SampleSpec, attempt: int, share: float = 1.0) -> SampleResult:
    """A sample whose bytes depend on its seed alone; so does whether it is among the share that is accepted."""
    draw = random.Random(spec.seed)
    accepted = random.Random(-spec.seed).random() < share
    record = new_record(spec) | {
        "status": "ok" if accepted else "rejected",
        "accepted": accepted,
        "risk": draw.random(),
        "kldb_classes": [0, 1],
        "soft_label": [0.1] * 10,
    }
    buffer = io.BytesIO()
    PIL.Image.frombytes("RGB", (4, 4), draw.randbytes(48)).save(buffer, "png")
    return SampleResult(record=record, image=buffer.getvalue() if accepted else b"", run=run_fields(attempt))


def run_fields(attempt: int) -> dict[str, Any]:
    """What depends on the run."""
    return {"batch_size": 1, "duration_seconds": 0.0, "attempt": attempt, "worker": "sleepy"}


def make_sleepy(job: JobSpec, plan: Plan, *, faults: Faults, **places: Any) -> SleepyWorker:
    """For `run_job`, with `partial`; also in the place of `engine.run.default_worker`, whose folders it ignores."""
    return SleepyWorker(job, plan, faults)


def make_job(output: Path, count: int, *, request: dict[str, Any] | None = None, **models: Any) -> JobSpec:
    """A job of `10 * count` samples in shards of four; its models are never loaded."""
    return parse_job(
        {
            "name": "sleepy",
            "models": {
                "diffusion": "zoo:digits/stable-diffusion",
                "clip": "zoo:digits/clip",
                "target": "zoo:digits/classifier",
            }
            | models,
            "requests": [{"name": "all", "method": "prompt", "classes": "all", "count": count} | (request or {})],
            "output": {"uri": str(output), "samples_per_shard": SAMPLES_PER_SHARD},
        }
    )


@dataclass
class Recorder:
    """A display that remembers."""

    phases: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    in_work: int = 0
    closed: bool = False

    def phase(self, text: str) -> None:
        """Remember it."""
        self.phases.append(text)

    def notice(self, text: str) -> None:
        """Remember it."""
        self.notices.append(text)

    def advance(self, text: str) -> None:
        """Forget it: it comes often."""

    def show(self, tally: Tally) -> None:
        """Remember the most samples that were in work and not committed."""
        self.in_work = max(self.in_work, tally.total.num_done - tally.total.committed)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def run_sleepy(
    output: Path,
    count: int,
    executor: Executor,
    *,
    faults: Faults | None = None,
    display: Recorder | None = None,
    request: dict[str, Any] | None = None,
    **options: Any,
) -> RunSummary:
    """Run a job of sleepy workers."""
    return run_job(
        make_job(output, count, request=request),
        executor=executor,
        resume="auto",
        confirmed=False,
        display=display or Recorder(),
        make_worker=partial(make_sleepy, faults=faults or Faults()),
        **options,
    )


def tars(output: Path) -> dict[str, bytes]:
    """The tars of a run by name."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("shards/*.tar"))}


def main(output: Path, count: int, kind: str, seconds: float) -> int:
    """A run on a Ray of its own, or in threads."""
    from engine.executors.local import LocalExecutor
    from engine.executors.ray import RayExecutor

    ray = RayExecutor(address=None, num_workers=2, device="cpu")
    try:
        summary = run_job(
            make_job(output, count),
            executor=LocalExecutor(2) if kind == "local" else ray,
            resume="auto",
            confirmed=False,
            display=PlainDisplay(sys.stderr, every_seconds=0.5),
            make_worker=partial(make_sleepy, faults=Faults(seconds=seconds)),
        )
    except RiskforgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_DRAINED
    print(f"{summary.num_committed} of {summary.num_shards}", flush=True)
    return summary.exit_code


if __name__ == "__main__":
    from tests import sleepy

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = sleepy.main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3] if len(sys.argv) > 3 else "ray",
        float(sys.argv[4]) if len(sys.argv) > 4 else 0.2,
    )
    sys.stderr.flush()
    # Threads that still sleep are not waited for.
    os._exit(code)
