"""Step rules, prediction types and composition, on small analytic models in float64."""

import math

import pytest
import torch

from engine.methods.boundary.guide import guide_to_boundary, rule_of
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.rules import GradientHealth, norms, polyak, shifting
from engine.methods.risky.guide import (
    capped,
    distance_to_target,
    guide_to_risk,
    polyak_above_floors,
    without_conflict,
)
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.sampling.denoiser import (
    ClassifierFreeDenoiser,
    Condition,
    Prediction,
    Step,
    output_of_eps,
    predicted_eps,
    predicted_x0,
)
from engine.methods.sampling.families import ModelScheduler
from engine.methods.sampling.loop import sample
from engine.methods.sampling.noise import draw_noise
from engine.methods.sampling.schedulers import Sampler, make_sampler
from engine.methods.sampling.spec import SamplingSpec
from engine.methods.scores import kldb, risk
from tests.guidance_scenes import scene_of

SCHEDULERS = ("lms", "ddim", "euler", "dpmsolver++")
PREDICTIONS = ("epsilon", "v_prediction")
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def sampler_of(spec: SamplingSpec, config: dict) -> Sampler:
    return make_sampler(spec, ModelScheduler(config=config, name="DDIMScheduler"))


def step_at(scale: float = 1.0, sigma: float = 2.0, index: int = 5, total: int = 40) -> Step:
    return Step(
        index=index,
        total=total,
        timestep=torch.tensor(500.0),
        scale=scale,
        sigma=sigma,
        normalise_input=scale == 1.0,
    )


def prediction_at(latents: torch.Tensor) -> Prediction:
    zero = torch.zeros_like(latents)
    return Prediction(output=zero, conditional=zero, latents=latents, prediction="epsilon")


def slow_shift(spec: BoundaryGuidanceSpec, loss: float, gradient: list[float], latents: list[float]) -> list[float]:
    """The update rules sample by sample, in Python floats, from the equations."""
    length_g = math.sqrt(math.fsum(one * one for one in gradient))
    length_z = math.sqrt(math.fsum(one * one for one in latents))
    if spec.step == "paper":
        factor = spec.step_size / max(abs(one) for one in gradient)
    elif spec.step == "norm":
        factor = spec.step_size * length_z / length_g
    else:
        factor = min(spec.step_size * loss / length_g**2, spec.cap * length_z / length_g)
    return [-factor * one for one in gradient]


@pytest.mark.parametrize("step", ["polyak", "norm", "paper"])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.3])
def test_rules_equal_the_equations(step, alpha):
    """A batch against the slow reference; catches whole-batch norms, which couple neighbours."""
    torch.manual_seed(0)
    spec = BoundaryGuidanceSpec(step=step, alpha=alpha)
    latents, gradient = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    gradient *= torch.logspace(-12, 3, 6, dtype=torch.float64)[:, None, None, None]
    loss = torch.rand(6, dtype=torch.float64) * 3
    shift = rule_of(spec)(loss, gradient, latents)
    for row in range(6):
        expected = slow_shift(spec, loss[row].item(), gradient[row].flatten().tolist(), latents[row].flatten().tolist())
        assert shift[row].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_polyak_reaches_the_zero_of_a_linear_criterion():
    """On L = a.z + b the uncapped step lands on L = 0 at once: the reason that it needs no size."""
    torch.manual_seed(1)
    direction, latents = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    loss = (direction * latents).sum((1, 2, 3)) + 50
    moved = latents + polyak(loss, direction.expand_as(latents), latents, alpha=1.0, cap=1e9)
    assert ((direction * moved).sum((1, 2, 3)) + 50).abs().max() < 1e-9


def test_norms_do_not_underflow():
    """Squares of 1e-30 vanish in float32; the norm must not."""
    assert norms(torch.full((1, 4, 1, 1), 1e-30)).item() == pytest.approx(2e-30)
    assert norms(torch.zeros(1, 4, 1, 1)).item() == 0


def test_unusable_gradients_stay_put_and_are_counted():
    """One NaN, one infinity and one zero gradient among good ones: the good ones move, the others are counted."""
    gradient = torch.ones(4, 1, 2, 2)
    gradient[1], gradient[2, 0, 0, 0], gradient[3] = 0, math.nan, math.inf
    health = GradientHealth.of(4)
    base = prediction_at(torch.ones(4, 1, 2, 2))
    for _ in range(2):
        update = shifting(rule_of(BoundaryGuidanceSpec()))
        moved = update(torch.ones(1, 4), gradient[None], base, step_at(), health).latents - 1
    assert torch.isfinite(moved).all() and moved[0].abs().min() > 0 and moved[1:].abs().max() == 0
    assert health.guided_steps.tolist() == [2, 0, 0, 0]
    assert health.zero.tolist() == [0, 2, 0, 0] and health.nonfinite.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("levels", [(1.0, 0.3), (1.0, 14.6), (0.9, math.sqrt(1 - 0.81)), (0.1, math.sqrt(0.99))])
def test_prediction_types_recover_x0_and_eps(prediction, levels):
    """Outputs are made from known x0 and eps by the definition of v; both must come back, for VE and VP levels."""
    torch.manual_seed(0)
    scale, sigma = levels
    clean, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    latents, norm, step = scale * clean + sigma * eps, math.hypot(scale, sigma), step_at(scale, sigma)
    output = eps if prediction == "epsilon" else (scale * eps - sigma * clean) / norm
    assert torch.allclose(predicted_x0(output, latents, step, prediction), clean)
    assert torch.allclose(predicted_eps(output, latents, step, prediction), eps)
    assert torch.allclose(output_of_eps(eps, latents, step, prediction), output)


class ToyUnet:
    """A smooth stand-in for a UNet that mixes all latents of a sample, with its own weights for each embedding."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.randn(16, 16, generator=generator, dtype=torch.float64) / 6

    def __call__(self, latents, timestep, condition):
        flat = latents.flatten(1).double() @ self.weight + condition["text"].mean((1, 2))[:, None]
        return torch.tanh(flat).reshape(latents.shape)


def toy_denoiser(num_samples: int, prediction: str = "epsilon", scale: float = 3.0) -> ClassifierFreeDenoiser:
    return ClassifierFreeDenoiser(
        ToyUnet(),
        conditional=Condition({"text": torch.full((num_samples, 2, 3), 0.2, dtype=torch.float64)}),
        unconditional=Condition({"text": torch.zeros(num_samples, 2, 3, dtype=torch.float64)}),
        prediction=prediction,
        guidance_scale=scale,
    )


def toy_decode(latents):
    return latents[:, :3] * 0.05 + 0.5


def toy_logits(images):
    flat = images.flatten(1).double()
    weight = torch.randn(flat.shape[1], 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return flat @ weight * 2


def guided(num_samples: int, prediction: str = "epsilon", **options) -> GuidedDenoiser:
    return guide_to_boundary(
        toy_denoiser(num_samples, prediction),
        BoundaryGuidanceSpec(**options),
        scene_of([(1, 3)] * num_samples, toy_logits, toy_decode),
    )


def latents_of(num_samples: int) -> torch.Tensor:
    return draw_noise(range(num_samples), (4, 2, 2))[0].double() * 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("levels", [(1.0, 2.0), (0.6, 0.8)])
@pytest.mark.parametrize("gradient", ["detached", "unet", "combined", "combined, last step"])
def test_gradient_equals_finite_differences(prediction, levels, gradient):
    """The whole chain latents -> x0 -> image -> KLDB, all variants; catches a wrong factor or a lost path.

    That of the combined prediction sees what the conditional half adds to it; at the last step only its image.
    """
    gradient, _, is_last = gradient.partition(", ")
    step, latents = step_at(*levels, index=40 if is_last else 5), latents_of(1)
    wrapper = guided(1, prediction, gradient=gradient)
    base = wrapper.predict(latents, step)
    analytic = wrapper.gradients(base, step)[1][0]
    fixed = predicted_eps(base.conditional if gradient == "detached" else base.output, latents, step, prediction)
    assert not torch.allclose(base.conditional, base.output)

    def objective(moved):
        output = wrapper._denoiser.conditional_output(moved, step)
        if gradient == "unet":
            clean = predicted_x0(output, moved, step, prediction)
        elif gradient == "combined" and not is_last:
            clean = predicted_x0(base.output + output - base.conditional, moved, step, prediction)
        else:
            clean = predicted_x0(fixed, moved, step, "epsilon")
        return kldb(toy_logits(toy_decode(clean)), (1, 3)).sum().item()

    for place in range(0, 16, 3):
        nudge = torch.zeros(16, dtype=torch.float64)
        nudge[place] = 1e-5
        nudge = nudge.reshape(1, 4, 2, 2)
        slope = (objective(latents + nudge) - objective(latents - nudge)) / 2e-5
        assert analytic.flatten()[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("rule", ["polyak", "norm", "paper"])
@pytest.mark.parametrize("gradient", ["detached", "unet", "combined"])
def test_guided_step_lowers_its_criterion(rule, gradient):
    """After one small guided step the KLDB of the same x0 prediction is lower for every sample."""
    step, latents = step_at(sigma=1.0), latents_of(8)
    wrapper = guided(8, step=rule, gradient=gradient, alpha=0.02, every=5)
    base = wrapper.predict(latents, step)
    before = wrapper.gradients(base, step)[0][0]
    moved = wrapper(latents, step).latents
    if gradient == "unet":
        base = wrapper.predict(moved, step)
        after = wrapper.gradients(base, step)[0][0]
    else:
        held = predicted_eps(base.conditional, latents, step, "epsilon")
        if gradient == "combined":
            held = base.output + wrapper._denoiser.conditional_output(moved, step) - base.conditional
        clean = predicted_x0(held, moved, step, "epsilon")
        after = kldb(toy_logits(toy_decode(clean).clamp(0, 1)), (1, 3))
    assert (after < before).all()


def test_latents_without_signal_are_not_guided():
    """At zero terminal SNR the prediction of x0 divides by zero: such a step is the plain one."""
    wrapper, latents = guided(2, "v_prediction", every=5), latents_of(2)
    for signal, is_moved in ((1e-4, False), (0.1, True)):
        step = step_at(signal, math.sqrt(1 - signal**2))
        assert torch.equal(wrapper(latents, step).latents, latents) != is_moved
    assert wrapper.health.guided_steps.tolist() == [1, 1]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_shift_keeps_eps(prediction):
    """The update is added with the eps of the unmodified latents, for eps- and v-prediction alike."""
    step, latents = step_at(0.6, 0.8), latents_of(2)
    base = toy_denoiser(2, prediction)(latents, step)
    moved = base.moved(torch.ones_like(latents), step)
    assert torch.allclose(
        predicted_eps(moved.output, moved.latents, step, prediction),
        predicted_eps(base.output, base.latents, step, prediction),
    )
    assert torch.equal(moved.latents, latents + 1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_do_not_know_their_neighbours(scheduler, prediction):
    """A guided sample alone equals the same sample in a batch of 16, for every scheduler."""
    spec = SamplingSpec(scheduler=scheduler, num_inference_steps=10)
    config = CONFIG | {"prediction_type": prediction}
    noise = draw_noise(range(16), (4, 2, 2))[0].double()
    together = sample(guided(16, prediction, every=2), sampler_of(spec, config), noise)
    alone = sample(guided(1, prediction, every=2), sampler_of(spec, config), noise[5:6])
    assert torch.allclose(together[5:6], alone, atol=1e-9)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", ["polyak", "norm", "paper"])
def test_alpha_zero_changes_nothing(scheduler, rule):
    """Guidance of size zero is no guidance."""
    spec = SamplingSpec(scheduler=scheduler, num_inference_steps=10)
    noise = draw_noise(range(3), (4, 2, 2))[0].double()
    plain = sample(toy_denoiser(3), sampler_of(spec, CONFIG), noise)
    assert torch.allclose(sample(guided(3, step=rule, alpha=0.0), sampler_of(spec, CONFIG), noise), plain)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_noise_levels_are_the_schedulers_own(scheduler):
    """A perfect denoiser must bring the schedulers exactly to x0: wrong (scale, sigma) would not."""
    spec = SamplingSpec(scheduler=scheduler, num_inference_steps=12)
    sampler, clean = sampler_of(spec, CONFIG), torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    class Perfect:
        def __call__(self, latents, step):
            eps = (latents - step.scale * clean) / step.sigma
            base = toy_denoiser(2)(latents, step)
            return type(base)(output=eps, conditional=eps, latents=latents, prediction="epsilon")

    final = sample(Perfect(), sampler, draw_noise([1, 2], (4, 2, 2))[0])
    tolerance = 0.05 if scheduler == "ddim" else 2e-3  # DDIM ends at the first training level, not at zero noise
    assert (final - clean).abs().max() < tolerance


def test_schedule():
    """Steps 5, 10, ..., 40 counted from 1, the last one left to the denoiser unless asked for."""
    spec = BoundaryGuidanceSpec(preset="adversarial")
    assert [at for at in range(1, 41) if spec.is_guided(at, 40)] == [5, 10, 15, 20, 25, 30, 35]
    assert BoundaryGuidanceSpec(preset="adversarial", skip_last=False).is_guided(40, 40)


def test_noise_belongs_to_the_seed():
    """One generator a sample: equal seeds give equal noise whoever stands beside; different seeds differ."""
    assert torch.equal(draw_noise([7, 8], (4, 8, 8))[0][1], draw_noise([8], (4, 8, 8))[0][0])
    assert not torch.equal(draw_noise([7], (4, 8, 8))[0], draw_noise([8], (4, 8, 8))[0])


def test_zero_snr_with_eps_prediction_is_refused():
    """Lin et al.: eps-prediction has no signal at zero SNR; it would sample NaN."""
    spec = SamplingSpec(scheduler="ddim", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="v-prediction"):
        sampler_of(spec, CONFIG)


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def toy_conformity(images, labels=LABELS):
    direction = torch.randn(12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.tanh(images.flatten(1).double() @ direction * 0.3)


def toy_raw_conformity(images, labels):
    """Of another direction than the cosine, so that a test can tell them apart."""
    direction = torch.randn(5, 12, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return (images.flatten(1).double() * direction[labels]).sum(1)


def toy_oracle(images):
    """Of weights of its own."""
    flat = images.flatten(1).double()
    weight = torch.randn(flat.shape[1], 5, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    return flat @ weight * 2


def risky(**options) -> GuidedDenoiser:
    kinds = {"conformity": toy_conformity, "raw_conformity": toy_raw_conformity, "oracle_logits": toy_oracle}
    return guide_to_risk(
        toy_denoiser(8, options.pop("prediction", "epsilon")),
        RiskyGuidanceSpec(**options),
        scene_of([(label,) for label in LABELS.tolist()], toy_logits, toy_decode, **kinds),
    )


def final_risk(wrapper: GuidedDenoiser, steps: int = 20) -> torch.Tensor:
    spec = SamplingSpec(scheduler="lms", num_inference_steps=steps)
    latents = sample(wrapper, sampler_of(spec, CONFIG), draw_noise(range(8), (4, 2, 2))[0].double())
    return risk(toy_logits(toy_decode(latents).clamp(0, 1)), LABELS)


LEVELS = [(0.6, 0.8), (1.0, 2.0), (1.0, 0.3)]


def papers_objective(moved, row, step, fixed_eps, weight, conformity):
    """`S = risk + lambda * conformity` of one sample at the x0 of a noise that stays as it is: equations, no engine."""
    clean = (moved - step.sigma * fixed_eps) / step.scale
    image = (clean[:, :3] * 0.05 + 0.5).clamp(0, 1)
    logits = toy_logits(image)[0].tolist()
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(one - top) for one in logits))
    agreement = toy_raw_conformity if conformity == "raw" else toy_conformity
    return log_sum - logits[LABELS[row]] + weight * agreement(image, LABELS[row : row + 1]).item()


def slopes(objective, at):
    """The gradient of a function of latents [1, C, H, W], by central differences."""
    places = torch.eye(at.numel(), dtype=torch.float64).reshape(-1, *at.shape)
    ends = [(objective(at + 1e-5 * one), objective(at - 1e-5 * one)) for one in places]
    return torch.tensor([(high - low) / 2e-5 for high, low in ends], dtype=torch.float64).reshape(at.shape)


@pytest.mark.parametrize("conformity", ["cosine", "raw"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_papers_step_equals_the_equations(prediction, levels, conformity):
    """`eps - s sqrt(1 - abar) g / sqrt(|g|^2 + 1e-10)`, g from finite differences of the objective: the test differs
    where risk or conformity has the wrong sign, and where the share of noise is not that of a variance-exploding
    scheduler, whose sigma is above 1."""
    step, latents, weight = step_at(*levels), latents_of(8), 5.0
    wrapper = risky(step="paper", scale=5.0, conformity_weight=weight, conformity=conformity, prediction=prediction)
    base, moved = toy_denoiser(8, prediction)(latents, step), wrapper(latents, step)
    eps = predicted_eps(base.output, latents, step, prediction)
    noise_share = math.sqrt(1 - levels[0] ** 2 / (levels[0] ** 2 + levels[1] ** 2))
    for row in range(8):
        own = slice(row, row + 1)
        g = slopes(
            lambda at, row=row, own=own: papers_objective(at, row, step, eps[own], weight, conformity), latents[own]
        )
        expected = eps[own] - 5.0 * math.sqrt(16 / 16384) * noise_share * g / math.sqrt((g * g).sum() + 1e-10)
        stepped = predicted_eps(moved.output[own], latents[own], step, prediction)
        assert torch.allclose(stepped, expected, atol=1e-6)
    assert torch.equal(moved.latents, latents)


def test_the_papers_step_raises_risk():
    """More s, more risk; without s none."""
    plain, some, more = (final_risk(risky(step="paper", scale=scale)).mean() for scale in (0.0, 20.0, 80.0))
    assert plain < some < more


@pytest.mark.parametrize("target", [0.7, 1.5, 3.0])
def test_the_dial_is_reached_from_both_sides(target):
    """Samples of higher and of lower risk than the dial end within its tolerance; those that were there stay."""
    plain = final_risk(risky(step="paper", scale=0.0))
    assert (plain > target + 0.3).any() and (target < 1 or (plain < target - 0.3).any())
    reached = final_risk(risky(target_risk=target, tolerance=0.05, cap=0.5), steps=40)
    assert ((reached - target).abs() < 0.3).float().mean() >= 0.75


def test_an_arrived_sample_is_left_alone():
    """Within the tolerance there is no loss, no shift, and no complaint about a zero gradient."""
    assert distance_to_target(torch.tensor([1.45, 1.7]), 1.5, 0.1).tolist() == pytest.approx([0, 0.2])
    step, latents = step_at(), latents_of(8)
    for options in ({}, {"conformity_floor": -1.0}):
        wrapper = risky(target_risk=1.0, tolerance=10.0, **options)
        assert torch.equal(wrapper(latents, step).latents, latents)
        assert wrapper.health.zero.sum() == 0 and wrapper.health.guided_steps.sum() == 0


def test_the_floor_lifts_conformity():
    """With a floor no sample ends lower than without, and the median is lifted."""

    def agreement(**options):
        wrapper = risky(target_risk=3.0, cap=0.3, **options)
        spec = SamplingSpec(num_inference_steps=40)
        latents = sample(wrapper, sampler_of(spec, CONFIG), draw_noise(range(8), (4, 2, 2))[0].double())
        return toy_conformity(toy_decode(latents).clamp(0, 1))

    without, with_floor = agreement(), agreement(conformity_floor=0.5)
    assert with_floor.median() > without.median() and (with_floor > 0.4).float().mean() > 0.7


@pytest.mark.parametrize("floors", [{}, {"conformity_floor": 0.9}])
@pytest.mark.parametrize("gradient", ["unet", "detached"])
def test_the_floor_of_an_oracle_equals_its_equation(gradient, floors):
    """`max(0, log P - log p_y)` and its gradient by finite differences, of the label's own logit in a softmax; no
    gradient above the floor. The last criterion, whether there is another floor or not."""
    step, latents = step_at(), latents_of(8)
    wrapper = risky(oracle_floor=0.25, gradient=gradient, **floors)
    base = wrapper.predict(latents, step)
    losses, gradients = wrapper.gradients(base, step)
    assert len(losses) == 2 + len(floors)
    fixed = predicted_eps(base.output, latents, step, "epsilon")

    def hinge(moved, row):
        eps = wrapper._denoiser.conditional_output(moved, step, torch.tensor([row])) if gradient == "unet" else fixed
        clean = predicted_x0(eps[-1:] if gradient == "unet" else eps[row : row + 1], moved[row : row + 1], step,
                             "epsilon")  # fmt: skip
        logits = toy_oracle(toy_decode(clean).clamp(0, 1))[0].tolist()
        p = math.exp(logits[LABELS[row]]) / math.fsum(math.exp(one) for one in logits)
        return max(0.0, math.log(0.25) - math.log(p))

    values = [hinge(latents, row) for row in range(8)]
    assert losses[-1].tolist() == pytest.approx(values, abs=1e-12)
    assert 0 < sum(value > 0 for value in values) < 8
    for row in range(8):
        around = latents.clone()

        def of_own(own, row=row, around=around):
            around[row] = own[0]
            return hinge(around, row)

        expected = slopes(of_own, latents[row : row + 1])[0]
        assert torch.allclose(gradients[-1, row], expected, atol=1e-7)
        assert (values[row] > 0) == bool(expected.any())


@pytest.mark.parametrize("floors", [{}, {"conformity_floor": 0.0}])
def test_the_floor_lifts_what_the_oracle_says(floors):
    """Alone, and beside a floor of conformity: nearly all samples end at the floor or above, and at the target, while
    without it half do not."""

    def ends(**options):
        wrapper = risky(target_risk=2.0, cap=0.3, **options)
        spec = SamplingSpec(num_inference_steps=40)
        latents = sample(wrapper, sampler_of(spec, CONFIG), draw_noise(range(8), (4, 2, 2))[0].double())
        images = toy_decode(latents).clamp(0, 1)
        p = toy_oracle(images).softmax(1).gather(1, LABELS[:, None])[:, 0]
        return p, risk(toy_logits(images), LABELS)

    (without, _), (p, reached) = ends(**floors), ends(oracle_floor=0.6, **floors)
    assert (without > 0.55).sum() <= 4 and (p > 0.55).sum() >= 7
    assert ((reached - 2.0).abs() < 0.3).sum() >= 6


def slow_shift_above_floors(losses, gradients, latents, cap):
    """The Polyak steps of one sample, capped together: a floor's gradient without its parts against the floors before
    it, and the target's, the first, without those against any floor."""

    def dot(first, second):
        return math.fsum(one * other for one, other in zip(first, second, strict=True))

    followed = []
    for loss, gradient in [*zip(losses[1:], gradients[1:], strict=True), (losses[0], gradients[0])]:
        for above, other in followed:
            if above > 0 and (overlap := dot(gradient, other)) < 0:
                share = overlap / dot(other, other)
                gradient = [one - share * two for one, two in zip(gradient, other, strict=True)]
        followed.append((loss, gradient))
    shift = [0.0] * len(latents)
    for loss, gradient in followed:
        if loss > 0:
            shift = [at - loss / dot(gradient, gradient) * one for at, one in zip(shift, gradient, strict=True)]
    length = math.sqrt(dot(shift, shift))
    factor = min(1.0, cap * math.sqrt(dot(latents, latents)) / length) if length else 0.0
    return [factor * one for one in shift]


def test_steps_to_target_and_floor_equal_the_equations():
    """Gradients that conflict and that agree; above the floor; at the target but below the floor; both reached; a
    gradient that is not finite; a step that is capped."""
    torch.manual_seed(2)
    losses = torch.tensor([[0.4, 0.4, 0.4, 0.0, 0.0, 0.4, 90.0], [0.2, 0.2, 0.0, 0.2, 0.0, 0.2, 0.2]]).double()
    gradients, latents = torch.randn(2, 7, 4, 2, 2, dtype=torch.float64), torch.randn(7, 4, 2, 2, dtype=torch.float64)
    along = (gradients[0] * gradients[1]).sum((1, 2, 3))
    gradients[1] *= torch.tensor([-1.0, 1, 1, 1, 1, 1, 1])[:, None, None, None] * along.sign()[:, None, None, None]
    gradients[losses == 0] = 0
    gradients[1, 5, 0, 0, 0] = math.nan
    health = GradientHealth.of(7)
    moved = polyak_above_floors(0.3)(losses, gradients, prediction_at(latents), step_at(), health)
    for row in (0, 1, 2, 3, 6):
        own = [gradient[row].flatten().tolist() for gradient in gradients]
        expected = slow_shift_above_floors(losses[:, row].tolist(), own, latents[row].flatten().tolist(), 0.3)
        assert (moved.latents - latents)[row].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(moved.latents[4:6], latents[4:6])
    assert health.guided_steps.tolist() == [1, 1, 1, 1, 0, 0, 1]
    assert health.zero.sum() == 0 and health.nonfinite.tolist() == [0, 0, 0, 0, 0, 1, 0]


def test_steps_above_two_floors_equal_the_equations():
    """Each of the eight ways in which three gradients of a sample conflict or agree, with both floors, with either of
    them reached, and with the target reached; the second floor's gradient is not finite in the last sample."""
    torch.manual_seed(4)
    gradients = torch.randn(3, 100, 4, 2, 2, dtype=torch.float64)
    latents = torch.randn(100, 4, 2, 2, dtype=torch.float64)
    losses = torch.rand(3, 100, dtype=torch.float64) + 0.1
    losses[1, 60:75], losses[2, 70:90], losses[0, 85:95] = 0, 0, 0
    along = [(gradients[one] * gradients[other]).sum((1, 2, 3))[:60] > 0 for one, other in ((0, 1), (0, 2), (1, 2))]
    assert len(set(zip(*(signs.tolist() for signs in along), strict=True))) == 8
    gradients[2, 99, 0, 0, 0] = math.nan
    health = GradientHealth.of(100)
    moved = polyak_above_floors(0.8)(losses, gradients, prediction_at(latents), step_at(), health)
    for row in range(99):
        own = [gradient[row].flatten().tolist() for gradient in gradients]
        expected = slow_shift_above_floors(losses[:, row].tolist(), own, latents[row].flatten().tolist(), 0.8)
        assert (moved.latents - latents)[row].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.equal(moved.latents[99], latents[99])
    assert health.nonfinite.tolist() == [0] * 99 + [1]


def test_what_is_followed_works_against_no_floor():
    """To first order a step that is not capped lowers the first floor's distance as if there were nothing else, or
    more; without the order of the floors the second would take from it."""
    torch.manual_seed(5)
    gradients = torch.randn(3, 200, 4, 2, 2, dtype=torch.float64)
    latents = torch.randn(200, 4, 2, 2, dtype=torch.float64)
    losses = torch.rand(3, 200, dtype=torch.float64) + 0.1
    update = polyak_above_floors(1e9)
    shift = update(losses, gradients, prediction_at(latents), step_at(), GradientHealth.of(200)).latents - latents
    gained = -(shift * gradients[1]).flatten(1).sum(1)
    assert (gained >= losses[1] - 1e-9).all() and (gained > losses[1] + 0.1).any()


def test_the_step_to_the_target_equals_the_equation():
    """Short of its cap, capped, and arrived."""
    torch.manual_seed(3)
    losses, gradients = torch.tensor([[0.4, 90.0, 0.0]]).double(), torch.randn(1, 3, 4, 2, 2, dtype=torch.float64)
    latents, health = torch.randn(3, 4, 2, 2, dtype=torch.float64), GradientHealth.of(3)
    moved = polyak_above_floors(0.3)(losses, gradients, prediction_at(latents), step_at(), health)
    for row in range(3):
        own = [gradients[0, row].flatten().tolist(), [0.0] * 16]
        expected = slow_shift_above_floors((losses[0, row].item(), 0.0), own, latents[row].flatten().tolist(), 0.3)
        assert (moved.latents - latents)[row].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert health.guided_steps.tolist() == [1, 1, 0]


def test_projection_never_works_against_what_it_protects():
    """Conflicting gradients lose exactly their conflicting part; agreeing ones are untouched; zero protects nothing."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 50, 4, 2, 2, dtype=torch.float64)
    second[7] = 0
    result = without_conflict(first, second)
    before, after = ((one * second).flatten(1).sum(1) for one in (first, result))
    assert (after > -1e-12).all() and (before < 0).any()
    assert torch.equal(result[before >= 0], first[before >= 0])
    assert (norms(result) <= norms(first) + 1e-12).all()


def test_cap_bounds_the_shift():
    """No shift is longer than its cap, shorter ones keep their length, and zero stays zero."""
    shift = torch.stack([torch.full((1, 2, 2), size) for size in (0.0, 0.1, 5.0)])
    assert norms(capped(shift, torch.full((3,), 1.0))).tolist() == pytest.approx([0, 0.2, 1.0])


def test_gradient_range_guides_the_last_steps_only():
    """The last quarter of 40 steps, less the very last; or every third of them, the last one included."""
    for preset, expected in (("adversarial", list(range(31, 40))), ("perceptible", [31, 34, 37, 40])):
        wrapper = risky(preset=preset, gradient_range=0.25)
        assert [index for index in range(1, 41) if wrapper._is_guided(step_at(index=index))] == expected


@pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"rescale_betas_zero_snr": True}])
def test_the_models_own_configuration_is_checked(config):
    """A model that predicts x0, or was saved with zero SNR, must not be read as something else."""
    with pytest.raises(ValueError, match=r"v.prediction"):
        sampler_of(SamplingSpec(scheduler="ddim"), CONFIG | config)
