"""Guidance as it was published: the loops of the authors' public code, over the parts of a diffusers pipeline.

Written as plainly as that code, from the equations, and sharing nothing with the engine's sampling and guidance: it is
what the engine is timed against, and what it has to equal. The number and the shapes of the model calls are those of
the public code: KLDB guidance (github.com/inesgomes/diffusion-boundary) makes one sample at a time and differentiates
through the UNet; RiskyDiff (github.com/h-yu16/RiskyDiff) makes two samples a call and differentiates them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

# Entries of the latents that RiskyDiff's step size is for.
PAPER_ELEMENTS = 4 * 64 * 64
# Samples of a RiskyDiff call: `--ncol` of the public code, whose default is 2.
RISKY_COLUMNS = 2


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
        """Images [B, 3, H, W], nominally in [0, 1], of latents [B, C, h, w]."""
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

    def prompt_embeds(self, *prompts: str) -> tuple[Tensor, Tensor]:
        """Text embeddings of prompts, and of the empty one as many times."""
        with torch.no_grad():
            conditional, empty = self.pipeline.encode_prompt([*prompts], self.device, 1, True, [""] * len(prompts))
        return conditional, empty

    def unet(self, latents: Tensor, timestep: Tensor, text: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network's output, in the precision of the latents."""
        unet = self.pipeline.unet
        # `unet.dtype` walks through all modules, a twentieth of the loop at digits size: the authors never ask for it.
        dtype = unet.conv_in.weight.dtype
        labels = None if labels is None else labels.to(dtype)
        output = unet(latents.to(dtype), timestep, encoder_hidden_states=text.to(dtype), class_labels=labels)
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
    guidance_rescale: float = 0.0,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """Clean latents [1, C, h, w] by KLDB guidance (Gomes et al.): k-LMS, eps-prediction, a sample at a time.

    Args:
        logits: images [1, 3, H, W] in [0, 1] to logits, differentiable.
        step: `g / max|g|` (workshop version) or `g / |g| * |z|` (public code).
        alpha: size of the step.
        every: guide where `i % every == 0`, i counted from 1; the last step too, as published.
        through_unet: differentiate the conditional prediction through the UNet (published), or hold it fixed.
        guidance_rescale: of classifier-free guidance (Lin et al. 2024).
        trace: takes the latents after every step.
    """
    conditional, empty = naive.prompt_embeds(prompt)
    both = torch.cat([empty, conditional])
    scheduler = naive.pipeline.scheduler
    scheduler.set_timesteps(num_steps, device=naive.device)
    z = naive.noise(seed, naive.latent_shape)[0] * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps, start=1):
        with torch.no_grad():
            doubled = scheduler.scale_model_input(torch.cat([z, z]), t)
            eps_empty, eps_text = naive.unet(doubled, t, both).chunk(2)
            eps = eps_empty + guidance_scale * (eps_text - eps_empty)
            if guidance_rescale:
                eps = guidance_rescale * eps * (eps_text.std() / eps.std()) + (1 - guidance_rescale) * eps
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
        if trace is not None:
            trace.append(z)
    return z


@torch.enable_grad()
def sample_risky(
    naive: Naive,
    logits: Logits,
    agreement: Callable[[Tensor, int], Tensor],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    labels: Sequence[int],
    embeddings: Sequence[Tensor],
    num_steps: int,
    guidance_scale: float,
    s: float,
    weight: float,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """Clean latents [B, C, h, w] by RiskyDiff (Yu et al.): Stable unCLIP, DDIM, v-prediction, guided at every step.

    The B samples of a call share the UNet's calls, with 2 B rows each; gradients are taken one sample after the other.

    Args:
        agreement: image [1, 3, H, W] in [0, 1] and the place of a sample to the inner product [1] with the text of its
            class, differentiable.
        embeddings: [d] each, raw, that condition the samples; noised at level 0 as diffusers does.
        s: size of the step.
        weight: lambda.
        trace: takes the latents after every step.
    """
    conditional, empty = naive.prompt_embeds(*prompts)
    text = torch.cat([empty, conditional])
    drawn = [naive.noise(seed, (len(embeddings[0]),), naive.latent_shape) for seed in seeds]
    embed_noise, z = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    given = torch.stack([*embeddings]).to(naive.device, naive.dtype)
    known = naive.pipeline.noise_image_embeddings(given, noise_level=0, noise=embed_noise)
    class_labels = torch.cat([torch.zeros_like(known), known])
    scheduler = naive.pipeline.scheduler
    scheduler.set_timesteps(num_steps, device=naive.device)
    for t in scheduler.timesteps:
        with torch.no_grad():
            v_empty, v_text = naive.unet(torch.cat([z, z]), t, text, class_labels).chunk(2)
            v = v_empty + guidance_scale * (v_text - v_empty)
        abar = scheduler.alphas_cumprod[t.cpu()].to(naive.device, naive.dtype)
        eps = abar.sqrt() * v + (1 - abar).sqrt() * z
        directions = []
        for row, label in enumerate(labels):
            z_ = z[row : row + 1].detach().requires_grad_(True)
            x0 = (z_ - (1 - abar).sqrt() * eps[row : row + 1]) / abar.sqrt()
            image = naive.decode(x0).clamp(0, 1)
            risk = -torch.log_softmax(logits(image), dim=-1)[0, label]
            score = risk + weight * agreement(image, row)[0]
            g = torch.autograd.grad(score, z_)[0]
            directions.append(g / torch.sqrt((g**2).sum() + 1e-10))
        v = v - s * (1 - abar).sqrt() / abar.sqrt() * torch.cat(directions)
        z = scheduler.step(v, t, z, eta=0.0).prev_sample.detach()
        if trace is not None:
            trace.append(z)
    return z
