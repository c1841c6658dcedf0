"""The autoencoder of the zoo `cifar10`: an encoder that is not trained, and a decoder that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import to_bytes
from cifar10_data import Photographs, augment, scaled, stacked, weighted_rows
from cifar10_readers import Teacher
from diffusers import AutoencoderKL
from linear_encoder import PatchComponents, write_encoder
from numpy.typing import NDArray
from torch import Tensor
from training import Recipe, batches, export, fit, pixels

LATENT_CHANNELS = 12
WHITENING = 0.25
BATCH_SIZE = 32
_FEATURE_WEIGHT = 0.15
# The decoder must forgive what the UNet leaves in the latents.
_LATENT_NOISE = 0.05
_NUM_PCA_IMAGES = 10_000


def fit_components(data: Photographs, whitening: float = WHITENING) -> PatchComponents:
    """The components that the encoder computes, of the first images."""
    return PatchComponents.fit(data.images[:_NUM_PCA_IMAGES], LATENT_CHANNELS, whitening)


def build_autoencoder(components: PatchComponents) -> AutoencoderKL:
    """Three resolutions (32, 16, 8), one residual block each on the way down, two on the way up; encoder done."""
    model = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    write_encoder(model, components)
    return model


def train_decoder(
    data: Photographs,
    teacher: Teacher,
    names: tuple[str, ...],
    recipes: tuple[Recipe, Recipe],
    *,
    seed: int,
    build_folder: Path,
    output: Path,
    device: str,
) -> None:
    """Decode latents that have a little noise: first by pixels alone, then by the features of the teacher, too.

    Args:
        names: classes that half of the images are of.
        recipes: of the two.
    """
    images, components = stacked(data.images, device), fit_components(data)
    torch.manual_seed(seed)
    model = build_autoencoder(components).to(device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)

    def decoded(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = weighted_rows(data.labels, names, BATCH_SIZE, rng)
        batch = augment(scaled(images[rows]), rng)
        with torch.no_grad():
            latents = model.encode(batch).latent_dist.mean
        return batch, model.decode(latents + _LATENT_NOISE * torch.randn_like(latents)).sample

    def by_pixels(rng: np.random.Generator) -> Tensor:
        wanted, found = decoded(rng)
        return F.l1_loss(found, wanted) + F.mse_loss(found, wanted)

    def by_features(rng: np.random.Generator) -> Tensor:
        wanted, found = decoded(rng)
        return F.l1_loss(found, wanted) + F.mse_loss(found, wanted) + _FEATURE_WEIGHT * teacher.distance(found, wanted)

    fit("decoder", model, by_pixels, recipes[0], seed=seed, folder=build_folder)
    fit("decoder-refined", model, by_features, recipes[1], seed=seed, folder=build_folder)
    export(model.cpu(), output)


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Byte images through the autoencoder and back to bytes."""
    decoded = [model(pixels(images[part])).sample for part in batches(len(images), 500)]
    return to_bytes(torch.cat(decoded))
