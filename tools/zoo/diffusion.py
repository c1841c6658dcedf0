"""The diffusion pipeline of the zoo: a UNet on captioned latents, guided by a frozen text encoder.

The text encoder learns to read captions first (`caption_reader`). Trained together with the UNet, from random weights
or from a reader's, its states lost the class: colours lower the loss first, and what does not is noise to be removed.

Layout and prediction type are those of Stable Diffusion 1.x (eps-prediction, scaled-linear betas), so everything that
reads such a folder reads this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import encode
from caption_reader import train_text_encoder
from diffusers import AutoencoderKL, DDPMScheduler, LMSDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from tokenizer import MAX_LENGTH, build_tokenizer, digit_words, save_tokenizer
from torch import Tensor
from training import Recipe, edit_json, export, fit
from transformers import CLIPTextModel, CLIPTokenizer

from engine.data.images.digits import IMAGE_SIZE, SIZES, Contexts, captions, digit_centres, training_batch

BATCH_SIZE = 48  # of each replica
RECIPE = Recipe(
    num_steps=2000, learning_rate=1.2e-3, warmup_steps=150, weight_decay=0.01, ema_decay=0.998, num_replicas=2
)
# Small digits fill a quarter of the latents and lower the loss last: a second training dwells on them.
REFINEMENT = Recipe(
    num_steps=1200, learning_rate=6e-4, warmup_steps=50, weight_decay=0.01, ema_decay=0.997, num_replicas=2
)
SHARES = {"plain_share": 0.25}
REFINED_SHARES = {"plain_share": 0.15, "shrunk_share": 0.35}
SMALL_DIGIT_WEIGHT = 3.0
NUM_LATENTS = 48_000
JOINT_SHARE = 0.12
EMPTY_SHARE = 0.10
LATENT_SIZE = 8
SNR_CAP = 5.0
NOISE_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def build_unet(widths: tuple[int, int] = (64, 96), **options: Any) -> UNet2DConditionModel:
    """Two resolutions (8, 4) with cross-attention at 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=widths,
        cross_attention_dim=96,
        attention_head_dim=4,
        **{
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            **options,
        },
    )


class CaptionedLatents:
    """Latents of train composites, computed once, with the tokens of one caption each.

    Attributes:
        latents: [N, 4, 8, 8], scaled.
        tokens: [N, L].
        weights: [N, 1, 8, 8], of the squared error, with mean 1 for each sample; higher on small digits.
        embeds: [N, d], raw image embeddings; d is 0 without an `embed`.

    Args:
        unsaid_share: share of the captions that name the class alone, whatever the context.
        embed: bytes [N, 32, 32, 3] to image embeddings.
        shares: of `training_batch`.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        *,
        count: int,
        stream: list[int],
        unsaid_share: float = 0.0,
        embed: Callable[[NDArray[np.uint8]], Tensor] = lambda images: torch.zeros(len(images), 0),
        shares: Mapping[str, float],
    ) -> None:
        rng = np.random.default_rng(stream)
        latents, texts, weights, embeds = [], [], [], []
        for _ in range(0, count, 2000):
            batch = training_batch(2000, rng=rng, **shares)
            said = unsaid(batch.contexts, unsaid_share, rng=rng) if unsaid_share > 0 else batch.contexts
            texts += captions(batch.labels, said, rng=rng, joint_share=JOINT_SHARE, empty_share=EMPTY_SHARE)
            latents.append(encode(autoencoder, batch.images))
            weights.append(small_digit_weights(batch.contexts))
            embeds.append(embed(batch.images))
        self.latents = torch.cat(latents) * autoencoder.config["scaling_factor"]
        self.weights = torch.cat(weights)
        self.embeds = torch.cat(embeds)
        self.tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids


def unsaid(contexts: Contexts, share: float, *, rng: np.random.Generator) -> Contexts:
    """The contexts as captions state them, when a `share` of the captions says nothing of them."""
    silent = rng.random(len(contexts)) < share
    return Contexts(**{name: np.where(silent, 0, getattr(contexts, name)) for name in Contexts.__slots__})


def small_digit_weights(contexts: Contexts) -> Tensor:
    """Weights [N, 1, 8, 8] with mean 1: a small digit's five by five latents count `SMALL_DIGIT_WEIGHT` times."""
    cell = IMAGE_SIZE / LATENT_SIZE
    middle = (np.arange(LATENT_SIZE) + 0.5) * cell
    near = np.abs(middle - digit_centres(contexts)[:, :, None]) <= 2.5 * cell  # [N, 2, 8]: rows, columns
    inside = near[:, 0, :, None] & near[:, 1, None, :] & (contexts.size == SIZES.index("small"))[:, None, None]
    weights = torch.from_numpy(np.where(inside, SMALL_DIGIT_WEIGHT, 1.0)).float()[:, None]
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def train_diffusion(autoencoder_folder: Path, *, seed: int, build_folder: Path, output: Path) -> None:
    """Train text encoder, then UNet on the latents of the exported autoencoder; export the whole pipeline."""
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder).requires_grad_(False)
    tokenizer = build_tokenizer(digit_words())
    text_encoder = train_text_encoder(tokenizer, seed=seed, build_folder=build_folder)
    torch.manual_seed(seed)
    unet = build_unet()
    data = CaptionedLatents(autoencoder, tokenizer, count=NUM_LATENTS, stream=[seed, 1], shares=SHARES)
    data.weights.fill_(1.0)
    train_unet("diffusion", unet, text_encoder, data, RECIPE, seed=seed, build_folder=build_folder)
    data = CaptionedLatents(autoencoder, tokenizer, count=NUM_LATENTS, stream=[seed, 2], shares=REFINED_SHARES)
    train_unet("diffusion-refined", unet, text_encoder, data, REFINEMENT, seed=seed, build_folder=build_folder)
    export_pipeline(unet, text_encoder, autoencoder_folder, output, words=digit_words())


def train_unet(
    name: str,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    data: CaptionedLatents,
    recipe: Recipe,
    *,
    seed: int,
    build_folder: Path,
) -> None:
    """Train a UNet in place to predict the noise in captioned latents."""
    noise_levels = DDPMScheduler(**NOISE_CONFIG).alphas_cumprod

    def loss(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(data.latents), size=BATCH_SIZE))
        with torch.no_grad():
            states = text_encoder(data.tokens[rows]).last_hidden_state
        return denoising_loss(unet, data.latents[rows], states, noise_levels, data.weights[rows])

    fit(name, unet, loss, recipe, seed=seed, folder=build_folder)


def denoising_loss(
    unet: UNet2DConditionModel, latents: Tensor, states: Tensor, noise_levels: Tensor, cell_weights: Tensor
) -> Tensor:
    """Squared error of the predicted noise with min-SNR weights (Hang et al. 2023, gamma 5); timesteps stratified.

    `latents` [N, 4, 8, 8], scaled; `states` [N, L, 96] of the captions; `noise_levels` alpha-bar of every timestep;
    `cell_weights` [N, 1, 8, 8].
    """
    noisy, noise, timesteps, alpha_bar = noised(latents, noise_levels)
    predicted = unet(noisy, timesteps, encoder_hidden_states=states, return_dict=False)[0]
    ratio = alpha_bar / (1 - alpha_bar)
    weights = ratio.clamp(max=SNR_CAP) / ratio * cell_weights
    return (weights * F.mse_loss(predicted, noise, reduction="none")).mean()


def noised(latents: Tensor, noise_levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents with noise at stratified timesteps; the noise; the timesteps [N]; their alpha-bar [N, 1, 1, 1]."""
    count, device = len(latents), latents.device
    stratum = torch.arange(count, device=device) + torch.rand(count, device=device)
    timesteps = (stratum / count * len(noise_levels)).long()
    alpha_bar = noise_levels[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise, noise, timesteps, alpha_bar


def export_pipeline(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    autoencoder_folder: Path,
    output: Path,
    *,
    words: Sequence[str],
    noise_config: Mapping[str, Any] = NOISE_CONFIG,
) -> None:
    """Write `output` as a Stable Diffusion pipeline; the autoencoder's folder may already be in it."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(autoencoder_folder),
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(words),
        unet=unet,
        scheduler=LMSDiscreteScheduler(**noise_config, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    for name, part in (("vae", pipeline.vae), ("text_encoder", text_encoder), ("unet", unet)):
        export(part, output / name)
    save_tokenizer(output / "tokenizer", words)
    edit_json(output / "model_index.json", _name_or_path=None)
    # Read by DDIM when it is built from this config: latents are not bounded, and the first step is not noise-free.
    edit_json(output / "scheduler" / "scheduler_config.json", clip_sample=False, set_alpha_to_one=False)
