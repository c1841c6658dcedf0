"""The models of the zoo `cifar10`, at two sizes: minutes of a data-centre GPU, or hours of two CPU cores.

The autoencoder and the CLIP model learn from a ResNet-20 trained by others (features and soft labels); oracle and
judge learn from labels alone, so they agree with it only where the images do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import to_bytes
from caption_reader import BATCH_SIZE as NUM_CAPTIONS
from caption_reader import RECIPE as READER
from caption_reader import train_caption_reader
from cifar10_data import CLASS_NAMES, Photographs, augment, caption_words, random_captions, weighted_rows
from classifiers import fit_temperature
from clip_model import text_config
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusion import NOISE_CONFIG, build_unet, denoising_loss, export_pipeline
from linear_encoder import PatchComponents, write_encoder
from numpy.typing import NDArray
from residual_networks import ResidualNetwork
from tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from torch import Tensor, nn
from training import Recipe, batches, edit_json, export, fit, pixels, write_image_processor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from unclip import (
    CLEAN_LEVELS,
    CLEAN_SHARE,
    DROPPED_SHARE,
    V_CONFIG,
    EmbeddingNoise,
    export_unclip,
    fit_normalizer,
    velocity_loss,
)

LATENT_CHANNELS = 12
JOINT_SHARE = 0.1
EMPTY_SHARE = 0.1
_FEATURE_WEIGHT = 0.15
# The decoder must forgive what the UNet leaves in the latents.
_LATENT_NOISE = 0.05
_NUM_PCA_IMAGES = 10_000
_TEACHER_WEIGHT = 1.0
_TEACHER_TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much to train.

    Attributes:
        device: of torch.
        names: the classes that the diffusion models learn.
        batch_size: of the UNets; twice that for the small networks.
    """

    device: str
    names: tuple[str, ...]
    batch_size: int
    unet_widths: tuple[int, int]
    decoder: Recipe
    decoder_refined: Recipe
    oracle: Recipe
    classifier: Recipe
    clip: Recipe
    judge: Recipe
    diffusion: Recipe
    unclip: Recipe
    reader: Recipe = READER
    clip_layers: int = 4
    unet_options: dict[str, Any] = field(default_factory=dict)


CPU = Size(
    device="cpu",
    names=("airplane", "cat", "dog", "ship"),
    batch_size=64,
    unet_widths=(64, 96),
    decoder=Recipe(num_steps=2500, learning_rate=4e-3, weight_decay=0.0, ema_decay=0.995),
    decoder_refined=Recipe(num_steps=500, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.995),
    oracle=Recipe(num_steps=1800, learning_rate=3e-3, weight_decay=0.05, ema_decay=0.995),
    classifier=Recipe(num_steps=1000, learning_rate=3e-3, weight_decay=0.05, ema_decay=0.995),
    clip=Recipe(num_steps=1000, learning_rate=1.5e-3, weight_decay=0.05, ema_decay=0.995),
    judge=Recipe(num_steps=700, learning_rate=1.5e-3, weight_decay=0.05, ema_decay=0.995),
    diffusion=Recipe(num_steps=3600, learning_rate=1e-3, warmup_steps=200, weight_decay=0.01, ema_decay=0.999),
    unclip=Recipe(num_steps=1100, learning_rate=8e-4, warmup_steps=100, weight_decay=0.01, ema_decay=0.998),
)
GPU = Size(
    device="cuda",
    names=CLASS_NAMES,
    batch_size=256,
    unet_widths=(72, 112),
    decoder=Recipe(num_steps=8000, learning_rate=4e-3, weight_decay=0.0, ema_decay=0.999),
    decoder_refined=Recipe(num_steps=6000, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.999),
    oracle=Recipe(num_steps=8000, learning_rate=3e-3, weight_decay=0.05, ema_decay=0.998),
    classifier=Recipe(num_steps=4000, learning_rate=3e-3, weight_decay=0.05, ema_decay=0.998),
    clip=Recipe(num_steps=8000, learning_rate=1.5e-3, weight_decay=0.05, ema_decay=0.998),
    judge=Recipe(num_steps=8000, learning_rate=1.5e-3, weight_decay=0.05, ema_decay=0.998),
    diffusion=Recipe(num_steps=20000, learning_rate=1e-3, warmup_steps=500, weight_decay=0.01, ema_decay=0.9995),
    unclip=Recipe(num_steps=12000, learning_rate=8e-4, warmup_steps=300, weight_decay=0.01, ema_decay=0.9995),
)


def stacked(images: NDArray[np.uint8], device: str) -> Tensor:
    """[N, 32, 32, 3] bytes as bytes [N, 3, 32, 32] on the device."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


def scaled(images: Tensor) -> Tensor:
    """Bytes as -1..1."""
    return images.float() / 127.5 - 1


def fit_components(data: Photographs) -> PatchComponents:
    """The components that the encoder computes, of the first images."""
    return PatchComponents.fit(data.images[:_NUM_PCA_IMAGES], LATENT_CHANNELS)


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
    data: Photographs, teacher: ResidualNetwork, size: Size, *, seed: int, build_folder: Path, output: Path
) -> None:
    """Decode latents that have a little noise: first by pixels alone, then by the features of the ResNet-20 too."""
    images, components = stacked(data.images, size.device), fit_components(data)
    torch.manual_seed(seed)
    model = build_autoencoder(components).to(size.device)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)

    def decoded(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = weighted_rows(data.labels, size.names, size.batch_size // 2, rng)
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

    fit("decoder", model, by_pixels, size.decoder, seed=seed, folder=build_folder)
    fit("decoder-refined", model, by_features, size.decoder_refined, seed=seed, folder=build_folder)
    export(model.cpu(), output)


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Byte images through the autoencoder and back to bytes."""
    decoded = [model(pixels(images[part])).sample for part in batches(len(images), 500)]
    return to_bytes(torch.cat(decoded))


def _names() -> dict[str, Any]:
    return {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}


def build_oracle() -> PreTrainedModel:
    """A RegNet: grouped 3 x 3 convolutions at 16, 8 and 4 pixels."""
    config = RegNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 128, 192],
        depths=[1, 2, 1],
        groups_width=16,
        layer_type="x",
        downsample_in_first_stage=False,
        **_names(),
    )
    return RegNetForImageClassification(config)


def build_resnet() -> PreTrainedModel:
    """A ResNet of basic blocks at 8, 4 and 2 pixels: quick, and wrong often enough to be worth a visit."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 96, 128], depths=[1, 1, 1], layer_type="basic", **_names()
    )
    return ResNetForImageClassification(config)


def train_classifier(
    name: str, data: Photographs, tuning: Photographs, size: Size, *, seed: int, build_folder: Path, output: Path
) -> None:
    """Train `oracle` or `classifier` from labels alone, and fit its temperature on the tuning images."""
    torch.manual_seed(seed)
    model = {"oracle": build_oracle, "classifier": build_resnet}[name]().to(size.device)
    images = stacked(data.images, size.device)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = weighted_rows(data.labels, size.names, 2 * size.batch_size, rng)
        labels = torch.from_numpy(data.labels)[rows].to(size.device)
        return F.cross_entropy(model(augment(scaled(images[rows]), rng)).logits, labels, label_smoothing=0.05)

    fit(name, model, loss, getattr(size, name), seed=seed, folder=build_folder)
    export(model.cpu(), output)
    edit_json(output / "config.json", temperature=fit_temperature(model, tuning.images, tuning.labels))
    write_image_processor(output, "ViTImageProcessor")


def build_clip(num_layers: int, hidden_size: int, num_heads: int) -> CLIPModel:
    """A vision transformer on 4 x 4 patches next to a small text tower."""
    vision = CLIPVisionConfig(
        image_size=32,
        patch_size=4,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        projection_dim=64,
    )
    text = text_config(build_tokenizer(caption_words()), hidden_size=64, num_layers=1)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


class TaughtClip(nn.Module):
    """A CLIP model with a linear map from its image embedding to the teacher's features."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.to_teacher = nn.Linear(clip.config.projection_dim, 64)
        self.tokenizer = build_tokenizer(caption_words())

    def embed(self, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Raw embeddings of images in -1..1 and of texts."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(images.device)
        image_embeds = self.clip.visual_projection(self.clip.vision_model(images).pooler_output)
        return image_embeds, self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)

    def class_logits(self, images: Tensor, template: str) -> tuple[Tensor, Tensor]:
        """Scaled cosines [N, 10] with every class prompt, and the raw image embeddings."""
        image_embeds, text_embeds = self.embed(images, [template.format(name) for name in CLASS_NAMES])
        scale = self.clip.logit_scale.clamp(max=np.log(100.0)).exp()
        return scale * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T, image_embeds


def train_clip(
    data: Photographs, teacher: ResidualNetwork | None, size: Size, *, seed: int, build_folder: Path, output: Path
) -> None:
    """Match every image with the prompt of its class; with a teacher, its soft labels and features are learnt too."""
    torch.manual_seed(seed)
    clip = build_clip(size.clip_layers, 96, 4) if teacher else build_clip(size.clip_layers - 1, 112, 7)
    model = TaughtClip(clip).to(size.device)
    images = stacked(data.images, size.device)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = weighted_rows(data.labels, size.names, 2 * size.batch_size, rng)
        batch, labels = augment(scaled(images[rows]), rng), torch.from_numpy(data.labels)[rows].to(size.device)
        logits, embeds = model.class_logits(batch, str(rng.choice(["a photo of a {}", "{}", "a picture of a {}"])))
        by_label = F.cross_entropy(logits, labels, label_smoothing=0.05)
        return by_label + (_TEACHER_WEIGHT * _taught(model, teacher, batch, logits, embeds) if teacher else 0)

    recipe = size.clip if teacher else size.judge
    fit("clip" if teacher else "judge", model, loss, recipe, seed=seed, folder=build_folder)
    export(model.clip.cpu(), output)
    save_tokenizer(output, caption_words())
    write_image_processor(output, "CLIPImageProcessor", do_center_crop=False, do_convert_rgb=True)


def _taught(model: TaughtClip, teacher: ResidualNetwork, images: Tensor, logits: Tensor, embeds: Tensor) -> Tensor:
    """Cross-entropy with the teacher's soft labels, and the distance to its pooled features."""
    with torch.no_grad():
        maps, wanted = teacher.features(images)
        pooled = F.normalize(maps[-1].mean(dim=(2, 3)), dim=-1)
    soft = F.cross_entropy(logits, (wanted / _TEACHER_TEMPERATURE).softmax(-1))
    return soft + 8 * F.mse_loss(model.to_teacher(embeds), 8 * pooled) / 8


def train_text_encoder(size: Size, *, seed: int, build_folder: Path) -> CLIPTextModel:
    """A text encoder that predicts which classes a caption names, frozen."""
    names = size.names
    indices = np.array([CLASS_NAMES.index(name) for name in names])

    def draw(rng: np.random.Generator) -> tuple[list[str], dict[str, Tensor]]:
        labels = rng.choice(indices, NUM_CAPTIONS)
        return random_captions(labels, names, rng=rng, joint_share=0.3), {}

    tokenizer = build_tokenizer(caption_words())
    return train_caption_reader(
        tokenizer, draw, CLASS_NAMES, {}, seed=seed, build_folder=build_folder, recipe=size.reader
    )


@dataclass(frozen=True, slots=True)
class Latents:
    """Latents [N, 12, 8, 8] of the training images and their mirror images, labels [N], embeddings [N, d]."""

    latents: Tensor
    labels: NDArray[np.int64]
    embeds: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, data: Photographs, autoencoder: AutoencoderKL, device: str, clip: CLIPModel | None = None) -> Latents:
        """Encode once; embeddings have no columns without a CLIP model."""
        images = np.concatenate([data.images, data.images[:, :, ::-1]])
        latents = [autoencoder.encode(pixels(images[part])).latent_dist.mean for part in batches(len(images), 500)]
        embeds = torch.zeros(len(images), 0) if clip is None else embed(clip, images)
        return cls(torch.cat(latents).to(device), np.concatenate([data.labels, data.labels]), embeds.to(device))


@torch.no_grad()
def embed(clip: CLIPModel, images: NDArray[np.uint8]) -> Tensor:
    """Raw image embeddings [N, d] of byte images."""
    found = []
    for part in batches(len(images), 500):
        pooled = clip.vision_model(pixels(images[part]).to(clip.device)).pooler_output
        found.append(clip.visual_projection(pooled))
    return torch.cat(found)


class Prompts:
    """Text states of captions, [N, L, width], one encoding a distinct caption."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        self._tokenizer = build_tokenizer(caption_words())
        self._text_encoder = text_encoder
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Encode captions, on the text encoder's device."""
        for text in {*texts} - self._known.keys():
            tokens = self._tokenizer([text], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
            self._known[text] = self._text_encoder(tokens.input_ids.to(self._text_encoder.device)).last_hidden_state[0]
        return torch.stack([self._known[text] for text in texts])


def train_diffusion(data: Photographs, size: Size, *, seed: int, build_folder: Path, output: Path) -> None:
    """Text encoder, then a UNet that predicts eps; for the export `output/vae` must hold the autoencoder."""
    text_encoder = train_text_encoder(size, seed=seed, build_folder=build_folder)
    train = Latents.of(data.of_classes(size.names), build_autoencoder(fit_components(data)), size.device)
    prompts, noise_levels = Prompts(text_encoder.to(size.device)), DDPMScheduler(**NOISE_CONFIG).alphas_cumprod
    torch.manual_seed(seed)
    unet = _build_unet(size).to(size.device)
    even = torch.ones(size.batch_size, 1, 8, 8, device=size.device)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(train.labels), size=size.batch_size)
        texts = random_captions(
            train.labels[rows], size.names, rng=rng, joint_share=JOINT_SHARE, empty_share=EMPTY_SHARE
        )
        return denoising_loss(unet, train.latents[rows], prompts(texts), noise_levels.to(size.device), even)

    fit("diffusion", unet, loss, size.diffusion, seed=seed, folder=build_folder)
    export_pipeline(unet.cpu(), text_encoder.cpu(), output / "vae", output, words=caption_words())


def train_unclip(
    data: Photographs, pipeline: Path, clip_folder: Path, size: Size, *, seed: int, build_folder: Path, output: Path
) -> None:
    """The same UNet goes on as a v-predicting one that is conditioned on the CLIP embedding of the image, too."""
    autoencoder = build_autoencoder(fit_components(data))
    text_encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder").requires_grad_(False)
    clip = CLIPModel.from_pretrained(clip_folder).requires_grad_(False).to(size.device)
    train = Latents.of(data.of_classes(size.names), autoencoder, size.device, clip)
    normalizer = fit_normalizer(train.embeds.cpu())
    noise_embeddings = EmbeddingNoise(normalizer.to(size.device))
    prompts, noise_levels = Prompts(text_encoder.to(size.device)), DDPMScheduler(**V_CONFIG).alphas_cumprod
    torch.manual_seed(seed)
    unet = _build_unet(
        size, class_embed_type="projection", projection_class_embeddings_input_dim=2 * train.embeds.shape[1]
    )
    known = UNet2DConditionModel.from_pretrained(pipeline / "unet").state_dict()
    unet.load_state_dict(known, strict=False)
    unet.to(size.device)
    even = torch.ones(size.batch_size, 1, 8, 8, device=size.device)

    def loss(rng: np.random.Generator) -> Tensor:
        count = size.batch_size
        rows = rng.integers(len(train.labels), size=count)
        texts = random_captions(train.labels[rows], size.names, rng=rng, empty_share=EMPTY_SHARE)
        levels = rng.integers(np.where(rng.random(count) < CLEAN_SHARE, CLEAN_LEVELS, 1000))
        with torch.no_grad():
            labels = noise_embeddings(train.embeds[rows], torch.from_numpy(levels).to(size.device))
            # As the pipeline's unconditional half has it: everything zero, the level too.
            labels[torch.from_numpy(rng.random(count) < DROPPED_SHARE)] = 0
        return velocity_loss(unet, train.latents[rows], prompts(texts), labels, noise_levels.to(size.device), even)

    fit("unclip", unet, loss, size.unclip, seed=seed, folder=build_folder)
    parts = (unet.cpu(), text_encoder.cpu(), normalizer.cpu())
    export_unclip(*parts, clip_folder, pipeline / "vae", output, words=caption_words())


def _build_unet(size: Size, **options: Any) -> UNet2DConditionModel:
    sizes = {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "norm_num_groups": 8}
    return build_unet(size.unet_widths, **sizes, **size.unet_options, **options)
