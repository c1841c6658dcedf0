"""A worker without models: it sleeps, and stores bytes that depend on the seed alone. It can be made to fail.

Run as a program, a driver of its own: `python -m tests.sleepy OUTPUT COUNT local|ray|HOST:PORT [FAULTS]`, as JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image

from engine.data.run.companions import companions_of
from engine.driver.executors.base import Executor
from engine.driver.executors.fork_server import ForkServer
from engine.driver.progress import PlainDisplay, Tally
from engine.driver.run import run_job
from engine.driver.run_summary import RunSummary
from engine.errors import EXIT_DRAINED, JobError, OutputError, RiskforgeError
from engine.generation.batching import Batches, MadeBatch
from engine.generation.notices import Notices
from engine.generation.worker import ShardBuffer, ShardOutcome, ShardProgressCallback, Worker
from engine.job.parsing import parse_job
from engine.job.plan import Plan, SampleSpec, ShardSpec
from engine.job.records import TWINS, SampleResult, failed_record, new_record
from engine.job.spec import JobSpec
from engine.methods.conditioning.screening_tally import ScreeningTally
from tests.run_cases import make_companions

SAMPLES_PER_SHARD = 4
# Only a guard: a gate that nobody opens is a fault of the test.
GATE_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, by number of the shard.

    Attributes:
        die: the process prints a line and is killed, every time.
        die_once: it is killed at the first attempt.
        signal: that it is killed by.
        hang_once: at the first attempt it sleeps for an hour.
        slow_once: at the first attempt writing sleeps for an hour, while the next one is sampled.
        error: an exception, every time.
        user_fault: an `OutputError` with this text, at any shard.
        user_fault_at: the same, at this shard.
        no_start: the worker is not built: `user` for a `JobError`, `defect` for any other exception.
        seconds: time a sample takes.
        gated: after its first sample the worker waits at the gate.
        gates: folder of the gates, see `Gates`.
        bad_samples: of so many classes the first sample fails.
        bad_message: and this is why.
    """

    die: Sequence[int] = ()
    die_once: Sequence[int] = ()
    signal: int = signal.SIGKILL
    hang_once: Sequence[int] = ()
    slow_once: Sequence[int] = ()
    error: Sequence[int] = ()
    user_fault: str = ""
    user_fault_at: int = -1
    no_start: str = ""
    seconds: float = 0.0
    gated: Sequence[int] = ()
    gates: str = ""
    bad_samples: int = 0
    bad_message: str = ""


class Gates:
    """Where workers of any process wait in the middle of a shard, so that a test need not be quick to meet them there.

    Args:
        folder: it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, *shards: int) -> None:
        """Let these go on, also those that come later."""
        for shard in shards:
            (self._folder / f"{shard}.open").touch()

    def waiting(self) -> set[int]:
        """Shards that got to their gates."""
        return {int(path.stem) for path in self._folder.glob("*.here")}

    def forget(self) -> None:
        """Forget who is there: a shard that is made again comes to the gate of its first attempt."""
        for path in self._folder.glob("*.here"):
            path.unlink()

    def wait(self, shard: int) -> None:
        """Be there until the gate is open."""
        (self._folder / f"{shard}.here").touch()
        wait_until((self._folder / f"{shard}.open").exists, f"the gate of shard {shard} is open")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = GATE_SECONDS) -> None:
    """Wait for a condition, however busy the machine is.

    Raises:
        TimeoutError: it does not come true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.02)


class SleepyWorker(Worker):
    """The engine's worker, with one that sleeps in the place of its models."""

    def __init__(self, job: JobSpec, plan: Plan, faults: Faults) -> None:
        if faults.no_start == "user":
            raise JobError(["models.clip: broken", "models.target: broken too"])
        if faults.no_start:
            raise ZeroDivisionError("no such kernel")
        self._slow_once = faults.slow_once
        self._sleeper = Sleeper(plan, faults)
        super().__init__(job, plan, name="sleepy", load=lambda *_: self._sleeper)

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int = 0
    ) -> Callable[[], ShardOutcome]:
        """As a worker does."""
        self._sleeper.shard, self._sleeper.attempt = shard, attempt
        return super().sample_shard(shard, attempt, report, batch_limit)

    def _write(self, buffer: ShardBuffer) -> ShardOutcome:
        if buffer.shard.number in self._slow_once and buffer.attempt == 1:
            # All samples are taken first: sampling would wait for room otherwise, and the next shard not begin.
            for _ in buffer.results(ScreeningTally()):
                pass
            time.sleep(3600)
        return super()._write(buffer)


class InTurn:
    """Makes a shard as `Generator.batches` does, of batches that are scored at once."""

    def batches(self, request: int, specs: Sequence[SampleSpec]) -> Batches:
        """One after the other."""
        while specs:
            started = time.monotonic()
            results = self.next_batch(request, specs)
            specs = specs[len(results) :]
            yield MadeBatch(results, time.monotonic() - started)

    def next_batch(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """Results of the first samples."""
        raise NotImplementedError


class Sleeper(InTurn):
    """Sleeps for each sample; knows what is being made, as faults go by shard and attempt."""

    def __init__(self, plan: Plan, faults: Faults) -> None:
        self._plan, self._faults = plan, faults
        self.shard: ShardSpec | None = None
        self.attempt = 0
        self.notices = Notices()

    def batch_limit(self, request: int) -> int:
        """Memory never runs out."""
        return 0

    def limit_batches(self, request: int, limit: int) -> None:
        """A batch has one sample already."""

    def next_batch(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """One sample."""
        assert self.shard is not None
        time.sleep(self._faults.seconds)
        self._fail(self.shard.number)
        if self.shard.number in self._faults.gated and len(specs) < self.shard.num_samples:
            Gates(Path(self._faults.gates)).wait(self.shard.number)
        spec = specs[0]
        if spec.index == 0 and spec.cell.classes[0] < self._faults.bad_samples:
            return [SampleResult(failed_record(spec, self._faults.bad_message), b"", {"batch_size": 1})]
        request = self._plan.requests[self.shard.request].spec
        return [make_result(spec, self.attempt, self._yield_of(self.shard), companions_of(request))]

    def _yield_of(self, shard: ShardSpec) -> float:
        """With a rule of acceptance, the share of samples that class 0 has accepted; others have more, up to all."""
        first = self._plan.requests[shard.request].spec.accept
        return 1.0 if not first else 0.2 + 0.08 * max(0, shard.cell)

    def _fail(self, number: int) -> None:
        is_first = self.attempt == 1
        if self._faults.user_fault or number == self._faults.user_fault_at:
            raise OutputError(self._faults.user_fault)
        if number in self._faults.hang_once and is_first:
            time.sleep(3600)
        if number in self._faults.error:
            raise ZeroDivisionError(f"shard {number} is cursed")
        if number in self._faults.die or (number in self._faults.die_once and is_first):
            print(f"these are the last words of shard {number}")
            os.kill(os.getpid(), self._faults.signal)


def make_result(spec: SampleSpec, attempt: int, share: float = 1.0, companions: Sequence[str] = ()) -> SampleResult:
    """A sample whose bytes depend on its seed alone; so does whether it is among the share that is accepted.

    Where there are twins, those of every second class have a fault.
    """
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
    kinds = [kind for kind in companions if kind != TWINS or spec.cell.classes[0] % 2 == 0]
    return SampleResult(
        record=record,
        image=buffer.getvalue() if accepted else b"",
        run=run_fields(attempt),
        companions=make_companions(spec, record, draw, kinds),
    )


def run_fields(attempt: int) -> dict[str, Any]:
    """What depends on the run."""
    return {"batch_size": 1, "duration_seconds": 0.0, "attempt": attempt, "worker": "sleepy"}


def make_sleepy(job: JobSpec, plan: Plan, *, faults: Faults, **places: Any) -> SleepyWorker:
    """For `run_job`, with `partial`; or in place of `engine.driver.run.default_worker`, whose folders it ignores."""
    return SleepyWorker(job, plan, faults)


def make_job(output: Path | str, count: int, *, request: dict[str, Any] | None = None, **models: Any) -> JobSpec:
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
    in_flight: int = 0
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
        """Remember the most samples that were in flight and not committed."""
        self.in_flight = max(self.in_flight, tally.total.num_done - tally.total.committed)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def run_sleepy(
    output: Path | str,
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


def light_forks() -> ForkServer:
    """A server of forks without the libraries of models, which take ten seconds and no sleepy worker needs."""
    return ForkServer(["engine.generation.worker"])


def tars(output: Path) -> dict[str, bytes]:
    """The tars of a run by name."""
    return {path.name: path.read_bytes() for path in sorted(output.glob("shards/*.tar"))}


def main(output: str, count: int, kind: str, faults: Faults) -> int:
    """A run in threads, on a Ray of its own, or on the one at an address."""
    from engine.driver.executors import ray as executor
    from engine.driver.executors.local import LocalExecutor
    from engine.driver.executors.ray import RayExecutor

    executor.ForkServer = light_forks  # type: ignore[assignment, misc]
    ray = RayExecutor(address=kind if ":" in kind else None, num_workers=2, device="cpu")
    try:
        summary = run_job(
            make_job(output, count),
            executor=LocalExecutor(2) if kind == "local" else ray,
            resume="auto",
            confirmed=False,
            display=PlainDisplay(sys.stderr, every_seconds=0.5),
            make_worker=partial(make_sleepy, faults=faults),
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
        sys.argv[1],
        int(sys.argv[2]),
        sys.argv[3],
        sleepy.Faults(**json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}")),
    )
    sys.stderr.flush()
    # Threads that still sleep are not waited for.
    os._exit(code)
