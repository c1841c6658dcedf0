"""Batches at the size of Stable Diffusion 1.x: large ones, those that `auto` finds, two workers, a batch that fails."""

import gc
import os
import subprocess
import sys
import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bench.sizes import digits_setting
from gpu_steps.common import summary_of, write_job
from gpu_steps.sharing import auto_job

from engine.data.images.decode import decode_sample
from engine.data.run.shards import read_shard
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.spec import RuntimeSpec
from engine.models.diffusion import load_pipeline
from engine.models.digests import model_digests
from engine.models.hardware import CPU_ROWS, choose_hardware
from engine.models.labels import read_labels
from engine.models.pipelines.base import Pipeline
from engine.models.pipelines.stable_diffusion import StableDiffusion
from tests.conftest import REPOSITORY
from tests.gpu.conftest import IS_REHEARSAL
from tests.gpu.test_gpu_runs import riskforge

LARGE_BATCHES = (2, 4) if IS_REHEARSAL else (32, 64)
# Of the first batches of `auto`.
FIRST_SIZES = {CPU_ROWS} if IS_REHEARSAL else {8, 16}
SHARD = 4 if IS_REHEARSAL else 112
NUM_ARRIVING = 16 if IS_REHEARSAL else 128
GIB = 2**30


def run_of(setting, folder, shard, executor="local", **runtime):
    """Rows of a finished run with every kind of guidance, and its folder."""
    device = "cpu" if IS_REHEARSAL else "cuda"
    job = auto_job(setting, folder / "run", shard, {"device": device, "workers": 1} | runtime)
    job["output"]["image_format"] = "png"
    riskforge("run", write_job(folder, job), "--executor", executor)
    return pq.read_table(folder / "run" / "metadata.parquet").to_pylist(), folder / "run"


def images_of(run):
    """The stored images [H, W, 3] of a run by key."""
    found = {}
    for tar in sorted(run.glob("shards/*.tar")):
        found |= {key: np.asarray(decode_sample(image), dtype=int) for key, image, _, _ in read_shard(tar)}
    return found


@pytest.mark.parametrize("size", LARGE_BATCHES)
def test_large_batches_are_made_whole(size, random_models, tmp_path):
    """32 rows at 512 px are where kernels of CUDA count past 2^31: none fails, none is made in parts, all is finite."""
    rows, _ = run_of(random_models, tmp_path, size, batch_size=size)
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 3 * size
    assert {row["batch_size"] for row in rows} == ({CPU_ROWS} if IS_REHEARSAL else {size})
    assert all(row["nonfinite_gradients"] == 0 for row in rows)
    assert all((row["guided_steps"] > 0) == (row["request"] != "prompt") for row in rows)


def test_gradients_of_the_rows_that_move_are_those_of_whole_batches(device, monkeypatch):
    """On a GPU but for rounding, and guidance stretches rounding in single samples: so the distribution of the
    differences is compared with that between two batch sizes, which are rounding alone. On a CPU nothing differs."""

    def risks(size, in_parts=True):
        with monkeypatch.context() as patch:
            if not in_parts:
                patch.setattr("engine.generation.generator.gpu_multiple", lambda num_rows: num_rows)
                patch.setattr("engine.generation.generator.RowShapes.agree", lambda *_: False)
            return np.array([row["kldb"] for row in arrived_rows(device, size)])

    whole = risks(NUM_ARRIVING, in_parts=False)
    by_parts, by_size = (np.abs(other - whole) for other in (risks(NUM_ARRIVING), risks(NUM_ARRIVING // 2)))
    for quantile in (0.5, 0.75, 0.9):
        assert np.quantile(by_parts, quantile) <= 3 * np.quantile(by_size, quantile) + 1e-6


def arrived_rows(device, size):
    """Records of digits between two classes, many of which arrive on the way."""
    raw = {
        "name": "job",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion",
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
        },
        "requests": [{"name": "a", "method": "boundary", "boundary": ["three", "eight"], "count": NUM_ARRIVING}],
        "sampling": {"num_inference_steps": 4 if IS_REHEARSAL else 20, "guidance_scale": 3.0},
        "guidance": {"boundary": {"every": 1, "tolerance": 1.0}},
        "output": {"uri": "runs/job"},
        "runtime": {"device": device, "precision": "fp32", "batch_size": size},
    }
    job = parse_job(raw)
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    generator, specs = Generator(job, plan), list(plan.samples(plan.shard(0)))
    rows = [result.record for batch in generator.batches(0, specs) for result in batch.results]
    assert len({row["guided_steps"] for row in rows}) > 1
    return rows


def test_a_large_batch_makes_the_images_of_small_ones(random_models, tmp_path):
    """In float32, where rounding alone may differ: the rows of a slice are those of the samples, in their order.

    Not every sample: guidance stretches the rounding of a gradient near zero.
    """
    large, small = (
        images_of(run_of(random_models, tmp_path / str(size), LARGE_BATCHES[0], batch_size=size, precision="fp32")[1])
        for size in (LARGE_BATCHES[0], 2)
    )
    differences = [np.abs(large[key] - small[key]).max() for key in large]
    assert large.keys() == small.keys() and sum(difference <= 1 for difference in differences) > 0.8 * len(large)


def test_auto_grows_for_each_of_two_workers(random_models, tmp_path):
    """On one GPU, through Ray: neither takes what the other needs, so no batch is ever halved."""
    rows, run = run_of(random_models, tmp_path, SHARD, "ray", workers=2, batch_size="auto")
    assert {row["status"] for row in rows} == {"ok"}
    summary = summary_of(run)
    # Of the trials of precision, and of nothing else.
    texts = [notice["text"] for notice in summary["notices"]]
    assert all("the decoder's gradient is computed in" in text for text in texts), texts
    for name, sizes in summary["batch_sizes"].items():
        assert IS_REHEARSAL or max(sizes) > max(FIRST_SIZES), (name, sizes)


def test_compiled_batches_of_auto_have_few_shapes(random_models, device, tmp_path):
    """Counted by torch: two shapes a size, none compiled in vain, and no silent return to code that is not compiled."""
    backend = ["--backend", "aot_eager"] if IS_REHEARSAL else []
    paths = ["--models", str(tmp_path / "models"), "--output", str(tmp_path / "found.json")]
    # In a process of its own, whose counters are those of this run.
    command = [sys.executable, "-m", "gpu_steps.compiling", "--device", device, "--size", "tiny", *paths, *backend]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tools"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_attention_that_auto_chooses_runs(gpu, xformers_problem):
    """xformers from Turing to Ada, where it is installed and runs; elsewhere torch's own."""
    pipeline = load_pipeline(digits_setting().diffusion, choose_hardware(RuntimeSpec(device="cuda")))
    kinds = {type(one).__name__ for one in pipeline._network.attn_processors.values()}
    wanted = not xformers_problem and (7, 5) <= torch.cuda.get_device_capability() < (9, 0)
    assert all(("XFormers" in kind) == wanted for kind in kinds), kinds


def test_memory_of_a_failed_batch_is_free_again(device, monkeypatch):
    """What a batch held when it failed is gone when its parts are made, and nothing is left of it afterwards."""
    setting = digits_setting()
    raw = {
        "name": "job",
        "models": {"diffusion": setting.diffusion, "clip": setting.clip, "target": setting.target},
        "requests": [{"name": "plain", "method": "prompt", "classes": ["three"], "count": 8}],
        "sampling": {"num_inference_steps": 2},
        "output": {"uri": "runs/job"},
        "runtime": {"device": device, "batch_size": 8},
    }
    job = parse_job(raw)
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    specs = [plan.requests[0].sample(position) for position in range(8)]
    # A GPU's batches have no fixed number of rows.
    monkeypatch.setattr(Pipeline, "rows", None)
    decode, held, alive = StableDiffusion.decode, [], []

    def failing(self, latents):
        gc.collect()
        alive.append(sum(reference() is not None for reference in held))
        if len(latents) > 2:
            activations = torch.empty(GIB // 4 if device == "cuda" else 4, device=device)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return decode(self, latents)

    generator = Generator(job, plan)
    monkeypatch.setattr(StableDiffusion, "decode", failing)
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    made, left = [], specs
    while left:
        batch = generator.next_batch(0, left)
        made, left = made + batch, left[len(batch) :]
    assert [one.record["status"] for one in made] == ["ok"] * 8 and held and not any(alive)
    assert device == "cpu" or torch.cuda.memory_allocated() < base + GIB // 8
