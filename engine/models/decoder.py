"""A tiny decoder for guidance alone: latents to images, differentiable, at a fraction of the autoencoder's cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.models.addresses import resolve
from engine.models.decoder_checks import check_decoder
from engine.models.hardware import Hardware
from engine.models.loading import frozen, loading
from engine.models.pipelines.parts import load_part


class GuidanceDecoder:
    """The decoder of an `AutoencoderTiny`, in float32: what guidance differentiates in place of the pipeline's own.

    It takes latents as the network has them (TAESD's convention: its own `scaling_factor` is 1), not divided by the
    pipeline's `scaling_factor`, unless its own is that of the pipeline.
    """

    def __init__(self, model: Any, hardware: Hardware) -> None:
        layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
        self._model = frozen(model, hardware.device).to(memory_format=layout)

    @classmethod
    def load(cls, address: str, hardware: Hardware) -> GuidanceDecoder:
        """Load from `zoo:`, a folder or a hub id; safetensors only.

        Raises:
            JobError: it cannot be loaded, or is no `AutoencoderTiny`.
        """
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        folder = resolve(address)
        check_decoder(folder, address)
        with loading(address, "an AutoencoderTiny"):
            return cls(load_part(AutoencoderTiny, folder, torch_dtype=torch.float32), hardware)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in [0, 1] and not clamped, of latents [B, C, h, w]; differentiable."""
        images: Tensor = self._model.decode(latents / self._model.config.scaling_factor).sample / 2 + 0.5
        return images
