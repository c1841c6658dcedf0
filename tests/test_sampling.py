"""Sampling with the real zoo models, against diffusers' own pipeline and against itself in other batches."""

import json
import shutil

import pytest
import torch

from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.sampling.loop import sample
from engine.methods.sampling.noise import draw_noise
from engine.methods.sampling.spec import SamplingSpec
from engine.models.addresses import resolve
from engine.models.diffusion import load_pipeline
from engine.models.pipelines.base import Pipeline
from tests.guidance_scenes import scene_of

SCHEDULERS = {
    "lms": "LMSDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
PROMPTS = ["three and eight", "a photo of a two, red ink on a white background"]


@pytest.fixture(scope="module")
def v_prediction_folder(tmp_path_factory):
    """The same weights declared as v-prediction: nonsense pictures, but the same nonsense in both programs."""
    folder = tmp_path_factory.mktemp("models") / "v-prediction"
    shutil.copytree(resolve("zoo:digits/stable-diffusion"), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


def by_diffusers(folder, scheduler: str, seeds: list[int], **options) -> torch.Tensor:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    extra = {"clip_sample": False} if scheduler == "ddim" else {}
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipeline.scheduler.config, **extra)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(PROMPTS, generator=generators, output_type="pt", **options).images


def by_engine(model: Pipeline, spec: SamplingSpec, seeds: list[int], prompts=PROMPTS, guide=None) -> torch.Tensor:
    sampler = model.sampler(spec)
    denoiser = model.denoiser(prompts, spec, sampler)
    if guide:
        denoiser = guide(denoiser, model, len(seeds))
    latents = sample(denoiser, sampler, draw_noise(seeds, model.latent_shape)[0])
    with torch.no_grad():
        return model.decode(latents).clamp(0, 1)


def boundary_guide(classifier, **options):
    return lambda denoiser, model, count: guide_to_boundary(
        denoiser,
        BoundaryGuidanceSpec(**options),
        scene_of([(3, 8)] * count, classifier.logits, model.decode),
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_alpha_zero_equals_the_plain_diffusers_pipeline(scheduler, diffusion, classifier):
    """Guided sampling with size 0 against `StableDiffusionPipeline`, same seeds, to 1e-4."""
    options = {"num_inference_steps": 8, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    expected = by_diffusers(resolve("zoo:digits/stable-diffusion"), scheduler, [5, 6], **options)
    guide = boundary_guide(classifier, alpha=0.0, every=2, step="norm")
    images = by_engine(diffusion, SamplingSpec(scheduler=scheduler, **options), [5, 6], guide=guide)
    assert (images - expected).abs().max() < 1e-4
    assert expected.std() > 0.02


@pytest.mark.parametrize("scheduler", ["lms", "ddim"])
def test_v_prediction_equals_the_plain_diffusers_pipeline(scheduler, v_prediction_folder, hardware):
    """v-prediction in a variance-exploding and a variance-preserving scheduler."""
    options = {"num_inference_steps": 6, "guidance_scale": 2.0}
    expected = by_diffusers(v_prediction_folder, scheduler, [1, 2], **options)
    model = load_pipeline(str(v_prediction_folder), hardware)
    images = by_engine(model, SamplingSpec(scheduler=scheduler, **options), [1, 2])
    assert (images - expected).abs().max() < 1e-4


def test_batch_one_equals_batch_sixteen(diffusion, classifier):
    """A guided sample alone and among fifteen others with other prompts: equal up to rounding."""
    spec = SamplingSpec(num_inference_steps=10, guidance_scale=3.0)
    guide = boundary_guide(classifier, every=3)
    prompts = ["three and eight", "a photo of a one"] * 8
    together = by_engine(diffusion, spec, list(range(16)), prompts, guide)
    alone = by_engine(diffusion, spec, [4], prompts[4:5], guide)
    assert (together[4:5] - alone).abs().max() < 2e-3


def test_guidance_through_the_unet_runs_on_real_models(diffusion, classifier):
    """The published variant: gradient through the UNet moves the samples, and differs from the detached one."""
    spec = SamplingSpec(num_inference_steps=6, guidance_scale=3.0)
    images = {
        gradient: by_engine(
            diffusion, spec, [1, 2], PROMPTS, boundary_guide(classifier, every=2, gradient=gradient, step="norm")
        )
        for gradient in ("detached", "unet")
    }
    assert torch.isfinite(images["unet"]).all()
    assert (images["unet"] - images["detached"]).abs().max() > 1e-3
