"""Runs with starts and twins: a real one of the digits zoo, and drawn ones of any size and nearness."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from engine.data.run.commit_shard import commit_shard
from engine.data.run.companions import companions_of
from engine.data.run.finalise import finalise, mark_success
from engine.data.run.resume import open_output
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import shard_name
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.generation.pairs import psnr_db
from engine.job.parsing import parse_job
from engine.job.plan import SampleSpec, build_plan
from engine.job.records import REAL, STARTS, TWINS, Companion, SampleResult, new_record

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
START = {"images": "photographs", "strength": 0.5}
GROUP: dict[str, Any] = {"classes": [3, 8], "count": 3, "seed_group": "shared", "start": START}
REAL_GROUP = GROUP | {"count": 2}
JOINT: dict[str, Any] = {"boundary": [3, 8], "count": 2, "seed_group": "shared"}
# With a twin of its own; with one in `plain`; with another start or prompt, and so with none.
REQUESTS: list[dict[str, Any]] = [
    {"name": "own", "method": "risky", "twin": True} | REAL_GROUP,
    {"name": "found", "method": "risky"} | REAL_GROUP,
    {"name": "other", "method": "risky"} | REAL_GROUP | {"classes": [3], "start": START | {"strength": 0.75}},
    {"name": "worded", "method": "risky"} | REAL_GROUP | {"classes": [3], "prompt": "a drawing of a {class}"},
    {"name": "plain", "method": "prompt"} | REAL_GROUP,
    {"name": "between", "method": "boundary"} | JOINT,
    {"name": "between-plain", "method": "prompt"} | JOINT,
]
RUN = {"batch_size": 4, "duration_seconds": 0.1, "attempt": 1, "worker": "w0"}


def make_real_run(output: Path, requests: list[dict[str, Any]] = REQUESTS, **changes: Any) -> Path:
    """A run of the digits zoo in a few steps, from images that lie beside it."""
    photographs = output.parent / "photographs"
    for index, name in enumerate(("three", "eight") * 3):
        (photographs / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((32, 32)).save(photographs / name / f"{index}.png")
    starts = [{"start": one["start"] | {"images": str(photographs)}} if "start" in one else {} for one in requests]
    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    job = parse_job(
        {
            "name": "pairs",
            "models": models,
            "requests": [one | start for one, start in zip(requests, starts, strict=True)],
            "sampling": {"num_inference_steps": 4, "scheduler": "ddim"},
            "guidance": {"boundary": {"every": 1}},
            "output": {"uri": str(output), "samples_per_shard": 3},
            "runtime": {"device": "cpu"},
        }
        | changes
    )
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=PlainDisplay(io.StringIO()))
    return output


Images = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]


def noise(size: int, *, levels: int) -> Images:
    """Start, twin and sample [size, size, 3]: noise, of which the sample differs from its twin by so many levels."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start, twin = (rng.integers(levels, 256 - levels, (size, size, 3)) for _ in range(2))
        sample = twin + levels * rng.choice([-1, 1], twin.shape)
        return start.astype(np.uint8), twin.astype(np.uint8), sample.astype(np.uint8)

    return draw


def make_drawn_run(folder: Path, requests: list[dict[str, Any]], images: Images, finish: bool = True) -> Store:
    """A run of drawn images and scores, by the engine's own writer of shards; its PSNR are those of its images."""
    models = {"diffusion": "made/sd", "clip": "made/clip", "target": "made/target", "oracle": "made/oracle"}
    raw = {"name": "drawn", "models": models, "requests": requests, "output": {"uri": str(folder)}}
    job, store = parse_job(raw), open_store(str(folder))
    digests: dict[str, Any] = {"diffusion": {"made/sd": "d"}, "clip": "c", "target": "t", "oracle": "j"}
    planned = build_plan(job, DIGITS, digests | {"transfer": [], "starts": {START["images"]: "s"}})
    plan = open_output(store, planned, job, "auto", confirmed=False)
    for shard in plan.shards():
        name, kinds = shard_name(job.name, shard.number), companions_of(plan.requests[shard.request].spec)
        results = [_drawn(spec, kinds, images) for spec in plan.samples(shard)]
        staged = stage_shard(store.staging(), name, results, "png", companions=kinds)
        commit_shard(store, plan.digest, shard, name, staged, 1, "w0", {"total_seconds": 1.0})
    known = {"target": {"address": "made/target", "digest": "t", "labels": DIGITS}}
    finalise(store, job, plan, models=known, timing={}, versions={}, hardware={})
    if finish:
        mark_success(store, plan)
    return store


def _drawn(spec: SampleSpec, kinds: tuple[str, ...], images: Images) -> SampleResult:
    rng = np.random.default_rng(spec.seed)
    start, twin, sample = (PIL.Image.fromarray(pixels) for pixels in images(rng))
    label = spec.cell.classes[0]
    record = new_record(spec) | {
        "status": "ok", "accepted": True, "class_name": DIGITS[label], "class_index": label, "predicted_class": 9,
        "is_error": True, "risk": float(rng.exponential()) + 1, "conformity": 0.5,
        # Of three samples the oracle agrees on two.
        "oracle_class": label if spec.index % 3 != 1 else 9,
        "kldb_classes": sorted({label, 9}), "soft_label": [float(index == label) for index in range(10)],
    }  # fmt: skip
    second: dict[str, Companion] = {}
    if STARTS in kinds:
        record |= {"start_key": f"real-{spec.index}", "start_sha256": "0" * 64, "strength": 0.5}
        record["start_distance"] = float(rng.random())
        real = {"method": REAL, "prompt": "", "scored": False, "start_distance": -1.0}
        second[STARTS] = Companion(record | real, lambda: as_png(start))
    if TWINS in kinds:
        own = {"method": "prompt", "predicted_class": label, "is_error": False, "risk": 0.125}
        second[TWINS] = Companion(record | own, lambda: as_png(twin))
        record |= {
            "twin_key": spec.key, "twin_psnr_db": psnr_db(sample, twin), "twin_distance": float(rng.random()),
            "twin_predicted_class": label, "twin_risk": 0.125,
        }  # fmt: skip
    return SampleResult(record, as_png(sample), RUN, companions=second)


def as_png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
