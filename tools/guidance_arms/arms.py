"""Arms of guidance: the engine's presets, and variants of preset `perceptible` that change one thing.

Legend: B samples, K criteria, C channels, H x W size, n classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import Update, norms, per_sample
from engine.methods.guidance.scene import GuidanceScene
from engine.methods.parameters import Ensemble
from engine.methods.registry import method_of
from engine.methods.risky.guide import polyak_above_floors
from engine.methods.sampling.denoiser import Denoiser, Prediction, Step, predicted_eps
from engine.methods.sampling.schedulers import Sampler, SchedulerAdapter
from engine.models.classifier import Classifier
from guidance_arms.sets import Arm, SampleSet


def prompt_only(_set: SampleSet, denoiser: ConditionalDenoiser, _scene: GuidanceScene, _sampler: Sampler) -> Denoiser:
    """Without guidance."""
    return denoiser


def guided(**parameters: Any) -> Arm:
    """The engine's guidance of the set's method, with parameters of a job."""
    return lambda a_set, denoiser, scene, _sampler: _guided(a_set, denoiser, scene, parameters)


def _guided(
    a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, parameters: Mapping[str, Any]
) -> GuidedDenoiser:
    method = method_of(a_set.method)
    return method.load_guide()(denoiser, method.load_spec().model_validate(dict(parameters)), scene)


def in_scene(change: Callable[[SampleSet, GuidanceScene], GuidanceScene], **parameters: Any) -> Arm:
    """The same in a scene that is changed: what guidance sees of an image."""
    return lambda a_set, denoiser, scene, _sampler: _guided(a_set, denoiser, change(a_set, scene), parameters)


def over_augmentations(num_copies: int, noise: float, a_set: SampleSet, scene: GuidanceScene) -> GuidanceScene:
    """Expectation over transformations: the mean criterion of an image and of shifted, blurred, noisy copies of it."""
    views = [partial(_augmented, number, noise) for number in range(1, num_copies)]
    logits = scene.logits
    further = tuple((lambda images, view=view: logits(view(images))) for view in views)
    return dataclasses.replace(scene, further_logits=further, ensemble="mean")


def _augmented(number: int, noise: float, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] shifted by up to a tenth, with noise, every other copy blurred; equal for equal numbers."""
    generator = torch.Generator().manual_seed(number)
    most = images.shape[-1] // 10 + 1
    down, right = (int(value) for value in torch.randint(-most, most + 1, (2,), generator=generator))
    padded = F.pad(images, (most,) * 4, mode="replicate").roll((down, right), (2, 3))
    images = padded[..., most:-most, most:-most]
    if number % 2:
        images = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    return (images + noise * torch.randn(images.shape[1:], generator=generator)).clamp(0, 1)


def with_further(part: str, ensemble: Ensemble, a_set: SampleSet, scene: GuidanceScene) -> GuidanceScene:
    """An ensemble of the target and another classifier of the zoo."""
    other: Classifier = a_set.zoo.readers[part]
    return dataclasses.replace(scene, further_logits=(other.logits,), ensemble=ensemble)


def updating(wrap: Callable[[Update], Update], **parameters: Any) -> Arm:
    """The engine's guidance with another update."""

    def arm(a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, _sampler: Sampler) -> Denoiser:
        found = _guided(a_set, denoiser, scene, parameters)
        found._update = wrap(found._update)
        return found

    return arm


def low_passed(sigma: float, update: Update) -> Update:
    """Gradients blurred by a Gaussian of `sigma` latent pixels."""
    places = torch.arange(-3, 4).float()
    line = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2

    def smoothed(losses: Tensor, gradients: Tensor, *rest: Any) -> Prediction:
        channels = gradients.shape[2]
        padded = F.pad(gradients[0], (3,) * 4, mode="replicate")
        return update(losses, F.conv2d(padded, kernel.expand(channels, 1, 7, 7), groups=channels)[None], *rest)

    return smoothed


def averaged(share: float, update: Update) -> Update:
    """The direction is an exponential moving average of those of the guided steps."""
    mean: list[Tensor] = []

    def smoothed(losses: Tensor, gradients: Tensor, *rest: Any) -> Prediction:
        lengths = per_sample(norms(gradients[0]), gradients[0]).clamp_min(1e-12)
        direction = gradients[0] / lengths
        mean[:] = [share * mean[0] + (1 - share) * direction if mean else direction]
        turned = mean[0] / per_sample(norms(mean[0]), mean[0]).clamp_min(1e-12)
        return update(losses, (turned * lengths)[None], *rest)

    return smoothed


def within(first: float, last: float, **parameters: Any) -> Arm:
    """Guidance in a part of the steps alone, as shares of them."""

    def arm(a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, _sampler: Sampler) -> Denoiser:
        found = _guided(a_set, denoiser, scene, parameters)
        inner = found._is_guided
        found._is_guided = lambda step: inner(step) and first * step.total <= step.index <= last * step.total
        return found

    return arm


def time_travel(first: float, last: float, **parameters: Any) -> Arm:
    """Guided steps in a part of them are taken twice, with noise between (FreeDoM, Yu et al. 2023, algorithm 2)."""

    def arm(a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, sampler: Sampler) -> Denoiser:
        found = _guided(a_set, denoiser, scene, parameters)
        assert isinstance(sampler, SchedulerAdapter)
        scheduler = sampler._scheduler
        generator = torch.Generator().manual_seed(a_set.first_seed)

        def twice(latents: Tensor, step: Step) -> Prediction:
            prediction = found(latents, step)
            if not found.guides(step) or not first * step.total <= step.index <= last * step.total:
                return prediction
            with torch.no_grad():
                after = sampler.advance(prediction, step)
            # The scheduler forgets the step.
            scheduler.derivatives.pop()
            scheduler._step_index -= 1
            lower = float(scheduler.sigmas[step.index])
            noise = torch.randn(after.shape, generator=generator)
            return found(after + (step.sigma**2 - lower**2) ** 0.5 * noise, step)

        return twice

    return arm


class ScoreDifferences(GuidedDenoiser):
    """Gradients are projected on what the network itself predicts otherwise for one class than for another."""

    def of_set(self, a_set: SampleSet) -> ScoreDifferences:
        """Note the classes' prompts."""
        self._own, self._prompts = a_set.zoo.pipeline, a_set.names
        return self

    def moved(self, losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step) -> Prediction:
        """The prediction moved along the projected gradients."""
        latents = prediction.latents.detach()
        with torch.no_grad():
            outputs = [
                self._own.predict(step.network_input(latents), step.timestep, self._own.encode([name] * len(latents)))
                for name in self._prompts
            ]
            noises = [predicted_eps(one.float(), latents, step, prediction.prediction) for one in outputs]
        mean = torch.stack(noises).mean(0)
        basis, _ = torch.linalg.qr(torch.stack([(one - mean).flatten(1) for one in noises[:-1]], dim=2))
        flat = gradients[0].flatten(1)[:, :, None]
        projected = (basis @ (basis.transpose(1, 2) @ flat))[:, :, 0].reshape(gradients[0].shape)
        return super().moved(losses, projected[None], prediction, step)


def along_score_differences(**parameters: Any) -> Arm:
    """Guidance along differences of class-conditional scores alone; of joint prompts."""

    def arm(a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, _sampler: Sampler) -> Denoiser:
        found = _guided(a_set, denoiser, scene, parameters)
        found.__class__ = ScoreDifferences
        assert isinstance(found, ScoreDifferences)
        return found.of_set(a_set)

    return arm


def with_discriminator(floor: float, **parameters: Any) -> Arm:
    """A realism discriminator as a further criterion: a logit below the floor is lifted, and gives way to nothing.

    It is a logistic regression on CLIP's embeddings of real images and of samples of the prompts alone.
    """
    fitted: dict[str, tuple[Tensor, Tensor]] = {}

    def arm(a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, _sampler: Sampler) -> Denoiser:
        if a_set.title not in fitted:
            fitted[a_set.title] = _discriminator(a_set)
        weight, bias = fitted[a_set.title]
        found = _guided(a_set, denoiser, scene, parameters)
        inner = found._criteria

        def criteria(images: Tensor, scene: GuidanceScene) -> Tensor:
            realism = F.normalize(a_set.zoo.clip.embeds_of_tensor(images), dim=1) @ weight + bias
            return torch.cat([inner(images, scene), (floor - realism).clamp_min(0)[None]])

        found._criteria, found._update = criteria, polyak_above_floors(0.1)
        return found

    return arm


def _discriminator(a_set: SampleSet) -> tuple[Tensor, Tensor]:
    """Weight [d] and bias of a logit that is high for real images; samples are of other seeds than the set's."""
    from sklearn.linear_model import LogisticRegression

    others = dataclasses.replace(a_set, first_seed=a_set.first_seed + 10_000, strength=None)
    images, _ = others.made_by(prompt_only)
    real = [one.image for one in a_set.zoo.real_images(a_set.subset)][: 4 * a_set.count]
    with torch.no_grad():
        features = torch.cat([a_set.zoo.clip.embeds_of_tensor(images), a_set.zoo.clip.image_embeds(real)])
    is_real = [0] * len(images) + [1] * len(real)
    model = LogisticRegression(class_weight="balanced", max_iter=2000, C=10.0)
    model.fit(F.normalize(features, dim=1).numpy(), is_real)
    return torch.tensor(model.coef_[0], dtype=torch.float32), torch.tensor(float(model.intercept_[0]))


def the_other_gradient(
    a_set: SampleSet, denoiser: ConditionalDenoiser, scene: GuidanceScene, _sampler: Sampler
) -> Denoiser:
    """Of the conditional half's x0 where the preset takes the combined one's, and the reverse."""
    other = "unet" if a_set.method == "boundary" else "combined"
    return _guided(a_set, denoiser, scene, PERCEPTIBLE | {"gradient": other})


PERCEPTIBLE: dict[str, Any] = {"preset": "perceptible"}
ARMS: Mapping[str, Arm] = {
    "prompt": prompt_only,
    "adversarial": guided(preset="adversarial"),
    "perceptible": guided(**PERCEPTIBLE),
    "every 2nd step": guided(**PERCEPTIBLE, every=2),
    "every 4th step": guided(**PERCEPTIBLE, every=4),
    "tolerance 0": guided(**PERCEPTIBLE, tolerance=0.0),
    "tolerance 0.1": guided(**PERCEPTIBLE, tolerance=0.1),
    "without the last step": guided(**PERCEPTIBLE, skip_last=True),
    "gradient of the other x0": the_other_gradient,
    "detached, every 2nd step": guided(preset="adversarial", every=2),
    "augmentations (2)": in_scene(partial(over_augmentations, 2, 0.03), **PERCEPTIBLE),
    "augmentations (4)": in_scene(partial(over_augmentations, 4, 0.03), **PERCEPTIBLE),
    "ensemble with classifier-b, mean": in_scene(partial(with_further, "classifier-b", "mean"), **PERCEPTIBLE),
    "ensemble with classifier-b, worst": in_scene(partial(with_further, "classifier-b", "worst"), **PERCEPTIBLE),
    "low-passed": updating(partial(low_passed, 1.0), **PERCEPTIBLE),
    "average of gradients": updating(partial(averaged, 0.5), **PERCEPTIBLE),
    "first half of the steps": within(0.0, 0.5, **PERCEPTIBLE),
    "second half of the steps": within(0.5, 1.0, **PERCEPTIBLE),
    "time travel": time_travel(0.2, 0.6, **PERCEPTIBLE),
    "realism discriminator": with_discriminator(0.0, **PERCEPTIBLE),
    "score differences": along_score_differences(**PERCEPTIBLE),
}
# Arms that only make sense for joint prompts.
JOINT_ARMS = {"score differences"}
BOUNDARY_ARMS = {*JOINT_ARMS, "tolerance 0", "tolerance 0.1"}
