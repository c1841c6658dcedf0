"""A tiny decoder for guidance alone: latents to images, differentiable, at a fraction of the autoencoder's cost."""

from __future__ import annotations

import torch

from engine.models.addresses import resolve
from engine.models.decoder_checks import check_decoder
from engine.models.decoding import Decoder
from engine.models.hardware import Hardware
from engine.models.loading import frozen, loading
from engine.models.pipelines.parts import load_part


class GuidanceDecoder(Decoder):
    """The decoder of an `AutoencoderTiny`: what guidance differentiates in place of the pipeline's own.

    It takes latents as the network has them (TAESD's convention: its own `scaling_factor` is 1), not divided by the
    pipeline's `scaling_factor`, unless its own is that of the pipeline.
    """

    @classmethod
    def load(cls, address: str, hardware: Hardware) -> GuidanceDecoder:
        """Load from `zoo:`, a folder or a hub id; safetensors only.

        Raises:
            JobError: it cannot be loaded, or is no `AutoencoderTiny`.
        """
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        folder = resolve(address)
        check_decoder(folder, address)
        layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
        with loading(address, "an AutoencoderTiny"):
            model = frozen(load_part(AutoencoderTiny, folder, torch_dtype=torch.float32), hardware.device)
        return cls(model.to(memory_format=layout), hardware)
