"""Predictions and classifier-free guidance against their formulae written out, tensor by tensor.

Whole pipelines compared with diffusers see such errors too, far away; a swapped half or a wrong norm fails here.
"""

import math

import pytest
import torch

from engine.methods.sampling.denoiser import (
    PARAMETERISATIONS,
    ClassifierFreeDenoiser,
    Condition,
    Prediction,
    Step,
    output_of_eps,
    predicted_eps,
    predicted_x0,
)
from engine.methods.sampling.families import CLASSES, ModelScheduler
from engine.methods.sampling.schedulers import make_sampler
from engine.methods.sampling.spec import SamplingSpec

# Variance-preserving, variance-exploding below and above sigma 1, and flow matching.
LEVELS = [(0.6, 0.8), (math.sqrt(0.99), 0.1), (1.0, 0.3), (1.0, 14.6), (0.25, 0.75)]
SCALES = (1.0, 3.0, 7.5)


def step_at(scale: float, sigma: float, *, index: int = 3, total: int = 9, exploding: bool = False) -> Step:
    return Step(
        index=index,
        total=total,
        timestep=torch.tensor(500),
        scale=scale,
        sigma=sigma,
        normalise_input=exploding,
    )


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 3, 3)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network:
    """An output that tells conditional from unconditional rows, inputs from latents, and one call from two."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, inputs, timestep, condition):
        self.rows.append(len(inputs))
        return torch.tanh(inputs) * condition["text"] + condition["image"] + timestep / 1000


def condition_of(text: float, image: float) -> Condition:
    rows = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    return Condition({"text": text * rows, "image": image * rows})


CONDITIONAL, UNCONDITIONAL = condition_of(0.7, 0.2), condition_of(-0.4, 0.0)


def denoiser_of(scale: float, rescale: float = 0.0) -> tuple[ClassifierFreeDenoiser, Network]:
    network = Network()
    denoiser = ClassifierFreeDenoiser(
        network,
        conditional=CONDITIONAL,
        unconditional=UNCONDITIONAL,
        prediction="epsilon",
        guidance_scale=scale,
        guidance_rescale=rescale,
    )
    return denoiser, network


def halves(latents: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Unconditional and conditional output, by one call each."""
    network, inputs = Network(), latents / (math.hypot(step.scale, step.sigma) if step.normalise_input else 1)
    return network(inputs, step.timestep, UNCONDITIONAL), network(inputs, step.timestep, CONDITIONAL)


@pytest.mark.parametrize("exploding", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("way", ["called", "attached"])
def test_classifier_free_guidance_is_its_formula(way, scale, exploding):
    """`u + s (c - u)` of the unconditional u and the conditional c, from a batch of both and from two calls."""
    step, latents = step_at(1.0, 2.0, exploding=exploding), drawn(0)
    denoiser, network = denoiser_of(scale)
    prediction = denoiser(latents, step) if way == "called" else denoiser.attached(latents, step)
    unconditional, conditional = halves(latents, step)
    assert torch.allclose(prediction.output, unconditional + scale * (conditional - unconditional))
    assert torch.allclose(prediction.conditional, conditional)
    assert prediction.latents is latents and prediction.prediction == "epsilon"
    if scale == 1:
        assert network.rows == [2]
    else:
        assert network.rows == ([4] if way == "called" else [2, 2])
        assert not torch.allclose(prediction.output, conditional + scale * (unconditional - conditional))


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("way", ["called", "attached"])
def test_rescaled_guidance_is_its_formula(way, share):
    """Lin et al. 2024, equations 15 and 16: a share of the output with the conditional's standard deviation."""
    step, latents = step_at(0.6, 0.8), drawn(1)
    denoiser, _ = denoiser_of(5.0, share)
    prediction = denoiser(latents, step) if way == "called" else denoiser.attached(latents, step)
    unconditional, conditional = halves(latents, step)
    for row in range(2):
        guided = unconditional[row] + 5.0 * (conditional[row] - unconditional[row])
        expected = share * guided * conditional[row].std() / guided.std() + (1 - share) * guided
        assert torch.allclose(prediction.output[row], expected)


def test_only_the_conditional_half_of_an_attached_prediction_has_a_gradient():
    """It is that of the conditional network in the latents; the combined output is a constant."""
    step, latents = step_at(1.0, 2.0, exploding=True), drawn(2).requires_grad_(True)
    prediction = denoiser_of(3.0)[0].attached(latents, step)
    [gradient] = torch.autograd.grad(prediction.conditional.sum(), [latents])
    norm = math.hypot(1.0, 2.0)
    expected = CONDITIONAL["text"] * (1 - torch.tanh(latents.detach() / norm) ** 2) / norm
    assert torch.allclose(gradient, expected) and not prediction.output.requires_grad
    assert not denoiser_of(3.0)[0](latents, step).conditional.requires_grad


def test_a_half_precision_network_is_combined_in_float32():
    """The difference of the two halves would lose its digits."""
    half = Condition({"text": torch.ones(1, 1, 1, 1)}), Condition({"text": torch.zeros(1, 1, 1, 1)})
    denoiser = ClassifierFreeDenoiser(
        lambda inputs, timestep, condition: (inputs * condition["text"]).half(),
        conditional=half[0],
        unconditional=half[1],
        prediction="epsilon",
        guidance_scale=3.0,
    )
    latents = torch.ones(1, 4, 2, 2)
    assert denoiser(latents, step_at(0.6, 0.8)).output.dtype == torch.float32
    assert denoiser.attached(latents, step_at(0.6, 0.8)).output.dtype == torch.float32


def test_conditions_are_joined_name_by_name():
    """Both batches in their order; conditions of two networks are not mixed."""
    both = UNCONDITIONAL.followed_by(CONDITIONAL)
    for name in ("text", "image"):
        assert torch.equal(both[name], torch.cat([UNCONDITIONAL[name], CONDITIONAL[name]]))
    with pytest.raises(ValueError, match=r"conditions of \['image', 'text'\] and \['text'\]"):
        CONDITIONAL.followed_by(Condition({"text": CONDITIONAL["text"]}))


def output_by_definition(prediction: str, x0: torch.Tensor, eps: torch.Tensor, step: Step) -> torch.Tensor:
    """What a perfect network gives."""
    norm = math.sqrt(step.scale**2 + step.sigma**2)
    definitions = {
        "epsilon": eps,
        # Salimans and Ho 2022, for latents of variance one.
        "v_prediction": step.scale / norm * eps - step.sigma / norm * x0,
        # Liu et al. 2023.
        "flow": eps - x0,
    }
    return definitions[prediction]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("prediction", PARAMETERISATIONS)
def test_outputs_stand_for_x0_and_eps_at_every_noise_level(prediction, levels):
    """Of `z = scale x0 + sigma eps` a perfect output gives back both, and eps gives back the output."""
    step, x0, eps = step_at(*levels), drawn(3), drawn(4)
    latents = step.scale * x0 + step.sigma * eps
    output = output_by_definition(prediction, x0, eps, step)
    assert torch.allclose(predicted_x0(output, latents, step, prediction), x0)
    assert torch.allclose(predicted_eps(output, latents, step, prediction), eps)
    assert torch.allclose(output_of_eps(eps, latents, step, prediction), output)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("prediction", PARAMETERISATIONS)
def test_any_output_is_consistent_with_its_latents(prediction, levels):
    """`scale x0 + sigma eps` is the latents, whatever the network gives; a shift of one leaves the other."""
    step, latents, output, shift = step_at(*levels), drawn(5), drawn(6), drawn(7)
    eps = predicted_eps(output, latents, step, prediction)
    assert torch.allclose(step.scale * predicted_x0(output, latents, step, prediction) + step.sigma * eps, latents)
    base = Prediction(output=output, conditional=output, latents=latents, prediction=prediction)
    moved, bent = base.moved(shift, step), base.with_eps_moved(shift, step)
    assert torch.allclose(predicted_eps(moved.output, moved.latents, step, prediction), eps)
    assert torch.equal(moved.latents, latents + shift) and torch.equal(bent.latents, latents)
    assert torch.allclose(predicted_eps(bent.output, latents, step, prediction), eps + shift)


@pytest.mark.parametrize(("scale", "sigma"), LEVELS)
def test_a_step_knows_its_signal_and_its_input(scale, sigma):
    """The signal is the share of x0 in latents of variance one; only variance-exploding latents are normalised."""
    latents, norm = drawn(8), math.sqrt(scale**2 + sigma**2)
    assert step_at(scale, sigma).signal == pytest.approx(scale / norm)
    assert torch.equal(step_at(scale, sigma).network_input(latents), latents)
    assert torch.allclose(step_at(scale, sigma, exploding=True).network_input(latents), latents / norm)


@pytest.mark.parametrize("scheduler", CLASSES)
def test_steps_are_counted_from_one(scheduler):
    """Guidance chooses its steps by their number: the last is the total."""
    spec = SamplingSpec(scheduler=scheduler, num_inference_steps=5)
    steps = list(make_sampler(spec, ModelScheduler(config={}, name=CLASSES[scheduler])).steps())
    assert [step.index for step in steps] == [1, 2, 3, 4, 5] and {step.total for step in steps} == {5}
