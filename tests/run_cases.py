"""Small jobs, plans and finished samples for the tests of runs; run as a program, a worker to be killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commit_shard import commit_shard
from engine.data.run.commits import list_commits
from engine.data.run.companions import companions_of
from engine.data.run.resume import open_output
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import ShardFiles, shard_name
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.job.parsing import parse_job
from engine.job.plan import Plan, SampleSpec, ShardSpec, build_plan
from engine.job.records import REAL, STARTS, TWINS, Companion, SampleResult, failed_record, new_record
from engine.job.spec import JobSpec

LABELS = ["zero", "one", "two"]
DIGESTS = {
    "diffusion": {"zoo:a": "d0", "zoo:b": "d1"},
    "clip": "c0",
    "target": "t0",
    "transfer": ["r0"],
    "oracle": "o0",
    "starts": {"digits:test": "s0"},
}
# Of a request whose samples have a start and a twin.
PAIRED = {"twin": True, "start": {"images": "digits:test", "strength": 0.5}}


def make_job(uri: Path | str, *, count: int = 6, paired: bool = False, **changes: Any) -> JobSpec:
    """A job with a joint request, `paired` or not, and one over all classes with two contexts."""
    raw: dict[str, Any] = {
        "name": "demo",
        "models": {"diffusion": "zoo:a", "clip": "zoo:c", "target": "zoo:t", "transfer": ["zoo:r"], "oracle": "zoo:o"},
        "requests": [
            {"name": "between", "method": "boundary", "boundary": ["one", "two"], "count": count}
            | (PAIRED if paired else {}),
            {"name": "all", "method": "prompt", "classes": "all", "count": 1, "contexts": ["", "red | <b>`ink`</b>"]},
        ],
        "output": {"uri": str(uri), "samples_per_shard": 4},
    }
    return parse_job(raw | changes)


def make_plan(job: JobSpec) -> Plan:
    """The plan of a job as a single stage."""
    return build_plan(job, LABELS, DIGESTS)


def open_case(uri: Path | str, **changes: Any) -> tuple[Store, Plan, JobSpec]:
    """A store with an opened run."""
    job = make_job(uri, **changes)
    store = open_store(str(uri))
    return store, open_output(store, make_plan(job), job, "auto", confirmed=False), job


def make_result(
    spec: SampleSpec, *, attempt: int = 1, worker: str = "w0", noise: int = 0, companions: Sequence[str] = ()
) -> SampleResult:
    """A finished sample that depends on its seed alone, or on `noise` too; every seventh index failed.

    Of those with companions every seventh has no twin.
    """
    run = {"batch_size": 4, "duration_seconds": 0.5 * attempt, "attempt": attempt, "worker": worker}
    if spec.index % 7 == 5:
        return SampleResult(record=failed_record(spec, 'no "image"\n'), run=run)
    draw = random.Random(spec.seed + noise)
    label = spec.cell.classes[draw.randrange(len(spec.cell.classes))]
    record = new_record(spec) | {
        "status": "ok",
        "class_name": LABELS[label] if label < len(LABELS) else str(label),
        "class_index": label,
        "risk": 4 * draw.random(),
        "predicted_class": draw.randrange(3),
        "kldb": draw.random(),
        "kldb_classes": list(spec.cell.classes) if spec.cell.is_joint else sorted({label, (label + 1) % 3}),
        "soft_label": [0.5, 0.25, 0.25],
        "oracle_class": draw.randrange(3),
        "accepted": True,
        "transfer": [{"model": "zoo:r", "predicted_class": draw.randrange(3), "risk": draw.random()}],
    }
    record["is_error"] = record["predicted_class"] != label
    image = _noise_png(draw)
    kinds = [kind for kind in companions if kind != TWINS or spec.index % 7 != 3]
    others = make_companions(spec, record, draw, kinds)
    return SampleResult(record=record, image=image, run=run, companions=others)


def make_companions(
    spec: SampleSpec, record: dict[str, Any], draw: random.Random, kinds: Sequence[str]
) -> dict[str, Companion]:
    """Second images of a sample, which its record is told of."""
    others: dict[str, Companion] = {}
    if STARTS in kinds:
        record |= {
            "start_key": f"img-{spec.index}",
            "start_sha256": "ab",
            "strength": 0.5,
            "start_distance": draw.random(),
        }
        others[STARTS] = _make_companion(spec, record, draw, method=REAL, scored=False, prompt="", seed=0)
    if TWINS in kinds:
        others[TWINS] = _make_companion(spec, record, draw, method="prompt", risk=draw.random(), predicted_class=1)
        twin = others[TWINS].record
        record |= {"twin_key": spec.key, "twin_risk": twin["risk"], "twin_predicted_class": twin["predicted_class"]}
    return others


def _noise_png(draw: random.Random) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (4, 4), draw.randbytes(48)).save(buffer, "png")
    return buffer.getvalue()


def _make_companion(spec: SampleSpec, record: dict[str, Any], draw: random.Random, **changes: Any) -> Companion:
    image = _noise_png(draw)
    kept = ("class_name", "class_index", "start_key", "start_sha256", "strength")
    return Companion(
        new_record(spec) | {name: record[name] for name in kept} | {"status": "ok"} | changes, lambda: image
    )


def make_results(plan: Plan, shard: ShardSpec, **kind: Any) -> Iterator[SampleResult]:
    """The finished samples of a shard."""
    companions = companions_of(plan.requests[shard.request].spec)
    return (make_result(spec, companions=companions, **kind) for spec in plan.samples(shard))


def stage(
    store: Store, plan: Plan, number: int, results: Iterator[SampleResult] | None = None, **kind: Any
) -> ShardFiles:
    """Stage a shard."""
    shard = plan.shard(number)
    made = make_results(plan, shard, **kind) if results is None else results
    companions = companions_of(plan.requests[shard.request].spec)
    return stage_shard(store.staging(), shard_name("demo", number), made, "png", plan.schema_version, companions)


def commit_one(store: Store, plan: Plan, number: int, **kind: Any) -> CommitRecord:
    """Make, stage and commit a shard."""
    shard, name = plan.shard(number), shard_name("demo", number)
    staged = stage(store, plan, number, **kind)
    attempt, worker = kind.get("attempt", 1), kind.get("worker", "w0")
    return commit_shard(store, plan.digest, shard, name, staged, attempt, worker, {"total_seconds": 1.0})


def commit_rest(store: Store, plan: Plan, **kind: Any) -> list[int]:
    """Commit every shard that is not committed yet, and say which."""
    missing = [number for number in range(plan.num_shards) if number not in list_commits(store)]
    for number in missing:
        commit_one(store, plan, number, **kind)
    return missing


def tar_bytes(store: Store) -> dict[str, bytes]:
    """The published tars by name, companions too."""
    names = [name for folder in ("shards", STARTS, TWINS) for name in store.list(folder)]
    return {name: store.read(name) for name in names if name.endswith(".tar")}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_until_killed(uri: Path, moment: str, count: int, paired: bool) -> None:
    """Run the job of the tests and die at the `count`-th sample, or before or after the `count`-th link."""
    real_link, links = os.link, iter(range(1, 1000))

    def link(source: Path, target: Path) -> None:
        number = next(links) if target.parent.exists() else 0
        if (moment, count) == ("before-link", number):
            _die()
        real_link(source, target)
        if (moment, count) == ("after-link", number):
            _die()

    os.link = link  # type: ignore[assignment]
    store, plan, _ = open_case(uri, paired=paired)
    made = iter(range(1, 1000))

    def results(shard: ShardSpec) -> Iterator[SampleResult]:
        for result in make_results(plan, shard, worker="killed"):
            yield result
            if (moment, count) == ("sample", next(made)):
                _die()

    for shard in plan.shards():
        name = shard_name("demo", shard.number)
        staged = stage(store, plan, shard.number, results(shard))
        commit_shard(store, plan.digest, shard, name, staged, 1, "killed", {})


def _race(uri: Path, noise: int, paired: bool, barrier: Barrier) -> None:
    """Commit every shard of a plan, each at the same moment as the other racer."""
    store, plan = open_store(str(uri)), make_plan(make_job(uri, count=16, paired=paired))
    for number in range(plan.num_shards):
        barrier.wait(timeout=300)
        commit_one(store, plan, number, noise=noise, worker=f"racer-{os.getpid()}")


def run_processes(*groups: list[tuple[Any, ...]]) -> list[int]:
    """Run groups of processes, those of a group at once: `("kill", uri, moment, count, paired)` or
    `("race", uri, noise, paired)`.

    They are forked from a fresh interpreter, so that it loads its libraries once.

    Returns:
        The exit code of each; -9 for one that was killed.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, __file__, json.dumps(groups, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=True)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _run_group(group: list[list[Any]]) -> list[int]:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(group))
    processes = [
        context.Process(target=_race, args=(Path(rest[0]), *rest[1:], barrier))
        if kind == "race"
        else context.Process(target=_run_until_killed, args=(Path(rest[0]), *rest[1:]))
        for kind, *rest in group
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    return [int(process.exitcode or 0) for process in processes]


if __name__ == "__main__":
    import pyarrow.parquet  # noqa: F401  # Loaded once, before the forks.

    print(json.dumps([code for group in json.loads(sys.argv[1]) for code in _run_group(group)]))
