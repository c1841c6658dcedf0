"""The models of a benchmark: the digits zoo, or real architectures with random weights, built from configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ResNetConfig,
    ResNetForImageClassification,
)

from engine.models.addresses import ZOO

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
VOCABULARY = 49408
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# RiskyDiff at a glance: so many pictures a class to vary, as the embeddings of a random encoder mean nothing.
NUM_PICTURES = 4
# Two of the classes of a classifier with random weights.
KINDS = ("kind 1", "kind 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a size is measured on.

    Attributes:
        diffusion: address of a Stable Diffusion pipeline, for KLDB guidance; empty where the size has none.
        unclip: address of a Stable unCLIP pipeline, for RiskyDiff; empty where the size has none.
        clip: address of the CLIP model.
        target: address of the classifier.
        transfer: address of a classifier that guides nothing; empty where there is none.
        tiny: address of a tiny autoencoder for guidance gradients; empty where there is none.
        boundary: the subset C.
        classes: classes of the RiskyDiff samples.
        conditioning: of the RiskyDiff requests.
        boundary_sampling: `sampling` of the KLDB requests.
        risky_sampling: `sampling` of the RiskyDiff requests.
    """

    diffusion: str = ""
    unclip: str = ""
    clip: str
    target: str
    transfer: str = ""
    tiny: str = ""
    boundary: tuple[str, ...]
    classes: tuple[str, ...]
    conditioning: dict[str, Any] = field(default_factory=dict)
    boundary_sampling: dict[str, Any] = field(default_factory=dict)
    risky_sampling: dict[str, Any] = field(default_factory=dict)

    def pipeline_of(self, family: str) -> str:
        """Address of the pipeline that makes a family's samples; empty where the size has none."""
        return self.unclip if family == "risky" else self.diffusion

    def sampling_of(self, family: str) -> dict[str, Any]:
        """`sampling` of a family's requests."""
        return self.risky_sampling if family == "risky" else self.boundary_sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Configurations of a set of models with random weights.

    Attributes:
        unet: of the Stable Diffusion UNet; None for a size without.
        unclip_unet: of the Stable unCLIP UNet; None for a size without.
        vae: of the decoder.
        text: of the text encoder.
        classifier: of a ResNet.
        classifier_pixels: side of the classifier's input.
        tokens: length of a prompt.
        clip_text: of CLIP's text half.
        clip_vision: of CLIP's image half.
        embedding: entries of an image embedding of the unCLIP pipeline.
        tiny: of the tiny autoencoder.
        boundary_steps: denoising steps T under KLDB guidance.
        risky_steps: the same under RiskyDiff.
    """

    unet: dict[str, Any] | None = None
    unclip_unet: dict[str, Any] | None = None
    vae: dict[str, Any]
    text: dict[str, Any]
    classifier: dict[str, Any]
    classifier_pixels: int = 224
    tokens: int = 77
    clip_text: dict[str, Any] = field(default_factory=dict)
    clip_vision: dict[str, Any] = field(default_factory=dict)
    embedding: int = 1024
    tiny: dict[str, Any] = field(default_factory=dict)
    boundary_steps: int = 40
    risky_steps: int = 20


VAE_512 = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
# ResNet-50 is the default of its configuration, CLIP ViT-B/32 that of CLIP's.
RESNET_50 = {"num_labels": 1000}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
TINY_HALF = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

ARCHITECTURES = {
    "sd1": Architecture(
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=VAE_512,
        text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        classifier=RESNET_50,
    ),
    "sd21-unclip": Architecture(
        unclip_unet={
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae=VAE_512 | {"sample_size": 768},
        text={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        classifier=RESNET_50,
    ),
    "tiny": Architecture(
        unet=TINY_UNET,
        unclip_unet=TINY_UNET,
        vae=VAE_512 | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        text=TINY_HALF,
        classifier={
            "num_labels": 4,
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
        },
        classifier_pixels=32,
        tokens=32,
        clip_text=TINY_HALF,
        clip_vision=TINY_HALF | {"image_size": 32, "patch_size": 16},
        embedding=16,
        tiny={
            "encoder_block_out_channels": (8,) * 4,
            "decoder_block_out_channels": (8,) * 4,
            "num_encoder_blocks": (1,) * 4,
            "num_decoder_blocks": (1,) * 4,
        },
        boundary_steps=6,
        risky_steps=4,
    ),
}
SIZES = ("digits", *ARCHITECTURES)
# Sampling of the authors' experiments: KLDB with beta 3, 6 or 9, RiskyDiff by the defaults of its script.
KLDB_SAMPLING = {
    "scheduler": "lms",
    "timestep_spacing": "trailing",
    "use_karras_sigmas": True,
    "guidance_rescale": 0.7,
}
RISKY_SAMPLING = {"scheduler": "ddim", "guidance_scale": 10.0}


def digits_setting() -> Setting:
    """The embedded zoo."""
    tiny = "zoo:digits/tiny-autoencoder" if (ZOO / "digits" / "tiny-autoencoder").is_dir() else ""
    return Setting(
        diffusion="zoo:digits/stable-diffusion",
        unclip="zoo:digits/stable-unclip",
        clip="zoo:digits/clip",
        target="zoo:digits/classifier",
        transfer="zoo:digits/classifier-b",
        tiny=tiny,
        boundary=("three", "eight"),
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        conditioning={"artefact": "zoo:digits/conditioning", "screening": False},
        boundary_sampling=KLDB_SAMPLING | {"guidance_scale": 3.0, "num_inference_steps": 40},
        risky_sampling=RISKY_SAMPLING | {"num_inference_steps": 20},
    )


def random_setting(size: str, folder: Path, device: str) -> Setting:
    """Models of an architecture with random weights, in half precision, in `folder`; what is there is not made again.

    Args:
        device: where the weights are drawn; a GPU takes seconds for what takes a CPU minutes.
    """
    made, marker = ARCHITECTURES[size], folder / "complete"
    if not marker.is_file():
        torch.manual_seed(0)
        _build(made, folder, device)
        marker.touch()
    paths = {name: str(folder / name) for name in ("stable-diffusion", "stable-unclip", "clip", "classifier", "tiny")}
    return Setting(
        diffusion=paths["stable-diffusion"] if made.unet else "",
        unclip=paths["stable-unclip"] if made.unclip_unet else "",
        clip=paths["clip"],
        target=paths["classifier"],
        tiny=paths["tiny"],
        boundary=KINDS,
        classes=KINDS,
        conditioning={"images": str(folder / "pictures")},
        boundary_sampling=KLDB_SAMPLING | {"guidance_scale": 6.0, "num_inference_steps": made.boundary_steps},
        risky_sampling=RISKY_SAMPLING | {"num_inference_steps": made.risky_steps},
    )


def _build(made: Architecture, folder: Path, device: str) -> None:
    tokens = ZOO / "digits" / "stable-diffusion" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(tokens, model_max_length=made.tokens)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": made.tokens, **ids}

    def drawn(build: Callable[[], nn.Module]) -> Any:
        with torch.device(device):
            return build().half()

    vae = drawn(lambda: AutoencoderKL(**made.vae))
    if made.unet is not None:
        StableDiffusionPipeline(
            unet=drawn(lambda: UNet2DConditionModel(**(made.unet or {}))),
            vae=vae,
            text_encoder=drawn(lambda: CLIPTextModel(CLIPTextConfig(**text | made.text))),
            tokenizer=tokenizer,
            scheduler=LMSDiscreteScheduler(**NOISE, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / "stable-diffusion")
    if made.unclip_unet is not None:
        _build_unclip(made, folder, drawn, vae, tokenizer, text)
    clip = CLIPConfig(
        text_config=text | made.clip_text, vision_config=made.clip_vision, projection_dim=made.embedding // 2
    )
    drawn(lambda: CLIPModel(clip)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    side = made.clip_vision.get("image_size", 224)
    _write_processor(folder / "clip", "CLIPImageProcessor", side)
    classifier = ResNetConfig(**made.classifier)
    classifier.id2label = {index: f"kind {index}" for index in range(classifier.num_labels)}
    drawn(lambda: ResNetForImageClassification(classifier)).save_pretrained(folder / "classifier")
    _write_processor(folder / "classifier", "ViTImageProcessor", made.classifier_pixels)
    drawn(lambda: AutoencoderTiny(**made.tiny)).save_pretrained(folder / "tiny")


def _build_unclip(
    made: Architecture,
    folder: Path,
    drawn: Callable[[Callable[[], nn.Module]], Any],
    vae: nn.Module,
    tokenizer: CLIPTokenizer,
    text: dict[str, Any],
) -> None:
    projection = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * made.embedding}
    # Embeddings are given ones, so the encoder only has to be there: one layer of it.
    vision = CLIPVisionConfig(**TINY_HALF, image_size=32, patch_size=16, projection_dim=made.embedding)
    StableUnCLIPImg2ImgPipeline(
        unet=drawn(lambda: UNet2DConditionModel(**(made.unclip_unet or {}), **projection)),
        vae=vae,
        text_encoder=drawn(lambda: CLIPTextModel(CLIPTextConfig(**text | made.text))),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **NOISE, prediction_type="v_prediction", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        ),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        image_encoder=drawn(lambda: CLIPVisionModelWithProjection(vision)),
        image_normalizer=drawn(lambda: StableUnCLIPImageNormalizer(embedding_dim=made.embedding)),
        image_noising_scheduler=DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2"),
    ).save_pretrained(folder / "stable-unclip")
    _write_processor(folder / "stable-unclip" / "feature_extractor", "CLIPImageProcessor", 32)
    rng = np.random.default_rng(0)
    for label in KINDS:
        pictures = folder / "pictures" / label
        # It is there where a process was ended while it built the models.
        pictures.mkdir(parents=True, exist_ok=True)
        for number in range(NUM_PICTURES):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(pictures / f"{number}.png")


def _write_processor(folder: Path, kind: str, side: int) -> None:
    square = {"height": side, "width": side}
    crop = {"do_center_crop": True, "crop_size": square} if kind == "CLIPImageProcessor" else {}
    size = {"shortest_edge": side} if crop else square
    fixed = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    config = {"image_processor_type": kind, "size": size, **crop, **fixed, **IMAGENET}
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=1) + "\n")
