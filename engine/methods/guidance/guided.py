"""A denoiser with guidance around it: at chosen steps the prediction moves against the gradients of some criteria."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from engine.methods.guidance.precision import pulled_back
from engine.methods.guidance.rules import GradientHealth, Update
from engine.methods.guidance.scene import Decoding, GuidanceScene
from engine.methods.guidance.slices import even_slices
from engine.methods.sampling.denoiser import Denoiser, Prediction, PredictionType, Step, predicted_eps, predicted_x0

# Latents without signal (zero terminal SNR) have no x0 to differentiate at.
MIN_SIGNAL = 1e-3

Source = Literal["conditional", "combined", "unet"]


class Criteria(Protocol):
    """K differentiable objectives to descend."""

    def __call__(self, images: Tensor, scene: GuidanceScene) -> Tensor:
        """Objectives [K, B] of images [B, 3, H, W] in [0, 1], which are the samples of the scene."""


class ConditionalDenoiser(Denoiser, Protocol):
    """A denoiser whose conditional half can be differentiated."""

    def attached(self, latents: Tensor, step: Step) -> Prediction:
        """As calling it, with a `conditional` that is differentiable in the latents, a leaf."""


class GuidedDenoiser:
    """Wrap a denoiser so that guided steps descend criteria of the predicted image.

    Args:
        denoiser: the denoiser to wrap.
        criteria: objectives of decoded images; called with the rows of a slice and their scene, for each target.
        scene: of all B samples; its decoding says how many rows are decoded and differentiated at a time.
        update: how the prediction moves.
        is_guided: whether a step is guided.
        source: which prediction of x0 is scored: the conditional half's or the combined one, both detached from the
            UNet, or the conditional half's through the UNet.
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        *,
        criteria: Criteria,
        scene: GuidanceScene,
        update: Update,
        is_guided: Callable[[Step], bool],
        source: Source,
    ) -> None:
        self._denoiser = denoiser
        self._criteria = criteria
        self._scene = scene
        self._update = update
        self._is_guided = is_guided
        self._source = source
        self.health = GradientHealth.of(scene.num_samples)

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W], moved where the step is guided."""
        if not self.guides(step):
            return self._denoiser(latents, step)
        prediction = self.predict(latents, step)
        return self.moved(*self.gradients(prediction, step), prediction, step)

    def guides(self, step: Step) -> bool:
        """Whether a step moves the prediction."""
        return self._is_guided(step) and step.signal >= MIN_SIGNAL

    def through(self, decoding: Decoding) -> Self:
        """The same with another decoding; what it counts is counted with this one's."""
        other = copy.copy(self)
        other._scene = dataclasses.replace(self._scene, decoding=decoding)
        return other

    def predict(self, latents: Tensor, step: Step) -> Prediction:
        """The prediction that `gradients` differentiates, not moved; with a graph where that goes through the UNet."""
        if self._source == "unet":
            return self._denoiser.attached(latents.detach().requires_grad_(True), step)
        return self._denoiser(latents, step)

    def moved(self, losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step) -> Prediction:
        """The prediction moved by what `gradients` gave for it."""
        return self._update(losses, gradients, prediction.detached(), step, self.health)

    def gradients(self, prediction: Prediction, step: Step) -> tuple[Tensor, Tensor]:
        """Criteria [K, B] and their gradients in the latents [K, B, C, H, W], sample by sample.

        Args:
            prediction: from `predict`, at the same step.
        """
        scored = self._scored(prediction, step).detach()
        slices = even_slices(self._scene.num_samples, self._scene.decoding.slice_rows)
        parts = [self._of_slice(prediction, scored, step, part) for part in slices]
        losses, direct, of_output = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        if self._source != "unet":
            return losses, direct
        through = [pulled_back(cotangent, prediction.conditional, prediction.latents) for cotangent in of_output]
        return losses, direct + torch.stack(through)

    def _of_slice(
        self, prediction: Prediction, scored: Tensor, step: Step, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Criteria [K, b] of some samples, their gradients in the latents and in what x0 is predicted from.

        One image serves all criteria; its graph ends with the slice.
        """
        kind: PredictionType = prediction.prediction if self._source == "unet" else "epsilon"
        scene = self._scene.rows(part)
        with torch.enable_grad():
            latents = prediction.latents[part].detach().requires_grad_(True)
            output = scored[part].requires_grad_(True)
            images = scene.decoding.decode(predicted_x0(output, latents, step, kind)).clamp(0, 1)
            losses = scene.over_targets(self._criteria, images)
            # Sums keep every sample's gradient its own; a mean would scale it by the batch.
            gradients = [
                torch.autograd.grad(loss.sum(), [latents, output], retain_graph=place + 1 < len(losses))
                for place, loss in enumerate(losses)
            ]
        of_latents, of_output = zip(*gradients, strict=True)
        return losses.detach(), torch.stack(of_latents), torch.stack(of_output)

    def _scored(self, prediction: Prediction, step: Step) -> Tensor:
        """What the scored x0 is predicted from: the network's output, or a noise that is held fixed."""
        if self._source == "unet":
            return prediction.conditional
        output = prediction.conditional if self._source == "conditional" else prediction.output
        return predicted_eps(output, prediction.latents, step, prediction.prediction)


class Guide(Protocol):
    """Wraps a denoiser in the guidance of a method: `guide` of a record of `engine.methods.registry`."""

    def __call__(self, denoiser: ConditionalDenoiser, spec: Any, scene: GuidanceScene) -> GuidedDenoiser:
        """Wrap a denoiser.

        Args:
            denoiser: the denoiser to guide.
            spec: the parameters, of the class that the record names.
            scene: of the samples of a batch.
        """
