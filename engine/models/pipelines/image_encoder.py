"""Image encoders that are part of a pipeline: what makes the embeddings which it is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from engine.models.kernels import full_float32
from engine.models.loading import frozen, load_weights
from engine.models.preprocessing import Preprocessing


class ImageEncoder:
    """A CLIP image encoder with its preprocessing, in float32.

    Its embeddings are what the pipeline's network is conditioned on; class statistics are of this space.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing, device: str) -> None:
        self._model = frozen(model, device)
        self._preprocessing = preprocessing
        self._device = device

    @classmethod
    def load(cls, encoder: Path, processor: Path, device: str) -> ImageEncoder:
        """Load from the folders of a `CLIPVisionModelWithProjection` and of its image processor; safetensors only."""
        from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

        return cls(load_weights(CLIPVisionModelWithProjection, encoder), Preprocessing.load(processor), device)

    @torch.no_grad()
    def image_embeds(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Projected image embeddings [B, d] of 8-bit images, on the CPU, not normalised."""
        pixels = self._preprocessing.of_images(images).to(self._device)
        with full_float32(self._device):
            embeds: Tensor = self._model(pixel_values=pixels).image_embeds.float().cpu()
        return embeds
