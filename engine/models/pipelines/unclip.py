"""Stable unCLIP: Stable Diffusion 2.x whose UNet is conditioned on image embeddings next to the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.methods.config_values import is_integer, shown
from engine.models.configurations import read_config, reading_configuration
from engine.models.hardware import Hardware
from engine.models.pipelines.base import EMBEDDINGS, LATENTS, ImageConditioning
from engine.models.pipelines.checks import IMAGE_PROCESSORS, Classes, Options
from engine.models.pipelines.parts import FEATURE_EXTRACTOR, load_part
from engine.models.pipelines.registry import what_runs
from engine.models.pipelines.stable_diffusion import IMAGE_ENCODERS, StableDiffusion
from engine.models.processor_checks import check_processor

if TYPE_CHECKING:
    from torch import Tensor

    from engine.job.spec import ConditioningSpec
    from engine.methods.sampling.denoiser import Condition
    from engine.models.pipelines.image_encoder import ImageEncoder

LABELS = "class_labels"
_ENCODER, _NORMALIZER, _NOISING = "image_encoder", "image_normalizer", "image_noising_scheduler"
_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class StableUnclip(StableDiffusion):
    """Pipelines of diffusers' class `StableUnCLIPImg2ImgPipeline`."""

    class_name = "StableUnCLIPImg2ImgPipeline"
    embedding_parts = (_ENCODER, FEATURE_EXTRACTOR)
    is_corrected = False
    required: ClassVar[Classes] = {
        **StableDiffusion.required,
        _ENCODER: IMAGE_ENCODERS,
        FEATURE_EXTRACTOR: IMAGE_PROCESSORS,
        _NORMALIZER: ("StableUnCLIPImageNormalizer",),
        _NOISING: ("DDPMScheduler",),
    }
    optional: ClassVar[Classes] = {}
    unet_options: ClassVar[Options] = (
        *StableDiffusion.unet_options,
        ("time_cond_proj_dim", (None,), "it takes the guidance scale, which Stable unCLIP does not give"),
    )

    def __init__(self, *, noiser: EmbeddingNoiser, **parts: Any) -> None:
        super().__init__(**parts)
        self._noiser = noiser

    @classmethod
    def check(cls, folder: Path, address: str, *, checks_safety: bool) -> None:
        """As of Stable Diffusion, and the preprocessing of images; see `Pipeline.check`."""
        super().check(folder, address, checks_safety=checks_safety)
        with reading_configuration(address):
            check_processor(folder / FEATURE_EXTRACTOR, address)

    @classmethod
    def configuration_problems(cls, folder: Path) -> Iterator[str]:
        """As of Stable Diffusion, and what does not fit the image embeddings; a line each."""
        yield from super().configuration_problems(folder)
        yield from _embedding_problems(folder, read_config(folder / "unet" / "config.json"))

    @classmethod
    def class_embedding_problems(cls, unet: dict[str, Any]) -> Iterator[str]:
        """Class embeddings other than the projection that takes noised image embeddings."""
        if (embedding := unet.get("class_embed_type")) != "projection":
            yield f'unet/config.json has class_embed_type: {shown(embedding)}, not the "projection" of Stable unCLIP'

    @classmethod
    def conditioning_problems(cls, folder: Path, address: str, spec: ConditioningSpec | None) -> list[str]:
        """A request without image embeddings, or with a noise level beyond the schedule of the pipeline."""
        if spec is None:
            return [
                f": missing; '{address}' is a Stable unCLIP pipeline, whose every sample is conditioned on an image"
                " embedding: give an artefact of `riskforge prepare`, or images to vary"
            ]
        levels = cls.num_noise_levels(folder)
        if is_integer(levels) and spec.noise_level >= levels:
            return [f".noise_level: {spec.noise_level} is not below the {levels} of '{address}'"]
        return []

    @classmethod
    def input_shapes(cls, folder: Path, unet: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """As of Stable Diffusion, and the class labels; see `StableDiffusion.input_shapes`."""
        return super().input_shapes(folder, unet) | {LABELS: (unet["projection_class_embeddings_input_dim"],)}

    @classmethod
    def num_noise_levels(cls, folder: Path) -> int:
        """Levels of the noise on image embeddings; see `Pipeline.num_noise_levels`."""
        levels: int = read_config(folder / _NOISING / "scheduler_config.json").get("num_train_timesteps", 1000)
        return levels

    @classmethod
    def load_parts(cls, folder: Path, hardware: Hardware, *, checks_safety: bool) -> dict[str, Any]:
        """The arguments of the constructor, from a folder."""
        parts = super().load_parts(folder, hardware, checks_safety=checks_safety)
        return parts | {"noiser": EmbeddingNoiser.load(folder, hardware.device)}

    @classmethod
    def load_image_encoder(cls, folder: Path, device: str) -> ImageEncoder:
        """Load the pipeline's image encoder with its preprocessing; see `Pipeline.load_image_encoder`."""
        from engine.models.pipelines.image_encoder import ImageEncoder

        return ImageEncoder.load(folder / _ENCODER, folder / FEATURE_EXTRACTOR, device)

    @property
    def noise_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in diffusers' pipeline a generator draws the noise of the embedding before that of the latents."""
        return {EMBEDDINGS: (self._noiser.dim,), LATENTS: self.latent_shape}

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, images: ImageConditioning | None
    ) -> tuple[Condition, Condition]:
        """Prompts with noised image embeddings as class labels [B, 2 d], which are zeros without a prompt."""
        import torch

        from engine.methods.sampling.denoiser import Condition

        if images is None:
            raise ValueError(f"a {self.class_name} is conditioned on image embeddings")
        conditional, unconditional = super().conditions(prompts, negative_prompt, None)
        labels = self._noiser.class_labels(images.embeds, images.noise[EMBEDDINGS], images.noise_level)
        labels = labels.to(self._network.dtype)
        return (
            Condition({**conditional.tensors, LABELS: labels}),
            Condition({**unconditional.tensors, LABELS: torch.zeros_like(labels)}),
        )


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
        """The normaliser and the noise schedule of a pipeline's folder, which `StableUnclip.check` lets through."""
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        config = read_config(folder / _NOISING / "scheduler_config.json")
        normalizer = load_part(StableUnCLIPImageNormalizer, folder / _NORMALIZER)
        mean, std = (parameter.detach().to(device) for parameter in (normalizer.mean, normalizer.std))
        return cls(mean, std, DDPMScheduler.from_config(config))

    @property
    def dim(self) -> int:
        """Entries d of an image embedding."""
        return self._mean.shape[1]

    def class_labels(self, embeds: Tensor, noise: Tensor, level: int) -> Tensor:
        """The UNet's class labels: noised embeddings and sinusoids of the level, [B, 2 d].

        Also at level 0 a little noise is added, as the pipeline does.

        Args:
            embeds: [B, d], raw, of any precision; what is returned is float32.
            noise: [B, d], standard normal.
            level: noise level.
        """
        import torch
        from diffusers.models.embeddings import get_timestep_embedding

        levels = torch.full((len(embeds),), level, device=embeds.device)
        noisy = self._scheduler.add_noise((embeds.float() - self._mean) / self._std, noise, levels)
        sinusoids = get_timestep_embedding(levels, self.dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy * self._std + self._mean, sinusoids], dim=1)


def _embedding_problems(folder: Path, unet: dict[str, Any]) -> Iterator[str]:
    """Image encoder, normaliser, noise schedule and UNet that do not fit together."""
    width = read_config(folder / _NORMALIZER / "config.json").get("embedding_dim", 768)
    encoded = read_config(folder / _ENCODER / "config.json").get("projection_dim", 512)
    read = unet.get("projection_class_embeddings_input_dim")
    if encoded != width or not is_integer(width) or read != 2 * width:
        yield (
            f"its image embeddings have {shown(encoded)} entries, image_normalizer takes {shown(width)} and the UNet"
            f" {shown(read)}, not twice as many; its parts are not of one model"
        )
    config = read_config(folder / _NOISING / "scheduler_config.json")
    if config.get("_class_name", "DDPMScheduler") != "DDPMScheduler":
        yield f"its image_noising_scheduler is a {config['_class_name']}, not a DDPMScheduler; {what_runs()}"
    elif config.get("beta_schedule", "linear") not in _SCHEDULES:
        yield (
            f"its image_noising_scheduler has beta_schedule: {shown(config['beta_schedule'])}, not one of {_SCHEDULES}"
        )
