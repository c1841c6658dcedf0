"""Training images as a pipeline's network sees them: latents, prompts, image embeddings; each encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from engine.driver.progress import Display
from engine.methods.heartbeat import beat
from engine.models.pipelines.base import Pipeline
from engine.models.pipelines.image_encoder import ImageEncoder
from engine.studies.loop.finetuning.batches import PromptedImage, Rows, TrainingImages
from engine.studies.loop.finetuning.objective import Batch

# Images of a call of an encoder.
ROWS = 16


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class EncodedImages:
    """N images that a training uses, on the CPU; float32 latents of 512 px take 65 kB each.

    Attributes:
        places: of the used rows of one kind.
        latents: [N, C, h, w], scaled.
        embeds: [N, d], where the pipeline is conditioned on image embeddings.
    """

    places: dict[int, int]
    latents: Tensor
    prompts: tuple[str, ...]
    embeds: Tensor | None

    def take(self, rows: Sequence[int]) -> tuple[Tensor, list[str], Tensor | None]:
        """Latents, prompts and embeddings of some rows."""
        chosen = [self.places[row] for row in rows]
        embeds = None if self.embeds is None else self.embeds[chosen]
        return self.latents[chosen], [self.prompts[place] for place in chosen], embeds


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrainingData:
    """Curated and real images, encoded."""

    curated: EncodedImages
    real: EncodedImages

    def batch(self, rows: Rows, device: str) -> Batch:
        """The samples of a step on a device, curated ones first."""
        (first, prompts, first_embeds), (second, more, second_embeds) = (
            self.curated.take(rows.curated),
            self.real.take(rows.real),
        )
        embeds = None
        if first_embeds is not None and second_embeds is not None:
            embeds = torch.cat([first_embeds, second_embeds]).to(device)
        return Batch(latents=torch.cat([first, second]).to(device), prompts=[*prompts, *more], embeds=embeds)


def encode_training(
    pipeline: Pipeline,
    encoder: ImageEncoder | None,
    images: TrainingImages,
    batches: Sequence[Rows],
    display: Display,
) -> TrainingData:
    """Encode the images that the batches use.

    Args:
        encoder: of image embeddings, where the pipeline is conditioned on them.

    Raises:
        JobError: a prompt is too long for the text encoder.
    """
    curated = sorted({row for rows in batches for row in rows.curated})
    real = sorted({row for rows in batches for row in rows.real})
    progress = _Progress(display, len(curated) + len(real))
    return TrainingData(
        curated=_encoded(pipeline, encoder, images.curated, curated, progress),
        real=_encoded(pipeline, encoder, images.real, real, progress),
    )


@torch.no_grad()
def _encoded(
    pipeline: Pipeline,
    encoder: ImageEncoder | None,
    images: Sequence[PromptedImage],
    used: Sequence[int],
    progress: _Progress,
) -> EncodedImages:
    latents, embeds, prompts = [torch.empty(0, *pipeline.latent_shape)], list[Tensor](), list[str]()
    for start in range(0, len(used), ROWS):
        pairs = [images[row] for row in used[start : start + ROWS]]
        prompts += [prompt for _, prompt in pairs]
        pipeline.check_prompts(list(dict.fromkeys(prompt for _, prompt in pairs)))
        pixels = image_tensors([image for image, _ in pairs], pipeline.image_shape)
        latents.append(pipeline.encode_images(pixels.to(pipeline.hardware.device)).cpu())
        if encoder is not None:
            embeds.append(encoder.image_embeds([image.convert("RGB") for image, _ in pairs]))
        progress.advance(len(pairs))
    if encoder is not None and not embeds:
        embeds.append(torch.empty(0, pipeline.noise_shapes["embeddings"][0]))
    return EncodedImages(
        places={row: place for place, row in enumerate(used)},
        latents=torch.cat(latents),
        prompts=tuple(prompts),
        embeds=torch.cat(embeds) if embeds else None,
    )


def image_tensors(images: Sequence[PIL.Image.Image], shape: tuple[int, int, int]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of a pipeline's size; of others the middle, resized."""
    _, height, width = shape
    fitting = [
        PIL.ImageOps.fit(image.convert("RGB"), (width, height), PIL.Image.Resampling.LANCZOS) for image in images
    ]
    return torch.from_numpy(np.stack([np.asarray(image) for image in fitting])).permute(0, 3, 1, 2).float() / 255


class _Progress:
    def __init__(self, display: Display, total: int) -> None:
        self._display, self._total, self._done = display, total, 0

    def advance(self, count: int) -> None:
        self._done += count
        beat()
        self._display.advance(f"encoding {self._done}/{self._total} training images")
