"""The sampling loop: a denoiser and a sampler, independent of guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.methods.heartbeat import beat
from engine.methods.sampling.denoiser import Denoiser
from engine.methods.sampling.schedulers import Sampler


def sample(denoise: Denoiser, sampler: Sampler, noise: Tensor) -> Tensor:
    """Denoise standard normal noise [B, C, H, W] into clean latents of the same shape, float32."""
    latents = noise * sampler.init_noise_sigma
    for step in sampler.steps():
        prediction = denoise(latents, step)
        with torch.no_grad():
            latents = sampler.advance(prediction, step)
        beat()
    return latents
