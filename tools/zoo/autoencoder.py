"""The autoencoder of the zoo: 32 x 32 x 3 pixels to 8 x 8 x 4 latents and back.

Pixel losses alone blur thin strokes, so the features that a small reader network computes from the reconstruction
are matched to those of the original. The reader serves this purpose only; it is neither the oracle nor shipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import Recipe, batches, edit_json, export, fit, pixels

from engine.data.images.digits import BACKGROUNDS, CLASS_NAMES, INKS, compose_split, training_batch

BATCH_SIZE = 64
RECIPE = Recipe(num_steps=800, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.995)
READER_RECIPE = Recipe(num_steps=300, learning_rate=3e-3)
_KL_WEIGHT = 1e-6
_FEATURE_WEIGHT = 0.25
_READING_WEIGHT = 0.02


class Reader(nn.Module):
    """A small convolutional network that reads class, ink and background; its feature maps compare images."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        shapes = [(3, width, 3, 1), (width, width, 3, 2), (width, 2 * width, 3, 1), (2 * width, 3 * width, 3, 2)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, kernel, stride, 1, bias=False), nn.BatchNorm2d(b), nn.GELU())
            for a, b, kernel, stride in shapes
        )
        sizes = {"label": len(CLASS_NAMES), "ink": len(INKS), "background": len(BACKGROUNDS)}
        self.heads = nn.ModuleDict({name: nn.Linear(3 * width * 17, size) for name, size in sizes.items()})

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps after every stage."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def read(self, last_map: Tensor) -> dict[str, Tensor]:
        """Logits of each head, from coarse and global averages of the last feature map."""
        coarse = F.adaptive_avg_pool2d(last_map, 4).flatten(1)
        pooled = torch.cat([coarse, last_map.mean(dim=(2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of each head."""
        return self.read(self.features(images)[-1])


def train_reader(name: str, recipe: Recipe, *, seed: int, build_folder: Path) -> Reader:
    """A reader of class, ink and background, trained on train composites; frozen."""
    torch.manual_seed(seed)
    reader = Reader()

    def loss(rng: np.random.Generator) -> Tensor:
        batch = training_batch(96, rng=rng)
        targets = {"label": batch.labels, "ink": batch.contexts.ink, "background": batch.contexts.background}
        logits = reader(pixels(batch.images))
        return torch.stack([F.cross_entropy(logits[k], torch.from_numpy(v)) for k, v in targets.items()]).sum()

    fit(name, reader, loss, recipe, seed=seed, folder=build_folder)
    return reader.requires_grad_(False)


def build_autoencoder() -> AutoencoderKL:
    """Three resolutions (32, 16, 8), one residual block each on the way down, two on the way up."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def train_autoencoder(*, seed: int, build_folder: Path, output: Path) -> None:
    """Train on endless composites, scale the latents to unit variance, export to `output`."""
    reader = train_reader("reader", READER_RECIPE, seed=seed, build_folder=build_folder)
    torch.manual_seed(seed)
    model = build_autoencoder()

    def loss(rng: np.random.Generator) -> Tensor:
        images = pixels(training_batch(BATCH_SIZE, rng=rng).images)
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.sample()).sample
        return reconstruction_loss(reader, images, decoded) + _KL_WEIGHT * posterior.kl().mean()

    fit("autoencoder", model, loss, RECIPE, seed=seed, folder=build_folder)
    export_autoencoder(model, output, seed=seed)


def export_autoencoder(model: AutoencoderKL, output: Path, *, seed: int) -> None:
    """Save with `scaling_factor` set to one over the standard deviation of the latents."""
    deviation = float(encode(model, compose_split("validation", 1500, seed=seed).images).std())
    export(model, output)
    edit_json(output / "config.json", scaling_factor=round(1 / deviation, 5))


def reconstruction_loss(reader: Reader, images: Tensor, decoded: Tensor) -> Tensor:
    """L1 plus squared error of pixels, plus differences of the reader's features and of its reading of the class."""
    with torch.no_grad():
        wanted = reader.features(images)
        wanted_reading = reader.read(wanted[-1])["label"].softmax(-1)
    found = reader.features(decoded)
    features = sum((F.l1_loss(a, b) / b.abs().mean() for a, b in zip(found, wanted, strict=True)), torch.zeros(()))
    reading = F.cross_entropy(reader.read(found[-1])["label"], wanted_reading)
    pixel_loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
    return pixel_loss + _FEATURE_WEIGHT * features + _READING_WEIGHT * reading


@torch.no_grad()
def encode(model: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Means of the latents of byte images, not scaled, [N, 4, 8, 8]."""
    means = [model.encode(pixels(images[part])).latent_dist.mean for part in batches(len(images), 250)]
    return torch.cat(means).contiguous()


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Byte images through the autoencoder and back to bytes."""
    latents = encode(model, images)
    decoded = torch.cat([model.decode(latents[part]).sample for part in batches(len(images), 250)])
    return to_bytes(decoded)


def to_bytes(images: Tensor) -> np.ndarray:
    """[N, 3, 32, 32] in -1..1 as [N, 32, 32, 3] bytes, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
