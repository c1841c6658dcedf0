"""One guided trajectory of the digits zoo in float64 by the naive loop, and by the engine in lower precisions."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from bench.arms import Arm
from bench.checks import relative_difference
from bench.naive import Naive, sample_boundary
from bench.programs import Bench, load_diffusers_pipeline
from bench.sizes import Setting, digits_setting
from diffusers import AutoencoderKL
from torch import Tensor

from engine.models.addresses import resolve
from engine.models.classifier import Classifier, load_network
from engine.models.preprocessing import Preprocessing

NUM_SAMPLES, NUM_STEPS = 2, 10
GUIDANCE = {"step": "norm", "alpha": 0.05, "every": 3, "skip_last": False}
# Relative distance of the final latents from those in float64: rounding of the network, fed back by ten steps of which
# three are guided. A wrong scaling of gradients or a step in half precision is an order of magnitude further away.
TOLERANCES = {"float32": 5e-5, "float16": 2e-2, "bfloat16": 8e-2}


def setting() -> Setting:
    """The digits zoo with fewer steps."""
    sampling = {"scheduler": "lms", "num_inference_steps": NUM_STEPS, "guidance_scale": 3.0}
    return dataclasses.replace(digits_setting(), boundary_sampling=sampling)


def arm(gradient: str) -> Arm:
    """KLDB guidance with the gradient `detached` or through the `unet`."""
    return Arm(name="kldb", family="boundary", guidance=GUIDANCE | {"gradient": gradient})


def open_bench(device: str, gradient: str, dtype: str = "float32", **hardware: str) -> Bench:
    """The engine on a device, in any precision, which the job file would not allow on a CPU."""
    bench = Bench(setting(), [arm(gradient)], device=device, num_samples=NUM_SAMPLES, runtime={"precision": "fp32"})
    bench.hardware = dataclasses.replace(bench.hardware, dtype=dtype, **hardware)
    return bench


def engine_latents(device: str, gradient: str, dtype: str, **hardware: str) -> Tensor:
    """Final latents [B, C, h, w] by the engine, on the CPU."""
    bench = open_bench(device, gradient, dtype, **hardware)
    return bench.latents(bench.arms[0], bench.batch(NUM_SAMPLES)).cpu()


@lru_cache
def reference_latents(device: str, gradient: str) -> Tensor:
    """Final latents [B, C, h, w] by the naive loop, everything in float64, on the CPU."""
    address, target = setting().diffusion, Classifier.load(setting().target)
    pipeline = load_diffusers_pipeline(address, "boundary", torch.float64, setting().boundary_sampling).to(device)
    vae = AutoencoderKL.from_pretrained(resolve(address) / "vae", torch_dtype=torch.float64)
    network = load_network(setting().target).double().requires_grad_(False).eval().to(device)
    preprocessing = Preprocessing.load(resolve(setting().target))
    bench = open_bench(device, gradient)
    made = [
        sample_boundary(
            Naive(pipeline=pipeline, vae=vae.requires_grad_(False).to(device), device=device, dtype=torch.float64),
            lambda images: network(pixel_values=preprocessing.of_tensor(images)).logits / target.temperature,
            prompt=spec.prompt,
            seed=spec.seed,
            classes=spec.cell.classes,
            num_steps=NUM_STEPS,
            guidance_scale=bench.job.sampling.guidance_scale,
            step="norm",
            alpha=GUIDANCE["alpha"],
            every=GUIDANCE["every"],
            through_unet=gradient == "unet",
        )
        for spec in bench.batch(NUM_SAMPLES).specs
    ]
    return torch.cat(made).cpu()


def error_of(device: str, gradient: str, dtype: str) -> float:
    """Relative distance of the engine's latents from the float64 reference, of the worse sample."""
    return relative_difference(reference_latents(device, gradient), engine_latents(device, gradient, dtype).double())
