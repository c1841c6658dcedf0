"""Denoisers: a UNet with classifier-free guidance behind one contract, whatever it predicts and whoever steps.

Legend: B samples, C channels, H x W latent size. At a step the latents are `z = scale * x0 + sigma * eps`: scale 1 for
the variance-exploding schedulers (LMS, Euler), `sqrt(abar)` and `sqrt(1 - abar)` for the variance-preserving ones
(DDIM, DPM-Solver++). All of methods' prediction types follow from these two numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.methods.scores import at_least_float32

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the sampler.

    Attributes:
        index: counted from 1.
        total: number of steps T.
        timestep: what the UNet is told.
        scale: factor of x0 in the latents.
        sigma: factor of eps in the latents.
        normalise_input: divide the latents by `sqrt(scale^2 + sigma^2)` before the UNet (variance-exploding).
    """

    index: int
    total: int
    timestep: Tensor
    scale: float
    sigma: float
    normalise_input: bool

    @property
    def is_last(self) -> bool:
        """Whether nothing is denoised after this step."""
        return self.index == self.total

    @property
    def signal(self) -> float:
        """Share of x0 in the latents, 0 to 1: `sqrt(abar)`, whoever steps."""
        return self.scale / math.hypot(self.scale, self.sigma)

    def unet_input(self, latents: Tensor) -> Tensor:
        """The latents as the UNet expects them."""
        return latents / math.hypot(self.scale, self.sigma) if self.normalise_input else latents


def predicted_x0(output: Tensor, latents: Tensor, step: Step, prediction: PredictionType) -> Tensor:
    """Clean latents x0 that a network output stands for, [B, C, H, W] (section 6 of the methods)."""
    if prediction == "epsilon":
        return (latents - step.sigma * output) / step.scale
    norm = math.hypot(step.scale, step.sigma)
    return (step.scale * latents / norm - step.sigma * output) / norm


def predicted_eps(output: Tensor, latents: Tensor, step: Step, prediction: PredictionType) -> Tensor:
    """Noise eps that a network output stands for, [B, C, H, W]."""
    if prediction == "epsilon":
        return output
    norm = math.hypot(step.scale, step.sigma)
    return (step.scale * output + step.sigma * latents / norm) / norm


def output_of_eps(eps: Tensor, latents: Tensor, step: Step, prediction: PredictionType) -> Tensor:
    """Network output that stands for a noise eps at the latents: the inverse of `predicted_eps`."""
    if prediction == "epsilon":
        return eps
    norm = math.hypot(step.scale, step.sigma)
    return (norm * eps - step.sigma * latents / norm) / step.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a denoiser says at a step; all tensors [B, C, H, W].

    Attributes:
        output: what the scheduler steps with (eps or v, with classifier-free guidance).
        conditional: the conditional half alone, without classifier-free guidance.
        latents: the latents to step from; guidance may have moved them.
        prediction: what `output` is.
    """

    output: Tensor
    conditional: Tensor
    latents: Tensor
    prediction: PredictionType

    def moved(self, shift: Tensor, step: Step) -> Prediction:
        """The prediction at `latents + shift`, with the eps of the latents before the shift."""
        return self._at(self.latents + shift, self._eps(step), step)

    def detached(self) -> Prediction:
        """The same without a graph, whose memory ends with it."""
        return dataclasses.replace(self, conditional=self.conditional.detach(), latents=self.latents.detach())

    def with_eps_moved(self, shift: Tensor, step: Step) -> Prediction:
        """The prediction of `eps + shift` at the same latents; x0 and the direction follow together."""
        return self._at(self.latents, self._eps(step) + shift, step)

    def _eps(self, step: Step) -> Tensor:
        return predicted_eps(self.output, self.latents, step, self.prediction)

    def _at(self, latents: Tensor, eps: Tensor, step: Step) -> Prediction:
        output = output_of_eps(eps, latents, step, self.prediction)
        return dataclasses.replace(self, latents=latents, output=output)


class Denoiser(Protocol):
    """Predicts the noise in latents [B, C, H, W] at a step. Guidance wraps one denoiser into another."""

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict without changing the latents' own storage."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What a UNet is told of a batch beside the timestep.

    Attributes:
        text: [B, tokens, width] text embeddings.
        labels: [B, k] class labels (Stable unCLIP: noised image embedding and noise level), or None.
    """

    text: Tensor
    labels: Tensor | None = None

    def above(self, other: Condition) -> Condition:
        """Both batches, this one first."""
        labels = None
        if self.labels is not None and other.labels is not None:
            labels = torch.cat([self.labels, other.labels])
        return Condition(torch.cat([self.text, other.text]), labels)


class ClassifierFreeDenoiser:
    """A UNet with classifier-free guidance, as in diffusers' Stable Diffusion and Stable unCLIP pipelines.

    Args:
        unet: `(latents, timestep, condition) -> output`, all [B, ...].
        conditional: of the prompts.
        unconditional: of the negative prompt.
        prediction: what the UNet predicts.
        guidance_scale: 1 uses the conditional half alone.
        guidance_rescale: share of the rescaled prediction (Lin et al. 2024, section 3.4).
    """

    def __init__(
        self,
        unet: Callable[[Tensor, Tensor, Condition], Tensor],
        *,
        conditional: Condition,
        unconditional: Condition,
        prediction: PredictionType,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> None:
        self._unet = unet
        self._conditional = conditional
        self._unconditional = unconditional
        self._both = unconditional.above(conditional)
        self.prediction: PredictionType = prediction
        self._scale = guidance_scale
        self._rescale = guidance_rescale

    @torch.no_grad()
    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W]."""
        if self._scale <= 1:
            output = conditional = self.conditional_output(latents, step)
        else:
            inputs = step.unet_input(torch.cat([latents, latents]))
            without, conditional = at_least_float32(self._unet(inputs, step.timestep, self._both)).chunk(2)
            output = self._combined(without, conditional)
        return Prediction(output=output, conditional=conditional, latents=latents, prediction=self.prediction)

    def attached(self, latents: Tensor, step: Step) -> Prediction:
        """The same prediction, its conditional half differentiable in the latents [B, C, H, W].

        The two halves are two calls of B rows in place of one of 2 B: a gradient costs no forward pass of its own.
        """
        with torch.enable_grad():
            conditional = self.conditional_output(latents, step)
        with torch.no_grad():
            output = conditional.detach()
            if self._scale > 1:
                without = self._unet(step.unet_input(latents), step.timestep, self._unconditional)
                output = self._combined(at_least_float32(without), output)
        return Prediction(output=output, conditional=conditional, latents=latents, prediction=self.prediction)

    def _combined(self, without: Tensor, conditional: Tensor) -> Tensor:
        """Classifier-free guidance from the unconditional and the conditional half."""
        output = without + self._scale * (conditional - without)
        return rescaled(output, conditional, self._rescale) if self._rescale > 0 else output

    def conditional_output(self, latents: Tensor, step: Step) -> Tensor:
        """Output of the conditional half alone, differentiable in the latents."""
        return at_least_float32(self._unet(step.unet_input(latents), step.timestep, self._conditional))


def rescaled(output: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Bring the spread of a guided output back to the conditional's (Lin et al. 2024, equations 15 and 16)."""
    dims = list(range(1, output.ndim))
    spread = conditional.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True)
    return share * output * spread + (1 - share) * output
