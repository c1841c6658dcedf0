"""Sampling that begins in the middle, from real images: every scheduler, prediction type, spacing and kind of sigmas.

Against diffusers' image-to-image pipeline where that is right, and where it is not against slow references: data of a
Gaussian have an exact denoiser, and the solution of its differential equation is known from any step on.
"""

import math

import diffusers
import pytest
import torch

from engine.methods.sampling.denoiser import Prediction, Step, output_of_eps
from engine.methods.sampling.families import KINDS, KNOWN, ModelScheduler
from engine.methods.sampling.loop import Start, sample
from engine.methods.sampling.schedulers import Sampler, make_sampler
from engine.methods.sampling.spec import SamplingSpec, steps_of
from engine.models.diffusion import load_pipeline
from tests.test_schedulers import SMALL
from tests.tiny_pipelines import BETAS, PROMPTS, SEEDS, load_reference, save_pipeline

PREDICTIONS = ("epsilon", "v_prediction")
# diffusers goes on with coefficients, or with timesteps, of a history that is not there.
WRONG_IN_DIFFUSERS = ("LMSDiscreteScheduler", "PNDMScheduler")
CONFIGURATIONS = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
)
STEPS = 6
MEAN, SPREAD = 0.5, 0.7


def model_of(name: str, **config) -> ModelScheduler:
    plain = {"clip_sample": False, "set_alpha_to_one": True, "skip_prk_steps": True}
    return ModelScheduler(config=BETAS | plain | {"_class_name": name} | config, name=name)


def sampler_of(name: str, num_steps: int = STEPS, **config):
    return make_sampler(SamplingSpec(scheduler="model", num_inference_steps=num_steps), model_of(name, **config))


def noise_of(seed: int) -> torch.Tensor:
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


class Exact:
    """The denoiser of data that are normal with `MEAN` and `SPREAD`, which notes its steps."""

    def __init__(self, prediction) -> None:
        self.prediction, self.steps = prediction, []

    def __call__(self, latents, step):
        """The expectation of x0, and the eps that belongs to it."""
        self.steps.append(step)
        variance = (step.scale * SPREAD) ** 2 + step.sigma**2
        x0 = (step.scale * SPREAD**2 * latents + step.sigma**2 * MEAN) / variance
        eps = (latents - step.scale * x0) / step.sigma
        output = output_of_eps(eps, latents, step, self.prediction)
        return Prediction(output=output, conditional=output, latents=latents, prediction=self.prediction)


def error_from(sampler, strength: float) -> float:
    """Largest distance to the exact solution from the step at which a strength begins."""
    start, noise, denoise = MEAN + SPREAD * noise_of(0), noise_of(1), Exact(sampler.prediction)
    made = sample(denoise, sampler, noise, None if strength == 1 else Start(latents=start, strength=strength))
    first = denoise.steps[0]
    begun = noise * sampler.init_noise_sigma if strength == 1 else first.scale * start + first.sigma * noise
    level = first.sigma / first.scale
    # Along the equation, latents without their scale keep their distance to the mean in standard deviations.
    exact = MEAN + SPREAD * (begun / first.scale - MEAN) / math.hypot(SPREAD, level)
    return float((made - exact).abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_a_start_in_the_middle_ends_as_near_the_exact_solution_as_noise(name, prediction):
    """k-LMS without its history, or PNDM between two noise levels, would be ten times as far from it."""
    config = {"prediction_type": prediction, "timestep_spacing": "leading", "steps_offset": 1}
    whole, half, third = (error_from(sampler_of(name, 20, **config), share) for share in (1, 0.5, 0.3))
    assert max(half, third) < max(1.1 * whole, 0.01)
    # PNDM's Runge-Kutta steps need four steps, which a start may not have.
    assert name != "PNDMScheduler" or half == error_from(sampler_of(name, 20, **config, skip_prk_steps=False), 0.5)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory, hardware):
    """A tiny pipeline as the engine has it, and as diffusers' image-to-image pipeline."""
    folder = save_pipeline(tmp_path_factory.mktemp("starts") / "pipeline", unet=SMALL)
    reference = diffusers.StableDiffusionImg2ImgPipeline(
        **load_reference(folder).components, requires_safety_checker=False
    )
    return load_pipeline(str(folder), hardware), reference


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in KNOWN if name not in WRONG_IN_DIFFUSERS])
def test_latents_are_those_of_the_pipeline_of_diffusers(name, pipelines):
    """Of `StableDiffusionImg2ImgPipeline` with the same latents of the image and the same noise."""
    model, reference = pipelines
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    unknown = {"use_karras_sigmas": not KNOWN[name].has_sigmas, "rescale_betas_zero_snr": not KNOWN[name].has_zero_snr}
    for options, strength in zip(CONFIGURATIONS, (0.5, 0.2, 0.7), strict=True):
        config = {key: value for key, value in options.items() if not unknown.get(key)}
        model._scheduler = model_of(name, **config)
        spec = SamplingSpec(scheduler="model", num_inference_steps=STEPS, guidance_scale=3.0)
        stream = model.noise_stream(SEEDS)
        [noise], sampler = model.first_noise(stream).values(), model.sampler(spec, stream)
        made = sample(model.denoiser(PROMPTS, spec, sampler), sampler, noise, Start(latents=latents, strength=strength))
        options = model_of(name).options(spec)
        scheduler = getattr(diffusers, name).from_config(model._scheduler.config, **options)
        pipeline = type(reference)(**reference.components | {"scheduler": scheduler}, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            prompt=PROMPTS, image=latents, strength=strength, num_inference_steps=STEPS, guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS], output_type="latent",
        ).images  # fmt: skip
        assert (made - expected).abs().max() < 1e-4 and (made - latents).abs().max() > 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lms_begins_as_a_schedule_that_has_only_the_steps_left(prediction):
    """diffusers goes by the place of the step in the whole schedule, and sums over derivatives that are not there."""
    sampler, other = (sampler_of("LMSDiscreteScheduler", 8, prediction_type=prediction) for _ in range(2))
    made = sample(Exact(prediction), sampler, noise_of(1), Start(latents=noise_of(0), strength=0.625))
    scheduler, denoise = other._scheduler, Exact(prediction)
    steps = list(other.steps())[3:]
    scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[3:], scheduler.timesteps[3:]
    latents = noise_of(0) + steps[0].sigma * noise_of(1)
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        scheduler.is_scale_input_called = True
        latents = scheduler.step(denoise(latents, step).output, timestep, latents).prev_sample
    assert torch.equal(made, latents)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pndm_begins_as_the_method_of_its_paper(prediction):
    """PLMS written out: first a step by the mean of both its ends, then by two, three and four outputs."""
    sampler, ratio, abars = sampler_of("PNDMScheduler", 10, timestep_spacing="leading", steps_offset=1,
                                       prediction_type=prediction), 100, None  # fmt: skip
    made = sample(Exact(prediction), sampler, noise_of(1), Start(latents=noise_of(0), strength=0.6))
    abars, denoise = sampler._scheduler.alphas_cumprod, Exact(prediction)

    def output_at(latents, timestep):
        abar = float(abars[timestep])
        step = Step(index=1, total=1, timestep=torch.tensor(timestep), scale=math.sqrt(abar),
                    sigma=math.sqrt(1 - abar), normalise_input=False)  # fmt: skip
        return denoise(latents, step).output

    def stepped(latents, output, timestep):
        abar, past = float(abars[timestep]), float(abars[timestep - ratio]) if timestep >= ratio else 1.0
        eps = math.sqrt(abar) * output + math.sqrt(1 - abar) * latents if prediction != "epsilon" else output
        x0 = (latents - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return math.sqrt(past) * x0 + math.sqrt(1 - past) * eps

    abar = float(abars[501])
    latents, outputs = math.sqrt(abar) * noise_of(0) + math.sqrt(1 - abar) * noise_of(1), []
    for timestep in range(501, 0, -ratio):
        outputs.append(output_at(latents, timestep))
        match outputs:
            case [one]:
                mixed = (one + output_at(stepped(latents, one, timestep), timestep - ratio)) / 2
            case [two, one]:
                mixed = (3 * one - two) / 2
            case [three, two, one]:
                mixed = (23 * one - 16 * two + 5 * three) / 12
            case [*_, four, three, two, one]:
                mixed = (55 * one - 59 * two + 37 * three - 9 * four) / 24
        latents = stepped(latents, mixed, timestep)
    assert (made - latents).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_steps_keep_their_numbers_and_noise_levels(name):
    """So that the windows of guidance mean noise levels; second-order schedulers begin with a first evaluation."""
    whole = list(sampler_of(name).steps())
    for num_left in (0, 1, 4):
        left = list(sampler_of(name).last_steps((num_left + 0.1) / STEPS))
        order = 2 if name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler") else 1
        again = name == "PNDMScheduler" and num_left > 1
        assert len(left) == max(order * num_left - (order - 1), 0) + again
        assert [step.index for step in left] == list(range(len(whole) - len(left) + 1, len(whole) + 1))
        assert {step.total for step in left} <= {len(whole)}
        if name != "PNDMScheduler":
            assert left == whole[len(whole) - len(left) :]


def test_a_step_is_found_by_its_place_where_two_have_the_same_timestep():
    """Rounded, the last ones of Karras et al. are equal: diffusers would begin with the second and run past the end."""
    config = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    timesteps = sampler_of("DPMSolverMultistepScheduler", 60, **config)._scheduler.timesteps.tolist()
    [first, *_] = [place for place in range(59) if timesteps[place] == timesteps[place + 1]]
    strength = round((60 - first) / 60 + 0.001, 4)
    assert steps_of(strength, 60) == 60 - first
    assert error_from(sampler_of("DPMSolverMultistepScheduler", 60, **config), strength) < 0.005


class FlowSampler(Sampler):
    """Euler's method on a rectified flow: a sampler as another family would bring it, without a start of its own."""

    prediction, init_noise_sigma = "flow", 1.0

    def steps(self):
        """Forty steps from noise to data."""
        for place in range(40):
            sigma = 1 - place / 40
            yield Step(index=place + 1, total=40, timestep=torch.tensor(1000 * sigma), scale=1 - sigma, sigma=sigma,
                       normalise_input=False)  # fmt: skip

    def advance(self, prediction, step):
        """The latents one step on."""
        return prediction.latents - prediction.output / 40


def test_a_sampler_without_history_needs_nothing_for_starts():
    """The steps that are left, from the noised image on: rectified flow too."""
    assert error_from(FlowSampler(), 0.5) < 0.05


def test_the_number_of_steps_goes_by_the_decimals_of_the_strength():
    """0.29 x 100 is 28.999999999999996 in floats; 29 steps are meant."""
    assert [steps_of(share, 100) for share in (0.29, 0.07, 0.57, 0.289)] == [29, 7, 57, 28]
    assert all(steps_of(place / 1000, 1000) == place for place in range(1001))
    assert steps_of(1e-05, 1000) == 0 and steps_of(1, 40) == 40
