"""The diffusion pipeline of the zoo: a UNet on captioned latents, guided by a frozen text encoder.

The text encoder learns to read captions first (`caption_reader`). Trained together with the UNet, from random weights
or from a reader's, its states lost the class: colours lower the loss first, and what does not is noise to be removed.

Layout and prediction type are those of Stable Diffusion 1.x (eps-prediction, scaled-linear betas), so everything that
reads such a folder reads this one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import encode
from caption_reader import train_text_encoder
from diffusers import AutoencoderKL, DDPMScheduler, LMSDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from digits_data import captions, training_batch
from tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from torch import Tensor
from training import Recipe, edit_json, export, fit
from transformers import CLIPTextModel, CLIPTokenizer

BATCH_SIZE = 48  # of each replica
RECIPE = Recipe(
    num_steps=2000, learning_rate=1.2e-3, warmup_steps=150, weight_decay=0.01, ema_decay=0.998, num_replicas=2
)
NUM_LATENTS = 48_000
JOINT_SHARE = 0.12
EMPTY_SHARE = 0.10
_SNR_CAP = 5.0
NOISE_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def build_unet() -> UNet2DConditionModel:
    """Two resolutions (8, 4) with cross-attention at 8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class CaptionedLatents:
    """Latents of train composites, computed once, with the tokens of one caption each."""

    def __init__(self, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, *, count: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        latents, texts = [], []
        for _ in range(0, count, 2000):
            batch = training_batch(2000, rng=rng, plain_share=0.25)
            shares = {"joint_share": JOINT_SHARE, "empty_share": EMPTY_SHARE}
            texts += captions(batch.labels, batch.contexts, rng=rng, **shares)
            latents.append(encode(autoencoder, batch.images))
        self.latents = torch.cat(latents) * autoencoder.config["scaling_factor"]
        self.tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).input_ids


def train_diffusion(autoencoder_folder: Path, *, seed: int, build_folder: Path, output: Path) -> None:
    """Train text encoder, then UNet on the latents of the exported autoencoder; export the whole pipeline."""
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder).requires_grad_(False)
    tokenizer = build_tokenizer()
    text_encoder = train_text_encoder(tokenizer, seed=seed, build_folder=build_folder)
    data = CaptionedLatents(autoencoder, tokenizer, count=NUM_LATENTS, seed=seed)
    noise_levels = DDPMScheduler(**NOISE_CONFIG).alphas_cumprod
    torch.manual_seed(seed)
    unet = build_unet()

    def loss(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(data.latents), size=BATCH_SIZE))
        with torch.no_grad():
            states = text_encoder(data.tokens[rows]).last_hidden_state
        return denoising_loss(unet, data.latents[rows], states, noise_levels)

    fit("diffusion", unet, loss, RECIPE, seed=seed, folder=build_folder)
    export_pipeline(unet, text_encoder, autoencoder_folder, output)


def denoising_loss(unet: UNet2DConditionModel, latents: Tensor, states: Tensor, noise_levels: Tensor) -> Tensor:
    """Squared error of the predicted noise with min-SNR weights (Hang et al. 2023, gamma 5); timesteps stratified.

    `latents` [N, 4, 8, 8], scaled; `states` [N, L, 96] of the captions; `noise_levels` alpha-bar of every timestep.
    """
    count = len(latents)
    timesteps = ((torch.arange(count) + torch.rand(count)) / count * len(noise_levels)).long()
    alpha_bar = noise_levels[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    predicted = unet(noisy, timesteps, encoder_hidden_states=states, return_dict=False)[0]
    ratio = alpha_bar / (1 - alpha_bar)
    weights = ratio.clamp(max=_SNR_CAP) / ratio
    return (weights * F.mse_loss(predicted, noise, reduction="none")).mean()


def export_pipeline(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, autoencoder_folder: Path, output: Path
) -> None:
    """Write `output` as a Stable Diffusion pipeline; the autoencoder's folder may already be in it."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(autoencoder_folder),
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=LMSDiscreteScheduler(**NOISE_CONFIG, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    for name, part in (("vae", pipeline.vae), ("text_encoder", text_encoder), ("unet", unet)):
        export(part, output / name)
    save_tokenizer(output / "tokenizer")
    edit_json(output / "model_index.json", _name_or_path=None)
    # Read by DDIM when it is built from this config: latents are not bounded, and the first step is not noise-free.
    edit_json(output / "scheduler" / "scheduler_config.json", clip_sample=False, set_alpha_to_one=False)
