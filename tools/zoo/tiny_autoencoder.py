"""The tiny autoencoder of the zoo: what the autoencoder does, for a third of its arithmetic.

Guidance differentiates the decoder at every guided step and can do so through this one (`models.guidance_decoder`); the
stored image comes from the full decoder. As in TAESD, it works on latents as the UNet has them, already scaled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import encode
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from training import Recipe, export, fit, pixels

from engine.data.images.digits import training_batch

BATCH_SIZE = 32
NUM_IMAGES = 6000
RECIPE = Recipe(
    num_steps=600, learning_rate=3e-3, warmup_steps=30, weight_decay=0.0, ema_decay=0.99, checkpoint_every=100
)
ENCODER_WEIGHT = 0.1
# Guidance decodes unfinished predictions: blends of two pictures' latents, and latents with noise of at most this size.
BLENDED_SHARE = 0.25
MAX_NOISE = 0.4


def build_tiny_autoencoder() -> AutoencoderTiny:
    """Three resolutions (8, 16, 32) as the full one; 24 channels on the way up, 8 on the way down, which few need."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(24, 24, 24),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


def train_tiny_autoencoder(autoencoder_folder: Path, *, seed: int, build_folder: Path, output: Path) -> None:
    """Distil the exported autoencoder: decoder to decoder on its latents, encoder to encoder; export to `output`."""
    teacher = AutoencoderKL.from_pretrained(autoencoder_folder).requires_grad_(False)
    scale = teacher.config["scaling_factor"]
    images = training_batch(NUM_IMAGES, rng=np.random.default_rng([seed, 3])).images
    latents = encode(teacher, images) * scale
    torch.manual_seed(seed)
    model = build_tiny_autoencoder()

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(NUM_IMAGES, size=BATCH_SIZE)
        exact = latents[torch.from_numpy(rows)]
        unfinished = spoiled(exact)
        with torch.no_grad():
            wanted = teacher.decode(unfinished / scale).sample
        decoded = model.decode(unfinished).sample
        of_decoder = F.l1_loss(decoded, wanted) + F.mse_loss(decoded, wanted)
        return of_decoder + ENCODER_WEIGHT * F.mse_loss(model.encode(pixels(images[rows])).latents, exact)

    fit("tiny-autoencoder", model, loss, RECIPE, seed=seed, folder=build_folder)
    export(model, output)


def spoiled(latents: Tensor) -> Tensor:
    """Latents [N, 4, 8, 8] as guidance meets them: a share of them blended with another's, all with noise."""
    count = len(latents)
    share = torch.rand(count) * (torch.rand(count) < BLENDED_SHARE)
    blended = torch.lerp(latents, latents.roll(1, 0), share[:, None, None, None])
    return blended + MAX_NOISE * torch.rand(count, 1, 1, 1) * torch.randn_like(latents)
