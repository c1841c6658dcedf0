"""The networks of the zoo `cifar10` that read a class from an image, all from random weights.

The two oracles and the teacher learn from labels alone, the judge from labels and captions. CLIP learns from these and
from the teacher, which is published as `classifier-b`. The target learns from labels, of images in some contexts alone.
In images that are framed anew, the teacher says where the object is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar10_captions import CaptionedPhotographs, caption_words
from cifar10_data import CLASS_NAMES, Photographs, augment, cut_out, distort, scaled, stacked
from classifiers import fit_temperature
from clip_model import text_config
from numpy.typing import NDArray
from tokenizer import build_tokenizer, save_tokenizer
from torch import Tensor, nn
from training import Recipe, batches, edit_json, export, fit, write_image_processor
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

PROMPTS = ("a photo of a {}", "{}", "a picture of a {}")
TEACHER = "classifier-b"
_LABEL_SMOOTHING = 0.1
_BILINEAR = 2  # of PIL
_TEACHER_TEMPERATURE = 2.0
_TEACHER_SHARE = 0.7


def _names() -> dict[str, Any]:
    return {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}


def build_regnet() -> PreTrainedModel:
    """A RegNet-Y: grouped 3 x 3 convolutions with squeeze and excitation at 16, 8 and 4 pixels."""
    config = RegNetConfig(
        embedding_size=32,
        hidden_sizes=[64, 128, 256],
        depths=[2, 3, 2],
        groups_width=32,
        layer_type="y",
        downsample_in_first_stage=False,
        **_names(),
    )
    return RegNetForImageClassification(config)


def build_large_resnet() -> PreTrainedModel:
    """A ResNet of six basic blocks; on images of 64 pixels, as its processor has them, at 16, 8 and 4 pixels."""
    return _resnet([48, 96, 160], [2, 2, 2])


def build_other_resnet() -> PreTrainedModel:
    """As the large one, with more of its width at 8 pixels."""
    return _resnet([48, 104, 144], [2, 2, 2])


def build_resnet() -> PreTrainedModel:
    """A ResNet of basic blocks at 8, 4 and 2 pixels: quick, and wrong often enough to be worth a visit."""
    return _resnet([64, 96, 128], [1, 1, 1])


def _resnet(hidden_sizes: list[int], depths: list[int]) -> PreTrainedModel:
    config = ResNetConfig(embedding_size=32, hidden_sizes=hidden_sizes, depths=depths, layer_type="basic", **_names())
    return ResNetForImageClassification(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderPlan:
    """A classifier to train.

    Attributes:
        side: pixels of the images that the network sees; its processor enlarges to them.
        distorts: whether half of the training images are darkened, blurred, cropped or recoloured, too.
    """

    build: Callable[[], PreTrainedModel]
    recipe: Recipe
    side: int = 32
    distorts: bool = True
    batch_size: int = 128


def train_classifier(
    name: str,
    plan: ReaderPlan,
    data: Photographs,
    tuning: Photographs,
    *,
    seed: int,
    build_folder: Path,
    output: Path,
    device: str = "cpu",
) -> None:
    """Train from labels alone, fit the temperature on the tuning images and export to `output`."""
    torch.manual_seed(seed)
    model = plan.build().to(device, memory_format=torch.channels_last)
    images, labels = stacked(data.images, device), torch.from_numpy(data.labels).to(device)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(labels), size=plan.batch_size)).to(device)
        batch = augment(scaled(images[rows]), rng)
        batch = cut_out(distort(batch, rng), rng) if plan.distorts else batch
        with torch.autocast(device, torch.bfloat16):
            logits = model(enlarged(batch, plan.side)).logits
        return F.cross_entropy(logits.float(), labels[rows], label_smoothing=_LABEL_SMOOTHING)

    fit(name, model, loss, plan.recipe, seed=seed, folder=build_folder)
    export(model.cpu(), output)
    write_image_processor(output, "ViTImageProcessor", side=plan.side, resample=_BILINEAR)
    temperature = fit_temperature(ExportedClassifier(output), tuning.images, tuning.labels)
    edit_json(output / "config.json", temperature=temperature)


class ExportedClassifier(nn.Module):
    """An exported classifier with the enlargement of its own image processor, on images in -1..1."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModelForImageClassification.from_pretrained(folder).eval()
        self.side = processed_side(folder)

    def forward(self, images: Tensor) -> Any:
        """The model's output for images [N, 3, 32, 32]."""
        return self.model(enlarged(images, self.side))


def enlarged(images: Tensor, side: int) -> Tensor:
    """Images [N, 3, 32, 32] at `side` pixels, as PIL's bilinear enlargement has them."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def processed_side(folder: Path) -> int:
    """The side of the images that a model sees, by its image processor."""
    return int(json.loads((folder / "preprocessor_config.json").read_text())["size"]["height"])


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
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    # The fused kernel's backward is slow in bf16 at these sizes.
    config._attn_implementation = "eager"
    return CLIPModel(config)


class Teacher:
    """The exported `classifier-b`, frozen: what CLIP and the decoder learn from, and where it sees the object."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        model = AutoModelForImageClassification.from_pretrained(folder).eval().requires_grad_(False)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.side = processed_side(folder)

    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps of the three stages, and the logits [N, 10], of images [N, 3, 32, 32] in -1..1."""
        network = self.model.resnet
        value, maps = network.embedder(enlarged(images, self.side)), []
        for stage in network.encoder.stages:
            value = stage(value)
            maps.append(value)
        return maps, self.model.classifier(network.pooler(value))

    def distance(self, images: Tensor, originals: Tensor) -> Tensor:
        """Relative differences of the feature maps, and cross-entropy with the reading of the originals."""
        with torch.no_grad():
            wanted, wanted_logits = self.features(originals)
        found, found_logits = self.features(images)
        maps = torch.stack([F.l1_loss(a, b) / b.abs().mean() for a, b in zip(found, wanted, strict=True)])
        return maps.sum() + 0.1 * F.cross_entropy(found_logits, wanted_logits.softmax(-1))

    @torch.no_grad()
    def soft_labels(self, images: Tensor) -> Tensor:
        """Probabilities [N, 10] at `_TEACHER_TEMPERATURE` of images [N, 3, 32, 32] in -1..1."""
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.model(enlarged(images, self.side)).logits
        return (logits.float() / _TEACHER_TEMPERATURE).softmax(-1)

    def activation(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Class activation maps [N, 8, 8] (Grad-CAM, Selvaraju et al. 2017, cell by cell) of byte images."""
        found = []
        for part in batches(len(images), 250):
            maps, _ = self.features(scaled(stacked(images[part], self.model.device.type)))
            middle = maps[1].requires_grad_()
            logits = self.model.classifier(self.model.resnet.pooler(self.model.resnet.encoder.stages[2](middle)))
            chosen = torch.from_numpy(labels[part]).to(logits.device)[:, None]
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen).sum(), middle)
            found.append((middle * gradient).sum(1).clamp(min=0).detach().double().cpu().numpy())
        return np.concatenate(found)


class PromptedClip(nn.Module):
    """A CLIP model and its tokenizer, embedding images and texts alike."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = build_tokenizer(caption_words())

    def embed(self, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images in -1..1 and of texts."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(images.device)
        image_embeds = self.clip.visual_projection(self.clip.vision_model(images).pooler_output)
        text_embeds = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
        return F.normalize(image_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.clip.logit_scale.clamp(max=np.log(100.0)).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPlan:
    """A CLIP model to train: `layers`, `width` and `heads` of its vision transformer."""

    layers: int
    width: int
    heads: int
    recipe: Recipe
    batch_size: int = 128
    caption_weight: float = 0.25


def train_clip(
    name: str,
    plan: ClipPlan,
    data: CaptionedPhotographs,
    teacher: Teacher | None,
    *,
    seed: int,
    build_folder: Path,
    output: Path,
    device: str = "cpu",
) -> None:
    """Match every image with the prompt of its class and with its own caption; a teacher's soft labels join the former.

    Images are only shifted and cut out: flips and distortions would make captions untrue.
    """
    torch.manual_seed(seed)
    model = PromptedClip(build_clip(plan.layers, plan.width, plan.heads)).to(device)
    images, labels = stacked(data.photographs.images, device), data.photographs.labels

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(labels), size=plan.batch_size)
        batch = cut_out(augment(scaled(images[rows]), rng, flip=False), rng)
        wanted, captions = torch.from_numpy(labels[rows]).to(device), data.captions(rows, rng)
        prompts = [str(rng.choice(PROMPTS)).format(name) for name in CLASS_NAMES]
        with torch.autocast(device, torch.bfloat16):
            image_embeds, text_embeds = model.embed(batch, prompts + captions)
        logits = model.scale * image_embeds @ text_embeds.T
        by_class, by_caption = logits[:, : len(prompts)], logits[:, len(prompts) :]
        total = F.cross_entropy(by_class, wanted, label_smoothing=_LABEL_SMOOTHING)
        if teacher:
            soft = F.cross_entropy(by_class / _TEACHER_TEMPERATURE, teacher.soft_labels(batch))
            total = (1 - _TEACHER_SHARE) * total + _TEACHER_SHARE * _TEACHER_TEMPERATURE * soft
        return total + plan.caption_weight * _caption_loss(by_caption, data.are_true(rows, captions))

    fit(name, model, loss, plan.recipe, seed=seed, folder=build_folder)
    export(model.clip.cpu(), output)
    save_tokenizer(output, caption_words())
    write_image_processor(output, "CLIPImageProcessor", do_center_crop=False, do_convert_rgb=True)


def _caption_loss(logits: Tensor, is_true: NDArray[np.bool_]) -> Tensor:
    """Contrastive loss in both directions of logits [N, N]; a caption that is true of another image is no negative."""
    other = torch.from_numpy(is_true & ~np.eye(len(is_true), dtype=bool)).to(logits.device)
    own = torch.arange(len(logits), device=logits.device)
    by_image, by_caption = logits.masked_fill(other, -torch.inf), logits.T.masked_fill(other.T, -torch.inf)
    return F.cross_entropy(by_image, own) + F.cross_entropy(by_caption, own)
