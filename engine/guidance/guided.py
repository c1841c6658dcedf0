"""A denoiser with guidance around it: at chosen steps the latents move against the gradient of a criterion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.guidance.rules import GradientHealth, Rule, safe_shift
from engine.sampling.denoiser import Denoiser, Prediction, Step, predicted_eps, predicted_x0

# Latents without signal (zero terminal SNR) have no x0 to differentiate at.
MIN_SIGNAL = 1e-3


class Criterion(Protocol):
    """A differentiable, non-negative objective."""

    def __call__(self, images: Tensor) -> Tensor:
        """Objective [B] of images [B, 3, H, W] in [0, 1]."""


class ConditionalDenoiser(Denoiser, Protocol):
    """A denoiser whose conditional half can be differentiated."""

    def conditional_output(self, latents: Tensor, step: Step) -> Tensor:
        """Output of the conditional half [B, C, H, W], differentiable in the latents."""


class GuidedDenoiser:
    """Wrap a denoiser so that guided steps descend a criterion.

    The x0 prediction of the conditional half is decoded and scored; the shift is added to the latents before the
    scheduler's step, with the eps of the unshifted latents (Gomes et al., section 3).

    Args:
        denoiser: the denoiser to wrap.
        criterion: objective of decoded images.
        decode: latents [B, C, H, W] to images [B, 3, H, W], unclamped, nominally in [0, 1].
        rule: step rule.
        is_guided: whether a step is guided.
        through_unet: differentiate through the UNet instead of at the detached prediction.
        num_samples: B.
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        *,
        criterion: Criterion,
        decode: Callable[[Tensor], Tensor],
        rule: Rule,
        is_guided: Callable[[Step], bool],
        through_unet: bool,
        num_samples: int,
    ) -> None:
        self._denoiser = denoiser
        self._criterion = criterion
        self._decode = decode
        self._rule = rule
        self._is_guided = is_guided
        self._through_unet = through_unet
        self.health = GradientHealth.of(num_samples)

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W], moved where the step is guided."""
        prediction = self._denoiser(latents, step)
        if not self._is_guided(step) or step.scale < MIN_SIGNAL:
            return prediction
        loss, gradient = self.gradient(prediction, step)
        return prediction.moved(safe_shift(self._rule, loss, gradient, latents, self.health), step)

    def gradient(self, prediction: Prediction, step: Step) -> tuple[Tensor, Tensor]:
        """Criterion [B] and its gradient in the latents [B, C, H, W], sample by sample."""
        with torch.enable_grad():
            latents = prediction.latents.detach().requires_grad_(True)
            clean = self._clean(latents, prediction, step)
            loss = self._criterion(self._decode(clean).clamp(0, 1))
            # The sum keeps every sample's gradient its own; a mean would scale it by the batch.
            (gradient,) = torch.autograd.grad(loss.sum(), latents)
        return loss.detach(), gradient

    def _clean(self, latents: Tensor, prediction: Prediction, step: Step) -> Tensor:
        if self._through_unet:
            output = self._denoiser.conditional_output(latents, step)
            return predicted_x0(output, latents, step, prediction.prediction)
        eps = predicted_eps(prediction.conditional, prediction.latents, step, prediction.prediction).detach()
        return predicted_x0(eps, latents, step, "epsilon")
