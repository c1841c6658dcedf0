"""The sampling loop: a denoiser and a sampler, independent of guidance."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.heartbeat import beat
from engine.methods.sampling.denoiser import Denoiser, Step
from engine.methods.sampling.schedulers import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a batch begins in place of noise alone (SDEdit, Meng et al. 2022).

    Attributes:
        latents: [B, C, H, W] of real images, float32.
        strength: share of the steps that are taken, 0 to below 1.
    """

    latents: Tensor
    strength: float

    def first(self, num_rows: int) -> Start:
        """The start of the first samples of the batch."""
        return Start(latents=self.latents[:num_rows], strength=self.strength)

    def noised(self, noise: Tensor, step: Step) -> Tensor:
        """The latents [B, C, H, W] at the noise level of a step."""
        return step.scale * self.latents + step.sigma * noise


def sample(denoise: Denoiser, sampler: Sampler, noise: Tensor, start: Start | None = None) -> Tensor:
    """Denoise into clean latents [B, C, H, W], float32.

    Args:
        noise: standard normal, of the same shape.
        start: what is noised and denoised; without it the noise itself is.
    """
    if start is None:
        return _denoised(denoise, sampler, noise * sampler.init_noise_sigma, sampler.steps())
    steps = sampler.last_steps(start.strength)
    first = next(steps, None)
    if first is None:
        return start.latents
    return _denoised(denoise, sampler, start.noised(noise, first), itertools.chain([first], steps))


def _denoised(denoise: Denoiser, sampler: Sampler, latents: Tensor, steps: Iterable[Step]) -> Tensor:
    for step in steps:
        prediction = denoise(latents, step)
        with torch.no_grad():
            latents = sampler.advance(prediction, step)
        beat()
    return latents
