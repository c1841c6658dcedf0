"""A denoiser with guidance around it: at chosen steps the prediction moves against the gradients of some criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.guidance.rules import GradientHealth, Update
from engine.sampling.denoiser import Denoiser, Prediction, Step, predicted_eps, predicted_x0

# Latents without signal (zero terminal SNR) have no x0 to differentiate at.
MIN_SIGNAL = 1e-3

Source = Literal["conditional", "combined", "unet"]


class Criteria(Protocol):
    """K differentiable objectives to descend."""

    def __call__(self, images: Tensor) -> Tensor:
        """Objectives [K, B] of images [B, 3, H, W] in [0, 1]."""


class ConditionalDenoiser(Denoiser, Protocol):
    """A denoiser whose conditional half can be differentiated."""

    def conditional_output(self, latents: Tensor, step: Step) -> Tensor:
        """Output of the conditional half [B, C, H, W], differentiable in the latents."""


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
        prediction = self._denoiser(latents, step)
        if not self._is_guided(step) or step.scale < MIN_SIGNAL:
            return prediction
        losses, gradients = self.gradients(prediction, step)
        return self._update(losses, gradients, prediction, step, self.health)

    def gradients(self, prediction: Prediction, step: Step) -> tuple[Tensor, Tensor]:
        """Criteria [K, B] and their gradients in the latents [K, B, C, H, W], sample by sample."""
        with torch.enable_grad():
            latents = prediction.latents.detach().requires_grad_(True)
            clean = self._clean(latents, prediction, step)
            losses = self._criteria(self._decode(clean).clamp(0, 1))
            # Sums keep every sample's gradient its own; a mean would scale it by the batch.
            gradients = [
                torch.autograd.grad(loss.sum(), latents, retain_graph=place + 1 < len(losses))[0]
                for place, loss in enumerate(losses)
            ]
        return losses.detach(), torch.stack(gradients)

    def _clean(self, latents: Tensor, prediction: Prediction, step: Step) -> Tensor:
        if self._source == "unet":
            output = self._denoiser.conditional_output(latents, step)
            return predicted_x0(output, latents, step, prediction.prediction)
        output = prediction.conditional if self._source == "conditional" else prediction.output
        eps = predicted_eps(output, prediction.latents, step, prediction.prediction).detach()
        return predicted_x0(eps, latents, step, "epsilon")
