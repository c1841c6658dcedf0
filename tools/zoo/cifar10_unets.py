"""The UNets of the zoo `cifar10`: how they are built and how a step of their training is drawn.

`docs/zoo-training.md` says which of these settings were compared, at equal compute, before any was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from caption_reader import BATCH_SIZE as NUM_CAPTIONS
from caption_reader import train_caption_reader
from cifar10_autoencoder import LATENT_CHANNELS
from cifar10_captions import CaptionedPhotographs, caption_words, context_caption, joint_caption
from cifar10_contexts import ATTRIBUTES
from cifar10_data import CLASS_NAMES
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusion import NOISE_CONFIG, SNR_CAP, build_unet
from numpy.typing import NDArray
from tokenizer import MAX_LENGTH, build_tokenizer
from torch import Tensor
from training import Recipe, batches, fit, pixels
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from unclip import (
    CLEAN_LEVELS,
    CLEAN_SHARE,
    DROPPED_SHARE,
    EmbeddingNoise,
    export_unclip,
    fit_normalizer,
)

JOINT_SHARE = 0.1
EMPTY_SHARE = 0.1
_READER_JOINT_SHARE = 0.25
_ATTRIBUTE_SHARE = 0.4
NUM_TIMESTEPS = 1000
LOW_NOISE_TIMESTEPS = 250
"""Timesteps below this one are those of low noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetSettings:
    """Everything about a UNet but how long it is trained.

    Attributes:
        prediction: `epsilon` or `v_prediction`, of diffusers.
        layers: residual blocks on each resolution.
        low_noise_share: share of the timesteps drawn below `LOW_NOISE_TIMESTEPS`; 0.25 is even.
        snr_cap: gamma of the min-SNR weights (Hang et al. 2023).
        weighs_noise: adds one to the weights of the denoised image, as the plain loss of v has it: high noise, where an
            image is composed, counts as much as anything, and not next to nothing.
    """

    prediction: str = "epsilon"
    widths: tuple[int, int] = (64, 96)
    layers: int = 1
    batch_size: int = 64
    low_noise_share: float = 0.25
    snr_cap: float = SNR_CAP
    weighs_noise: bool = False

    @property
    def noise_config(self) -> dict[str, Any]:
        """Arguments of diffusers' schedulers."""
        return {**NOISE_CONFIG, "prediction_type": self.prediction}

    def build(self, **options: Any) -> UNet2DConditionModel:
        """A UNet with random weights, laid out for the convolutions of CPUs."""
        unet = build_unet(
            self.widths,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            layers_per_block=self.layers,
            **options,
        )
        return unet.to(memory_format=torch.channels_last)

    def draw_timesteps(self, rng: np.random.Generator, count: int) -> Tensor:
        """Stratified timesteps [count]."""
        even = (np.arange(count) + rng.random(count)) / count
        share, edge = self.low_noise_share, LOW_NOISE_TIMESTEPS / NUM_TIMESTEPS
        warped = np.interp(even, [0.0, share, 1.0], [0.0, edge, 1.0])
        return torch.from_numpy(np.minimum(warped * NUM_TIMESTEPS, NUM_TIMESTEPS - 1).astype(np.int64))


def for_training(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet with plain attention: at these sizes the fused kernel's backward in bf16 takes half of a step."""
    unet.set_attn_processor(AttnProcessor())
    return unet


def training_loss(
    unet: UNet2DConditionModel,
    settings: UnetSettings,
    latents: Tensor,
    states: Tensor,
    timesteps: Tensor,
    noise_levels: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """Squared error of what the UNet predicts, with min-SNR weights, in bf16.

    Args:
        latents: [N, 12, 8, 8].
        states: [N, L, d] of the captions.
        timesteps: [N].
        noise_levels: alpha-bar of every timestep.
        labels: [N, k], of unCLIP.
    """
    alpha_bar = noise_levels[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast(latents.device.type, torch.bfloat16):
        found = unet(noisy, timesteps, encoder_hidden_states=states, class_labels=labels, return_dict=False)[0]
    ratio = alpha_bar / (1 - alpha_bar)
    # Of the error of the denoised image; that of eps is larger by the ratio, that of v by the ratio and one.
    weights = ratio.clamp(max=settings.snr_cap) + settings.weighs_noise
    if settings.prediction == "v_prediction":
        wanted, weights = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents, weights / (ratio + 1)
    else:
        wanted, weights = noise, weights / ratio
    return (weights * F.mse_loss(found.float(), wanted, reduction="none")).mean()


def draw_captions(rng: np.random.Generator, names: Sequence[str]) -> tuple[list[str], dict[str, Tensor]]:
    """Random captions with any number of phrases, and what they say of each attribute (0: nothing)."""
    texts = []
    values = {name: np.zeros(NUM_CAPTIONS, np.int64) for name in ATTRIBUTES}
    for row in range(NUM_CAPTIONS):
        name = str(rng.choice(names))
        if rng.random() < _READER_JOINT_SHARE:
            texts.append(joint_caption(name, names, rng))
            continue
        named = {
            key: int(rng.integers(1, len(phrases))) if rng.random() < _ATTRIBUTE_SHARE else 0
            for key, phrases in ATTRIBUTES.items()
        }
        text = context_caption(name, [ATTRIBUTES[key][index] for key, index in named.items() if index], rng)
        texts.append(text)
        for key, index in named.items():
            values[key][row] = index if ATTRIBUTES[key][index] in text.split(", ")[1:] else 0
    return texts, {key: torch.from_numpy(indices) for key, indices in values.items()}


def train_text_encoder(names: Sequence[str], recipe: Recipe, *, seed: int, build_folder: Path) -> CLIPTextModel:
    """A text encoder that predicts which classes and contexts a caption names, frozen."""
    sizes = {name: len(values) for name, values in ATTRIBUTES.items()}
    draw, tokenizer = partial(draw_captions, names=names), build_tokenizer(caption_words())
    options: dict[str, Any] = {"seed": seed, "build_folder": build_folder, "recipe": recipe}
    return train_caption_reader(tokenizer, draw, CLASS_NAMES, sizes, **options)


class Prompts:
    """Text encoder states [N, L, d] of captions."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer | None = None) -> None:
        self._text_encoder, self._tokenizer = text_encoder.eval(), tokenizer or build_tokenizer(caption_words())

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Encode captions, on the text encoder's device."""
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return self._text_encoder(tokens.input_ids.to(self._text_encoder.device)).last_hidden_state


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Means of the latents of byte images, [N, 12, 8, 8]."""
    parts = batches(len(images), 500)
    return torch.cat([autoencoder.encode(pixels(images[part])).latent_dist.mean for part in parts])


@torch.no_grad()
def embed(clip: CLIPModel, images: NDArray[np.uint8]) -> Tensor:
    """Raw image embeddings [N, d] of byte images."""
    found = []
    for part in batches(len(images), 500):
        pooled = clip.vision_model(pixels(images[part]).to(clip.device)).pooler_output
        found.append(clip.visual_projection(pooled))
    return torch.cat(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnetPlan:
    """A UNet to train."""

    settings: UnetSettings
    recipe: Recipe
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often classes are drawn, those that are hard more often; 1 where none is given."""


def train_diffusion(
    data: CaptionedPhotographs,
    names: Sequence[str],
    plan: UnetPlan,
    text_encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    *,
    seed: int,
    build_folder: Path,
    device: str = "cpu",
) -> UNet2DConditionModel:
    """A UNet that denoises latents of captioned photographs of the classes `names`."""
    settings = plan.settings
    latents = encode(autoencoder, data.photographs.images).to(device)
    prompts = Prompts(text_encoder.to(device))
    noise_levels = DDPMScheduler(**settings.noise_config).alphas_cumprod.to(device)
    torch.manual_seed(seed)
    unet = for_training(settings.build().to(device))

    def loss(rng: np.random.Generator) -> Tensor:
        rows = data.draw(rng, settings.batch_size, plan.weights)
        texts = data.captions(rows, rng, joint=names, joint_share=JOINT_SHARE, empty_share=EMPTY_SHARE)
        timesteps = settings.draw_timesteps(rng, len(rows)).to(device)
        return training_loss(unet, settings, latents[rows], prompts(texts), timesteps, noise_levels)

    fit("diffusion", unet, loss, plan.recipe, seed=seed, folder=build_folder)
    return unet.cpu()


def train_unclip(
    data: CaptionedPhotographs,
    plan: UnetPlan,
    pipeline: Path,
    clip_folder: Path,
    *,
    seed: int,
    build_folder: Path,
    output: Path,
    device: str = "cpu",
) -> None:
    """Go on from the UNet of `pipeline`: a v-predicting one that is conditioned on the CLIP embedding of an image, too.

    Args:
        data: of the trained classes.
    """
    settings = plan.settings
    autoencoder = AutoencoderKL.from_pretrained(pipeline / "vae")
    text_encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder").requires_grad_(False)
    embeds = embed(CLIPModel.from_pretrained(clip_folder).requires_grad_(False).to(device), data.photographs.images)
    latents = encode(autoencoder, data.photographs.images).to(device)
    normalizer = fit_normalizer(embeds.cpu())
    noise_embeddings = EmbeddingNoise(normalizer.to(device))
    prompts = Prompts(text_encoder.to(device))
    noise_levels = DDPMScheduler(**settings.noise_config).alphas_cumprod.to(device)
    torch.manual_seed(seed)
    unet = settings.build(class_embed_type="projection", projection_class_embeddings_input_dim=2 * embeds.shape[1])
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict(), strict=False)
    unet = for_training(unet.to(device))

    def loss(rng: np.random.Generator) -> Tensor:
        count = settings.batch_size
        rows = data.draw(rng, count, plan.weights)
        texts = data.captions(rows, rng, empty_share=EMPTY_SHARE)
        levels = rng.integers(np.where(rng.random(count) < CLEAN_SHARE, CLEAN_LEVELS, 1000))
        with torch.no_grad():
            labels = noise_embeddings(embeds[rows], torch.from_numpy(levels).to(device))
            # As the pipeline's unconditional half has it: no caption, and everything zero, the level too.
            is_empty = np.array([not text for text in texts])
            labels[torch.from_numpy((rng.random(count) < DROPPED_SHARE) | (is_empty & (rng.random(count) < 0.8)))] = 0
        timesteps = settings.draw_timesteps(rng, count).to(device)
        return training_loss(unet, settings, latents[rows], prompts(texts), timesteps, noise_levels, labels)

    fit("unclip", unet, loss, plan.recipe, seed=seed, folder=build_folder)
    parts = (unet.cpu(), text_encoder.cpu(), normalizer.cpu())
    places, words = (clip_folder, pipeline / "vae", output), caption_words()
    export_unclip(*parts, *places, words=words, noise_config=settings.noise_config)
