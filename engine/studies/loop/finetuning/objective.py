"""What a denoising network learns: the mean squared error of what it predicts at a random time of the diffusion.

Legend: B samples, C channels, h x w latent size, d entries of an image embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from engine.methods.sampling.denoiser import Condition
from engine.models.pipelines.base import EMBEDDINGS, ImageConditioning, Pipeline
from engine.studies.loop.finetuning.batches import STEP_STREAM

# Half of the image embeddings have as little noise as those that samples are conditioned on.
CLEAN_SHARE = 0.5
CLEAN_LEVELS = 0.02


class NoiseSchedule:
    """The noise that a pipeline's network was trained with, and what it predicts.

    Args:
        config: of the pipeline's scheduler, of any class; its training betas count.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self._scheduler = DDPMScheduler.from_config(config)
        self.prediction_type: str = self._scheduler.config.prediction_type
        self.num_timesteps: int = self._scheduler.config.num_train_timesteps

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [B, C, h, w] with noise of timesteps [B]."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict, [B, C, h, w]: eps, v (Salimans and Ho 2022), or the latents without noise.

        Raises:
            ValueError: no such prediction type.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            velocity: Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        if self.prediction_type == "sample":
            return latents
        raise ValueError(f"no objective for networks that predict {self.prediction_type}")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """Samples as the network is trained on them, on its device.

    Attributes:
        latents: [B, C, h, w], scaled.
        prompts: B of them.
        embeds: [B, d] raw image embeddings, where the pipeline is conditioned on them.
    """

    latents: Tensor
    prompts: Sequence[str]
    embeds: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Draws:
    """The random numbers of a step, on the CPU.

    Attributes:
        noise: [B, C, h, w].
        timesteps: [B]; they cover the schedule evenly, in an order of their own.
        is_unconditional: [B], whether a sample is trained without its condition.
        noise_levels: [B], of the image embeddings.
        embedding_noise: [B, d].
    """

    noise: Tensor
    timesteps: Tensor
    is_unconditional: Tensor
    noise_levels: Tensor
    embedding_noise: Tensor

    @classmethod
    def of_step(
        cls,
        seed: int,
        step: int,
        latents: tuple[int, ...],
        *,
        num_timesteps: int,
        empty_share: float,
        num_levels: int = 1,
        embedding_dim: int = 0,
    ) -> Draws:
        """The numbers of a step: a function of the seed and the step alone, so that a resumed training has the same.

        Args:
            latents: shape of the latents of the step.
            num_levels, embedding_dim: of the image embeddings, where there are some.
        """
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        rows = latents[0]
        noise = torch.randn(latents, generator=generator)
        places = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
        # Rows have an order, curated ones first, which must not decide their timesteps.
        places = places[torch.randperm(rows, generator=generator)]
        is_unconditional = torch.rand(rows, generator=generator) < empty_share
        is_clean = torch.rand(rows, generator=generator) < CLEAN_SHARE
        levels = torch.rand(rows, generator=generator) * torch.where(is_clean, CLEAN_LEVELS, 1.0)
        return cls(
            noise=noise,
            timesteps=(places * num_timesteps).long().clamp(max=num_timesteps - 1),
            is_unconditional=is_unconditional,
            noise_levels=(levels * num_levels).long().clamp(max=num_levels - 1),
            embedding_noise=torch.randn(rows, embedding_dim, generator=generator),
        )


def step_seed(seed: int, step: int) -> int:
    """Seed of the random numbers of a step."""
    return int(np.random.SeedSequence([seed, STEP_STREAM, step]).generate_state(1, np.uint64)[0] >> 1)


def denoising_loss(pipeline: Pipeline, schedule: NoiseSchedule, batch: Batch, draws: Draws) -> Tensor:
    """Mean squared error of the network's prediction, in float32."""
    device = batch.latents.device
    noise, timesteps = draws.noise.to(device), draws.timesteps.to(device)
    noisy = schedule.noised(batch.latents, noise, timesteps)
    output = pipeline.predict(noisy, timesteps, _condition(pipeline, batch, draws))
    return mse_loss(output.float(), schedule.target(batch.latents, noise, timesteps))


@torch.no_grad()
def _condition(pipeline: Pipeline, batch: Batch, draws: Draws) -> Condition:
    """Of each sample its condition, or that of classifier-free guidance's unconditional half."""
    conditional, unconditional = _halves(pipeline, batch, draws)
    is_unconditional = draws.is_unconditional.to(batch.latents.device)

    def chosen(name: str) -> Tensor:
        kept = conditional[name]
        return torch.where(is_unconditional.view(-1, *[1] * (kept.ndim - 1)), unconditional[name], kept)

    return Condition({name: chosen(name) for name in conditional.tensors})


def _halves(pipeline: Pipeline, batch: Batch, draws: Draws) -> tuple[Condition, Condition]:
    if batch.embeds is None:
        return pipeline.conditions(batch.prompts, "", None)
    noise = draws.embedding_noise.to(batch.embeds.device)
    # Of one row each: a batch of the pipeline has one noise level.
    pairs = [
        pipeline.conditions(
            [prompt],
            "",
            ImageConditioning(
                embeds=batch.embeds[row : row + 1],
                noise={EMBEDDINGS: noise[row : row + 1]},
                noise_level=int(draws.noise_levels[row]),
            ),
        )
        for row, prompt in enumerate(batch.prompts)
    ]
    halves = [
        Condition({name: torch.cat([pair[half][name] for pair in pairs]) for name in pairs[0][half].tensors})
        for half in (0, 1)
    ]
    return halves[0], halves[1]
