"""A denoiser with guidance around it: at chosen steps the prediction moves against the gradients of some criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.methods.guidance.precision import pulled_back
from engine.methods.guidance.rules import GradientHealth, Update
from engine.methods.sampling.denoiser import Denoiser, Prediction, PredictionType, Step, predicted_eps, predicted_x0

# Latents without signal (zero terminal SNR) have no x0 to differentiate at.
MIN_SIGNAL = 1e-3

Source = Literal["conditional", "combined", "unet"]


class Criteria(Protocol):
    """K differentiable objectives to descend."""

    def __call__(self, images: Tensor) -> Tensor:
        """Objectives [K, B] of images [B, 3, H, W] in [0, 1]."""


class ConditionalDenoiser(Denoiser, Protocol):
    """A denoiser whose conditional half can be differentiated."""

    def attached(self, latents: Tensor, step: Step) -> Prediction:
        """As calling it, with a `conditional` that is differentiable in the latents, a leaf."""


class GuidedDenoiser:
    """Wrap a denoiser so that guided steps descend criteria of the predicted image.

    Args:
        denoiser: the denoiser to wrap.
        criteria: objectives of decoded images.
        decode: latents [B, C, H, W] to images [B, 3, H, W], unclamped, nominally in [0, 1].
        update: how the prediction moves.
        is_guided: whether a step is guided.
        source: which prediction of x0 is scored: the conditional half's or the combined one, both detached from the
            UNet, or the conditional half's through the UNet.
        num_samples: B.
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        *,
        criteria: Criteria,
        decode: Callable[[Tensor], Tensor],
        update: Update,
        is_guided: Callable[[Step], bool],
        source: Source,
        num_samples: int,
    ) -> None:
        self._denoiser = denoiser
        self._criteria = criteria
        self._decode = decode
        self._update = update
        self._is_guided = is_guided
        self._source = source
        self.health = GradientHealth.of(num_samples)

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W], moved where the step is guided."""
        if not self._is_guided(step) or step.signal < MIN_SIGNAL:
            return self._denoiser(latents, step)
        prediction = self.predict(latents, step)
        losses, gradients = self.gradients(prediction, step)
        return self._update(losses, gradients, prediction.detached(), step, self.health)

    def predict(self, latents: Tensor, step: Step) -> Prediction:
        """The prediction that `gradients` differentiates, not moved; with a graph where that goes through the UNet."""
        if self._source == "unet":
            return self._denoiser.attached(latents.detach().requires_grad_(True), step)
        return self._denoiser(latents, step)

    def gradients(self, prediction: Prediction, step: Step) -> tuple[Tensor, Tensor]:
        """Criteria [K, B] and their gradients in the latents [K, B, C, H, W], sample by sample.

        Args:
            prediction: from `predict`, at the same step.
        """
        with torch.enable_grad():
            latents = prediction.latents.detach().requires_grad_(True)
            output = self._scored(prediction, step).detach().requires_grad_(True)
            kind: PredictionType = prediction.prediction if self._source == "unet" else "epsilon"
            losses = self._criteria(self._decode(predicted_x0(output, latents, step, kind)).clamp(0, 1))
            # Sums keep every sample's gradient its own; a mean would scale it by the batch.
            gradients = [
                torch.autograd.grad(loss.sum(), [latents, output], retain_graph=place + 1 < len(losses))
                for place, loss in enumerate(losses)
            ]
        if self._source != "unet":
            return losses.detach(), torch.stack([of_latents for of_latents, _ in gradients])
        through = [pulled_back(of_output, prediction.conditional, prediction.latents) for _, of_output in gradients]
        direct = [of_latents for of_latents, _ in gradients]
        return losses.detach(), torch.stack(direct) + torch.stack(through)

    def _scored(self, prediction: Prediction, step: Step) -> Tensor:
        """What the scored x0 is predicted from: the network's output, or a noise that is held fixed."""
        if self._source == "unet":
            return prediction.conditional
        output = prediction.conditional if self._source == "conditional" else prediction.output
        return predicted_eps(output, prediction.latents, step, prediction.prediction)
