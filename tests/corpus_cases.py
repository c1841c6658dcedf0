"""Small runs with scores of every kind, by the engine's own shard writer, for tests of readers and merges."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from engine.data.run.commit_shard import commit_shard
from engine.data.run.finalise import finalise, mark_success
from engine.data.run.resume import open_output
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import shard_name
from engine.data.run.stored_plan import publish_rounds
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.job.columns import SCHEMA_VERSION
from engine.job.plan import Extent, Plan, SampleSpec, ShardSpec, build_plan
from engine.job.records import SampleResult
from tests.run_cases import DIGESTS, LABELS, make_job, make_result

Change = Callable[[dict[str, Any]], dict[str, Any]]


def make_run(
    folder: Path,
    *,
    name: str = "demo",
    seed: int = 0,
    version: int = SCHEMA_VERSION,
    labels: list[str] = LABELS,
    target: str = "t0",
    count: int = 20,
    finish: bool = True,
    num_shards: int | None = None,
    image_format: str = "png",
    change: Change = lambda record: record,
    rounds: tuple[Extent, ...] = (),
    **changes: Any,
) -> Path:
    """A run of noise images with drawn scores; every fifth sample is rejected, and its image stored.

    Args:
        finish: whether it is closed and complete.
        num_shards: how many shards are committed; default: all.
        change: may alter each record before it is written.
        rounds: of quotas, after the first ones.
    """
    output = {"uri": str(folder), "samples_per_shard": 16, "store_rejected": True, "image_format": image_format}
    job = make_job(folder, count=count, name=name, seed=seed, **{"output": output} | changes)
    planned = build_plan(job, labels, DIGESTS | {"target": target})
    store = open_store(str(folder))
    plan = open_output(store, Plan(planned.requests, planned.identity, planned.stages, version), job, "auto", False)
    plan = publish_rounds(store, plan, rounds) if rounds else plan
    for shard in list(plan.shards())[:num_shards]:
        stem = shard_name(name, shard.number)
        staged = stage_shard(store.staging(), stem, _results(plan, shard, change, image_format), image_format, version)
        commit_shard(store, plan.digest, shard, stem, staged, 1, "w0", {"total_seconds": 1.0})
    if finish:
        _close(store, plan, job, labels, target)
    return folder


def _close(store: Store, plan: Plan, job: Any, labels: list[str], target: str) -> None:
    models = {
        "clip": {"address": "zoo:digits/clip", "digest": "c0"},
        "target": {"address": "zoo:t", "digest": target, "labels": labels},
    }
    finalise(store, job, plan, models=models, timing={}, versions={}, hardware={})
    mark_success(store, plan)


def _results(plan: Plan, shard: ShardSpec, change: Change, image_format: str) -> Iterator[SampleResult]:
    return (_result(spec, change, image_format) for spec in plan.samples(shard))


def _result(spec: SampleSpec, change: Change, image_format: str) -> SampleResult:
    made = make_result(spec)
    if made.record["status"] != "ok":
        return made
    draw = random.Random(spec.seed + 1)
    record = made.record | {
        "conformity": draw.uniform(-0.2, 0.4),
        "judge": [{"model": "zoo:j", "conformity": draw.random(), "conformity_margin": draw.uniform(-0.5, 0.5)}],
        "is_error": made.record["predicted_class"] != made.record["class_index"],
    }
    if spec.index % 5 == 3:
        record |= {"status": "rejected", "accepted": False}
    image = made.image if image_format == "png" else _encoded(made.image, image_format)
    return SampleResult(record=change(record), image=image, run=made.run)


def _encoded(image: bytes, image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, {"jpg": "jpeg"}.get(image_format, image_format))
    return buffer.getvalue()
