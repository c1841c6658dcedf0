"""The Stable unCLIP pipeline of the zoo: its UNet follows a caption and the CLIP embedding of an image.

Half of the captions name the class alone, so that the embedding decides the context wherever the text is silent. The
layout is that of Stable Diffusion 2.1 unCLIP: v-prediction, `class_labels` = noised image embedding and noise level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from caption_reader import train_text_encoder
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusion import BATCH_SIZE, NOISE_CONFIG, NUM_LATENTS, SNR_CAP, CaptionedLatents, build_unet, noised
from numpy.typing import NDArray
from tokenizer import build_tokenizer, digit_words, save_tokenizer
from torch import Tensor
from training import Recipe, batches, edit_json, export, fit, pixels, write_image_processor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

RECIPE = Recipe(
    num_steps=3000, learning_rate=1.2e-3, warmup_steps=150, weight_decay=0.01, ema_decay=0.998, num_replicas=2
)
WIDTHS = (64, 72)
SHARES = {"plain_share": 0.15, "shrunk_share": 0.2}
UNSAID_SHARE = 0.5
# Half of the embeddings are nearly clean, as sampling gives them; the others teach the UNet to trust the caption.
CLEAN_SHARE = 0.5
CLEAN_LEVELS = 20
DROPPED_SHARE = 0.1
V_CONFIG = {**NOISE_CONFIG, "prediction_type": "v_prediction"}
EMBEDDING_NOISE_CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


class EmbeddingNoise:
    """What the pipeline does to an image embedding before the UNet sees it, for a level of each row's own."""

    def __init__(self, normalizer: StableUnCLIPImageNormalizer) -> None:
        self.normalizer = normalizer
        self.scheduler = DDPMScheduler(**EMBEDDING_NOISE_CONFIG)

    def __call__(self, embeds: Tensor, levels: Tensor) -> Tensor:
        """Class labels [N, 2 d] of raw embeddings [N, d] at noise levels [N]."""
        scaled = self.normalizer.scale(embeds)
        noisy = self.normalizer.unscale(self.scheduler.add_noise(scaled, torch.randn_like(scaled), levels))
        sinusoids = get_timestep_embedding(levels, embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy, sinusoids], dim=1)


def load_image_encoder(clip_folder: Path) -> CLIPVisionModelWithProjection:
    """The image tower of the zoo's CLIP, frozen."""
    return CLIPVisionModelWithProjection.from_pretrained(clip_folder, dtype=torch.float32).requires_grad_(False).eval()


@torch.no_grad()
def embed_images(image_encoder: CLIPVisionModelWithProjection, images: NDArray[np.uint8]) -> Tensor:
    """Raw image embeddings [N, d] of byte images."""
    return torch.cat([image_encoder(pixels(images[part])).image_embeds for part in batches(len(images), 250)])


def train_unclip(clip_folder: Path, autoencoder_folder: Path, *, seed: int, build_folder: Path, output: Path) -> None:
    """Train the UNet on latents, captions and embeddings of train composites; export the whole pipeline."""
    image_encoder, tokenizer = load_image_encoder(clip_folder), build_tokenizer(digit_words())
    text_encoder = train_text_encoder(tokenizer, seed=seed, build_folder=build_folder)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder).requires_grad_(False)
    data = CaptionedLatents(
        autoencoder,
        tokenizer,
        count=NUM_LATENTS,
        stream=[seed, 3],
        unsaid_share=UNSAID_SHARE,
        embed=lambda images: embed_images(image_encoder, images),
        shares=SHARES,
    )
    normalizer = fit_normalizer(data.embeds)
    torch.manual_seed(seed)
    unet = build_unet(
        WIDTHS,
        norm_num_groups=8,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * data.embeds.shape[1],
    )
    train_unet(unet, text_encoder, data, EmbeddingNoise(normalizer), seed=seed, build_folder=build_folder)
    export_unclip(unet, text_encoder, normalizer, clip_folder, autoencoder_folder, output, words=digit_words())


def fit_normalizer(embeds: Tensor) -> StableUnCLIPImageNormalizer:
    """The normaliser with the mean and the deviation of embeddings [N, d]."""
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=embeds.shape[1]).requires_grad_(False)
    normalizer.mean.copy_(embeds.mean(0, keepdim=True))
    normalizer.std.copy_(embeds.std(0, keepdim=True))
    return normalizer


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    data: CaptionedLatents,
    noise_embeddings: EmbeddingNoise,
    *,
    seed: int,
    build_folder: Path,
) -> None:
    """Train in place to predict v of noised latents, from captions and noised embeddings."""
    noise_levels = DDPMScheduler(**V_CONFIG).alphas_cumprod

    def loss(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(data.latents), size=BATCH_SIZE))
        levels = rng.integers(np.where(rng.random(BATCH_SIZE) < CLEAN_SHARE, CLEAN_LEVELS, 1000))
        with torch.no_grad():
            states = text_encoder(data.tokens[rows]).last_hidden_state
            labels = noise_embeddings(data.embeds[rows], torch.from_numpy(levels))
            # As the pipeline's unconditional half has it: everything zero, the level too.
            labels[torch.from_numpy(rng.random(BATCH_SIZE) < DROPPED_SHARE)] = 0
        return velocity_loss(unet, data.latents[rows], states, labels, noise_levels, data.weights[rows])

    fit("unclip", unet, loss, RECIPE, seed=seed, folder=build_folder)


def velocity_loss(
    unet: UNet2DConditionModel,
    latents: Tensor,
    states: Tensor,
    labels: Tensor,
    noise_levels: Tensor,
    cell_weights: Tensor,
) -> Tensor:
    """Squared error of v = sqrt(abar) eps - sqrt(1 - abar) x0 with min-SNR weights (gamma 5).

    Arguments as in `diffusion.denoising_loss`; `labels` [N, 2 d].
    """
    noisy, noise, timesteps, alpha_bar = noised(latents, noise_levels)
    wanted = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    found = unet(noisy, timesteps, encoder_hidden_states=states, class_labels=labels, return_dict=False)[0]
    ratio = alpha_bar / (1 - alpha_bar)
    weights = ratio.clamp(max=SNR_CAP) / (ratio + 1) * cell_weights
    return (weights * F.mse_loss(found, wanted, reduction="none")).mean()


def export_unclip(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    normalizer: StableUnCLIPImageNormalizer,
    clip_folder: Path,
    autoencoder_folder: Path,
    output: Path,
    *,
    words: Sequence[str],
    noise_config: Mapping[str, Any] = V_CONFIG,
) -> None:
    """Write `output` as a Stable unCLIP pipeline."""
    image_encoder, autoencoder = load_image_encoder(clip_folder), AutoencoderKL.from_pretrained(autoencoder_folder)
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor.from_pretrained(clip_folder),
        image_encoder=image_encoder,
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(**EMBEDDING_NOISE_CONFIG),
        tokenizer=build_tokenizer(words),
        text_encoder=text_encoder,
        unet=unet,
        scheduler=DDIMScheduler(**noise_config, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        vae=autoencoder,
    )
    pipeline.save_pretrained(output)
    halved = {"vae": autoencoder, "text_encoder": text_encoder, "unet": unet, "image_encoder": image_encoder}
    for name, part in halved.items():
        export(part, output / name)
    save_tokenizer(output / "tokenizer", words)
    write_image_processor(output / "feature_extractor", "CLIPImageProcessor", do_center_crop=False, do_convert_rgb=True)
    edit_json(output / "image_normalizer" / "config.json", _name_or_path=None)
    # The name of the processor in every version of transformers, whichever backend made it.
    edit_json(output / "model_index.json", _name_or_path=None, feature_extractor=["transformers", "CLIPImageProcessor"])
