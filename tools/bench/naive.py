"""Guidance as it was published: one sample at a time, step by step, over the parts of a diffusers pipeline.

Written as plainly as the papers' code, from the papers' equations, and sharing nothing with the engine's sampling and
guidance: it is what the engine is timed against, and what it has to equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

# Entries of the latents that RiskyDiff's step size is for.
PAPER_ELEMENTS = 4 * 64 * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Naive:
    """A diffusers pipeline and what guidance asks of it.

    Attributes:
        pipeline: diffusers' own; its scheduler is used and its state reset for every sample.
        vae: the decoder, in float32 or better.
        dtype: of the latents between the steps.
        device: of everything.
    """

    pipeline: Any
    vae: Any
    device: str
    dtype: torch.dtype = torch.float32

    def decode(self, latents: Tensor) -> Tensor:
        """Image [1, 3, H, W], nominally in [0, 1], of latents [1, C, h, w]."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5

    def noise(self, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Standard normal noise of a seed, one tensor after the other."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(1, *shape, generator=generator).to(self.device, self.dtype) for shape in shapes]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a sample."""
        config = self.pipeline.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def prompt_embeds(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Text embeddings of a prompt and of the empty one."""
        with torch.no_grad():
            conditional, empty = self.pipeline.encode_prompt(prompt, self.device, 1, True, "")
        return conditional, empty

    def unet(self, latents: Tensor, timestep: Tensor, text: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output, in the precision of the latents."""
        unet = self.pipeline.unet
        labels = None if labels is None else labels.to(unet.dtype)
        output = unet(latents.to(unet.dtype), timestep, encoder_hidden_states=text.to(unet.dtype), class_labels=labels)
        return output.sample.to(self.dtype)


@torch.enable_grad()
def sample_boundary(
    naive: Naive,
    logits: Logits,
    *,
    prompt: str,
    seed: int,
    classes: tuple[int, ...],
    num_steps: int,
    guidance_scale: float,
    step: Literal["norm", "paper"],
    alpha: float,
    every: int,
    through_unet: bool,
) -> Tensor:
    """Clean latents [1, C, h, w] by KLDB guidance (Gomes et al.): k-LMS, eps-prediction.

    Args:
        logits: images [1, 3, H, W] in [0, 1] to logits, differentiable.
        step: `g / max|g|` (workshop version) or `g / |g| * |z|` (later code).
        alpha: size of the step.
        every: guide where `i % every == 0`, i counted from 1; the last step too, as published.
        through_unet: differentiate the conditional prediction through the UNet (published), or hold it fixed.
    """
    conditional, empty = naive.prompt_embeds(prompt)
    scheduler = naive.pipeline.scheduler
    scheduler.set_timesteps(num_steps, device=naive.device)
    z = naive.noise(seed, naive.latent_shape)[0] * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps, start=1):
        with torch.no_grad():
            doubled = scheduler.scale_model_input(torch.cat([z, z]), t)
            eps_empty, eps_text = naive.unet(doubled, t, torch.cat([empty, conditional])).chunk(2)
            eps = eps_empty + guidance_scale * (eps_text - eps_empty)
        moved = z
        if i % every == 0:
            sigma = scheduler.sigmas[i - 1].to(naive.device)
            z_ = z.detach().requires_grad_(True)
            with torch.set_grad_enabled(through_unet):
                eps_again = naive.unet(scheduler.scale_model_input(z_, t), t, conditional)
            x0 = z_ - sigma * eps_again
            log_p = torch.log_softmax(logits(naive.decode(x0).clamp(0, 1)), dim=-1)[0]
            loss = -math.log(len(classes)) - log_p[list(classes)].mean()
            g = torch.autograd.grad(loss, z_)[0]
            g = g / g.abs().max() if step == "paper" else g / g.norm() * z.norm()
            moved = z - alpha * g
        z = scheduler.step(eps, t, moved).prev_sample.detach()
    return z


@torch.enable_grad()
def sample_risky(
    naive: Naive,
    logits: Logits,
    agreement: Callable[[Tensor], Tensor],
    *,
    prompt: str,
    seed: int,
    label: int,
    embedding: Tensor,
    num_steps: int,
    guidance_scale: float,
    s: float,
    weight: float,
) -> Tensor:
    """Clean latents [1, C, h, w] by RiskyDiff (Yu et al.): Stable unCLIP, DDIM, v-prediction, guided at every step.

    Args:
        agreement: images [1, 3, H, W] in [0, 1] to the inner product [1] with the text of the class, differentiable.
        embedding: [d], raw, that conditions the sample; noised at level 0 as diffusers does.
        s: size of the step.
        weight: lambda.
    """
    conditional, empty = naive.prompt_embeds(prompt)
    embed_noise, z = naive.noise(seed, (len(embedding),), naive.latent_shape)
    given = embedding.to(naive.device, naive.dtype)[None]
    labels = naive.pipeline.noise_image_embeddings(given, noise_level=0, noise=embed_noise)
    scheduler = naive.pipeline.scheduler
    scheduler.set_timesteps(num_steps, device=naive.device)
    for t in scheduler.timesteps:
        with torch.no_grad():
            text, both = torch.cat([empty, conditional]), torch.cat([torch.zeros_like(labels), labels])
            v_empty, v_text = naive.unet(torch.cat([z, z]), t, text, both).chunk(2)
            v = v_empty + guidance_scale * (v_text - v_empty)
        abar = scheduler.alphas_cumprod[t.cpu()].to(naive.device, naive.dtype)
        eps = abar.sqrt() * v + (1 - abar).sqrt() * z
        z_ = z.detach().requires_grad_(True)
        x0 = (z_ - (1 - abar).sqrt() * eps) / abar.sqrt()
        image = naive.decode(x0).clamp(0, 1)
        risk = -torch.log_softmax(logits(image), dim=-1)[0, label]
        score = risk + weight * agreement(image)[0]
        g = torch.autograd.grad(score, z_)[0]
        g = g / torch.sqrt((g**2).sum() + 1e-10)
        v = v - s * (1 - abar).sqrt() / abar.sqrt() * g
        z = scheduler.step(v, t, z, eta=0.0).prev_sample.detach()
    return z
