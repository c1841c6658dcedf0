"""Latent consistency models (Luo et al. 2023): Stable Diffusion distilled to a few steps, with the guidance inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine.models.configurations import read_config
from engine.models.pipelines.stable_diffusion import StableDiffusion


class LatentConsistency(StableDiffusion):
    """Pipelines of diffusers' class `LatentConsistencyModelPipeline`."""

    class_name = "LatentConsistencyModelPipeline"
    trained_part = ""
    is_corrected = False

    @classmethod
    def configuration_problems(cls, folder: Path) -> Iterator[str]:
        """As of Stable Diffusion, and a UNet or a scheduler that is not of such a model; a line each."""
        yield from super().configuration_problems(folder)
        if read_config(folder / "unet" / "config.json").get("time_cond_proj_dim") is None:
            yield (
                f"unet/config.json has no time_cond_proj_dim, the input for the guidance scale of a {cls.class_name};"
                " with StableDiffusionPipeline in model_index.json it runs without one, as with a fused LCM-LoRA"
            )
        if (name := cls.read_scheduler(folder).name) != "LCMScheduler":
            yield f"its scheduler is a {name}, and a {cls.class_name} has an LCMScheduler; write that"
