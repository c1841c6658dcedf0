"""What a Stable unCLIP pipeline does to an image embedding before its UNet sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.models.configurations import read_config
from engine.models.loading import whole
from engine.models.weight_files import weights_variant


class EmbeddingNoiser:
    """Noise of an augmentation level on image embeddings, as diffusers' `noise_image_embeddings` has it.

    Args:
        mean: [1, d] of the embeddings that the pipeline was trained with.
        std: [1, d] of the same.
        scheduler: diffusers scheduler whose `add_noise` and levels are used.
    """

    def __init__(self, mean: Tensor, std: Tensor, scheduler: Any) -> None:
        self._mean, self._std = mean.float(), std.float()
        self._scheduler = scheduler

    @classmethod
    def load(cls, folder: Path, device: str) -> EmbeddingNoiser:
        """The normaliser and the noise schedule of a pipeline's folder, which `check_pipeline` lets through."""
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        config = read_config(folder / "image_noising_scheduler" / "scheduler_config.json")
        where = folder / "image_normalizer"
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        loaded = StableUnCLIPImageNormalizer.from_pretrained(where, variant=weights_variant(where), **options)
        normalizer = whole(loaded)
        mean, std = (one.detach().to(device) for one in (normalizer.mean, normalizer.std))
        return cls(mean, std, DDPMScheduler.from_config(config))

    @property
    def dim(self) -> int:
        """Entries d of an image embedding."""
        return self._mean.shape[1]

    @property
    def num_levels(self) -> int:
        """Noise levels: 0 to this, exclusive."""
        return int(self._scheduler.config.num_train_timesteps)

    def class_labels(self, embeds: Tensor, noise: Tensor, level: int) -> Tensor:
        """What the UNet is told: noised embeddings and sinusoids of the level, [B, 2 d].

        Also at level 0 a little noise is added, as the pipeline does.

        Args:
            embeds: [B, d], raw, of any precision; what is returned is float32.
            noise: [B, d], standard normal.
            level: noise level.
        """
        from diffusers.models.embeddings import get_timestep_embedding

        levels = torch.full((len(embeds),), level, device=embeds.device)
        noisy = self._scheduler.add_noise((embeds.float() - self._mean) / self._std, noise, levels)
        sinusoids = get_timestep_embedding(levels, self.dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy * self._std + self._mean, sinusoids], dim=1)
