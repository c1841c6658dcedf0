"""Precision, attention, checkpointing and determinism of the models on a GPU."""

import dataclasses

import pytest
import torch
from bench.checks import relative_difference

from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.models.digests import model_digests
from engine.models.kernels import full_float32
from engine.models.labels import read_labels
from tests.ladder import TOLERANCES, engine_latents, error_of, open_bench

GRADIENTS = ("detached", "unet")
# Half precision is nothing for a CPU.
PRECISION = {"cuda": "fp16", "cpu": "fp32"}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_errors_fall_with_precision(gradient, device):
    """float64, float32, float16, bfloat16: each rung within its tolerance, none better than the one above."""
    with full_float32(device):
        errors = {dtype: error_of(device, gradient, dtype) for dtype in TOLERANCES}
    assert all(error < TOLERANCES[dtype] for dtype, error in errors.items()), errors
    assert errors["float32"] < errors["float16"] < errors["bfloat16"], errors


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_xformers_equals_sdpa(gradient, gpu, xformers):
    """Forward and backward in half precision: the two attentions differ by rounding alone."""
    found = [engine_latents("cuda", gradient, "float16", attention=one) for one in ("sdpa", "xformers")]
    assert relative_difference(*found) < TOLERANCES["float16"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_checkpointing_saves_memory_and_changes_nothing(dtype, gpu):
    """Proved by the peak of the gradient through the UNet: a switch that takes no effect leaves it where it was."""
    peaks, latents = {}, {}
    for switch in ("off", "on"):
        bench = open_bench("cuda", "unet", dtype, gradient_checkpointing=switch)
        specs = bench.batch(2)
        many = dataclasses.replace(specs, specs=specs.specs * 64)
        # The weights are there before the count begins.
        bench.latents(bench.arms[0], specs)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        latents[switch] = bench.latents(bench.arms[0], many).cpu()
        peaks[switch] = torch.cuda.max_memory_allocated() - base
    assert peaks["on"] < 0.9 * peaks["off"], peaks
    assert relative_difference(latents["off"], latents["on"]) < TOLERANCES[dtype]


def test_a_samples_bytes_do_not_depend_on_its_neighbours(device, restored_kernels):
    """In `deterministic: true` with a fixed batch size: the same sample in two compositions, guided in every way."""
    guided = {"method": "boundary", "boundary": ["three", "eight"], "count": 8}
    raw = {
        "name": "job",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion",
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
        },
        "requests": [
            {"name": "combined", **guided, "guidance": {"boundary": {"every": 2}}},
            {"name": "detached", **guided, "guidance": {"boundary": {"every": 2, "gradient": "detached"}}},
            {"name": "unet", **guided, "guidance": {"boundary": {"every": 2, "gradient": "unet"}}},
            {"name": "risky", "method": "risky", "classes": ["three"], "count": 8},
        ],
        "sampling": {"num_inference_steps": 8, "guidance_scale": 3.0},
        "output": {"uri": "runs/job"},
        "runtime": {"device": device, "precision": PRECISION[device], "batch_size": 4, "deterministic": True},
    }
    job = parse_job(raw)
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    generator = Generator(job, plan)
    if device == "cuda":
        # Neither is against equal bytes, and without them the autoencoder takes seven times as long.
        assert torch.backends.cudnn.allow_tf32 and not torch.utils.deterministic.fill_uninitialized_memory
    for request in plan.requests:
        specs = [request.sample(position) for position in range(8)]
        straight = [one for start in (0, 4) for one in generator.next_batch(request.number, specs[start : start + 4])]
        mixed = [one for start in (0, 1) for one in generator.next_batch(request.number, specs[start::2])]
        by_key = {one.record["key"]: one for one in mixed}
        assert all(one.image and one.image == by_key[one.record["key"]].image for one in straight), request.spec.name
        assert all(one.record == by_key[one.record["key"]].record for one in straight)
        # The last batch of a shard is not full.
        assert generator.next_batch(request.number, specs[7:])[0].image == straight[7].image
