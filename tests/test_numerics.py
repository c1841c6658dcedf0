"""Half precision, poisoned samples and memory: real zoo models in float16 and bfloat16, which a CPU computes slowly."""

import dataclasses
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.guidance import precision
from engine.methods.guidance.precision import pulled_back
from engine.methods.sampling.loop import sample
from engine.methods.sampling.noise import draw_noise
from engine.methods.sampling.spec import SamplingSpec
from engine.models.diffusion import load_pipeline
from engine.models.pipelines.base import EMBEDDINGS, LATENTS, ImageConditioning
from tests.guidance_scenes import scene_of

PIPELINE = "zoo:digits/stable-diffusion"
PROMPT = "three and eight"


@pytest.fixture(scope="module")
def halves(hardware):
    """The digits pipeline by the type of its UNet and text encoder."""
    return {
        dtype: load_pipeline(PIPELINE, dataclasses.replace(hardware, dtype=dtype)) for dtype in ("float16", "bfloat16")
    }


def guided_by(model, classifier, count, spec, **options):
    sampler = model.sampler(spec)
    denoiser = model.denoiser([PROMPT] * count, spec, sampler)
    guided = guide_to_boundary(
        denoiser,
        BoundaryGuidanceSpec(gradient="unet", **options),
        scene_of([(3, 8)] * count, classifier.logits, model.decode),
    )
    return guided, sampler


def gradients_at(model, classifier, place, count=2):
    """Gradients [B, C, H, W] through the UNet at a step of 40, at latents of pure noise of that level."""
    guided, sampler = guided_by(model, classifier, count, SamplingSpec(guidance_scale=3.0))
    step = list(sampler.steps())[place]
    latents = draw_noise(range(count), model.latent_shape)[0] * (step.sigma**2 + 1) ** 0.5
    return guided.gradients(guided.predict(latents, step), step)[1][0]


def cosines(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1))


def test_half_precision_gradients_keep_their_direction(halves, diffusion, classifier, monkeypatch):
    """Through the UNet, against float32; without the scale the same gradients underflow in float16 and lose it."""
    exact = gradients_at(diffusion, classifier, 5)
    assert (cosines(gradients_at(halves["bfloat16"], classifier, 5), exact) > 0.97).all()
    found = gradients_at(halves["float16"], classifier, 5)
    assert (cosines(found, exact) > 0.999).all() and found.dtype == torch.float32
    monkeypatch.setattr(precision, "SCALED_EXPONENT", -20)
    assert (cosines(gradients_at(halves["float16"], classifier, 5), exact) < 0.9).all()


def test_the_scale_changes_no_bit_in_single_precision(diffusion, classifier, monkeypatch):
    """Powers of two are exact: what a CPU promises byte by byte stays as it was."""
    scaled = gradients_at(diffusion, classifier, 20)
    monkeypatch.setattr(precision, "SCALED_EXPONENT", 0)
    assert torch.equal(gradients_at(diffusion, classifier, 20), scaled)


class Steep(torch.autograd.Function):
    """Passes half-precision values on; its gradient is `slope` times what comes, in half precision, and counted."""

    calls = 0

    @staticmethod
    def forward(context, values, slope):
        context.slope = slope
        return values.half()

    @staticmethod
    def backward(context, gradient):
        Steep.calls += 1
        return (gradient.half() * context.slope).float(), None


def test_a_sample_that_overflows_is_lowered_alone():
    """Rows: gentle, steep, beyond any scale, without gradient, poisoned. Each gets its own verdict, in few passes."""
    slope = torch.tensor([1.0, 3e4, torch.inf, 1.0, 1.0], dtype=torch.float16).reshape(5, 1, 1, 1)
    latents = torch.zeros(5, 1, 1, 2, requires_grad=True)
    cotangent = torch.tensor([1e-9, 1e-9, 1.0, 0.0, torch.nan]).reshape(5, 1, 1, 1).expand(5, 1, 1, 2)
    Steep.calls = 0
    found = pulled_back(cotangent, Steep.apply(latents, slope), latents)
    assert found[:2, 0, 0, 0].tolist() == pytest.approx([1e-9, 3e-5], rel=1e-3)
    assert torch.isnan(found[2]).all() and (found[3] == 0).all() and torch.isnan(found[4]).all()
    assert Steep.calls == 1 + precision.MAX_LOWERINGS


@pytest.mark.parametrize("gradient", ["unet", "detached"])
def test_a_poisoned_sample_harms_nobody(gradient, diffusion, classifier):
    """One sample of a batch becomes NaN: the pixels of the others keep every bit, and only it is counted."""
    spec = SamplingSpec(num_inference_steps=4, guidance_scale=3.0, guidance_rescale=0.7)
    noise = draw_noise(range(3), diffusion.latent_shape)[0]
    images, health = [], None
    for poison in (0.0, torch.nan):
        guided, sampler = guided_by(diffusion, classifier, 3, spec, every=2)
        guided._source = "unet" if gradient == "unet" else "conditional"
        spoiled = noise.clone()
        spoiled[1, 0, 0, 0] += poison
        with torch.no_grad():
            images.append(diffusion.decode(sample(guided, sampler, spoiled)))
        health = guided.health
    clean, poisoned = images
    assert torch.equal(clean[[0, 2]], poisoned[[0, 2]]) and torch.isnan(poisoned[1]).any()
    assert health.nonfinite.tolist() == [0, 1, 0] and health.guided_steps.tolist() == [1, 0, 1]


@pytest.mark.parametrize("scheduler", ["lms", "ddim", "euler", "dpmsolver++"])
def test_schedulers_step_in_single_precision(scheduler, halves):
    """Latents and everything a scheduler remembers are float32 under a float16 UNet, and near the float32 result."""
    model, spec = halves["float16"], SamplingSpec(scheduler=scheduler, num_inference_steps=3, guidance_scale=3.0)
    sampler = model.sampler(spec)
    latents = sample(model.denoiser([PROMPT], spec, sampler), sampler, draw_noise([1], model.latent_shape)[0])
    state = [
        one for value in vars(sampler._scheduler).values() for one in (value if isinstance(value, list) else [value])
    ]
    kinds = {one.dtype for one in state if isinstance(one, torch.Tensor) and one.is_floating_point()}
    assert kinds <= {torch.float32, torch.float64} and latents.dtype == torch.float32


def test_half_precision_samples_are_near(halves, diffusion):
    """Prompt path in float16 and bfloat16 against float32: the same picture."""
    spec, noise = SamplingSpec(num_inference_steps=8, guidance_scale=3.0), draw_noise([3], diffusion.latent_shape)[0]

    def picture(model):
        sampler = model.sampler(spec)
        with torch.no_grad():
            return model.decode(sample(model.denoiser([PROMPT], spec, sampler), sampler, noise)).clamp(0, 1)

    exact = picture(diffusion)
    assert (picture(halves["float16"]) - exact).abs().mean() < 0.003
    assert (picture(halves["bfloat16"]) - exact).abs().mean() < 0.03


def test_embeddings_condition_a_half_precision_unet(hardware):
    """Stable unCLIP: class labels are made in float32 whatever comes, and a float16 UNet follows them."""
    outputs = []
    for dtype in ("float32", "float16"):
        model = load_pipeline("zoo:digits/stable-unclip", dataclasses.replace(hardware, dtype=dtype))
        embeds = torch.randn(2, *model.noise_shapes[EMBEDDINGS], generator=torch.Generator().manual_seed(0))
        noise = model.draw_noise([1, 2])
        images = ImageConditioning(embeds=embeds.to(getattr(torch, dtype)), noise=noise, noise_level=300)
        assert model._noiser.class_labels(images.embeds, noise[EMBEDDINGS], 300).dtype == torch.float32
        spec = SamplingSpec(scheduler="ddim", num_inference_steps=4, guidance_scale=3.0)
        sampler = model.sampler(spec)
        denoiser = model.denoiser([PROMPT] * 2, spec, sampler, images)
        outputs.append(denoiser(noise[LATENTS], next(sampler.steps())).output)
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 and outputs[0].std() > 0.3


def test_guidance_through_the_unet_costs_no_forward_pass(diffusion, classifier, monkeypatch):
    """A guided step computes as many rows as any other; its prediction equals the plain one's within rounding."""
    rows = []
    predict = diffusion.predict
    monkeypatch.setattr(
        diffusion, "predict", lambda latents, *rest: rows.append(len(latents)) or predict(latents, *rest)
    )
    spec = SamplingSpec(num_inference_steps=4, guidance_scale=3.0, guidance_rescale=0.7)
    guided, sampler = guided_by(diffusion, classifier, 2, spec, every=2)
    sample(guided, sampler, draw_noise([1, 2], diffusion.latent_shape)[0])
    assert rows == [4, 2, 2, 4, 4]
    step, latents = next(sampler.steps()), draw_noise([1, 2], diffusion.latent_shape)[0]
    plain, attached = guided._denoiser(latents, step), guided.predict(latents, step).detached()
    assert torch.allclose(plain.output, attached.output, atol=1e-4)
    assert torch.allclose(plain.conditional, attached.conditional, atol=1e-4)


def peak_bytes(work) -> int:
    """Most bytes that torch had allocated at a time, above those at the start: of tensors, graphs and workspaces."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    sizes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return max(itertools.accumulate(sizes))


def test_checkpointing_takes_effect(hardware, diffusion, classifier):
    """Measured: the gradient through UNet and decoder, equal, in much less memory; the models stay in evaluation."""
    lean = load_pipeline(PIPELINE, dataclasses.replace(hardware, gradient_checkpointing="on"))
    found: dict[str, torch.Tensor] = {}

    def measure(name, model):
        return peak_bytes(lambda: found.update({name: gradients_at(model, classifier, 20, count=4)}))

    plain, checkpointed = measure("plain", diffusion), measure("lean", lean)
    assert checkpointed < 0.6 * plain
    assert torch.equal(found["plain"], found["lean"])
    assert not any(module.training for part in (lean._network, lean._vae) for module in part.modules())


def test_channels_last_changes_the_layout_and_not_the_picture(hardware, diffusion):
    """Weights and activations of UNet and VAE in the other layout: equal within rounding."""
    model = load_pipeline(PIPELINE, dataclasses.replace(hardware, channels_last=True))
    assert model._network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    spec, noise = SamplingSpec(num_inference_steps=3, guidance_scale=3.0), draw_noise([3], diffusion.latent_shape)[0]
    sampler = diffusion.sampler(spec)
    step = next(sampler.steps())
    outputs = [one.denoiser([PROMPT], spec, sampler)(noise, step).output for one in (model, diffusion)]
    assert torch.allclose(*outputs, atol=1e-4)
    assert torch.allclose(model.decode(noise), diffusion.decode(noise), atol=1e-4)


def test_only_calls_without_gradient_are_compiled(hardware, classifier, monkeypatch):
    """Which calls go through `torch.compile`: both halves of plain steps, the unconditional half of guided ones."""
    rows = []

    def compiling(module, dynamic):
        assert dynamic is False
        return lambda latents, *rest, **more: rows.append(len(latents)) or module(latents, *rest, **more)

    monkeypatch.setattr(torch, "compile", compiling)
    model = load_pipeline(PIPELINE, dataclasses.replace(hardware, compile=True))
    guided, sampler = guided_by(model, classifier, 2, SamplingSpec(num_inference_steps=3, guidance_scale=3.0), every=2)
    sample(guided, sampler, draw_noise([1, 2], model.latent_shape)[0])
    assert rows == [4, 2, 4]
