"""CLIP models, SigLIP among them: embeddings of images and of class prompts; and encoders of images alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.methods.finiteness import usable_embeds
from engine.models.addresses import resolve
from engine.models.clip_checks import check_clip, check_image_encoder, is_dino, is_siglip
from engine.models.kernels import full_float32
from engine.models.loading import frozen, load_weights, loading
from engine.models.open_clip_checks import is_open_clip
from engine.models.preprocessing import Preprocessing

TEXT_BATCH = 256


class Clip:
    """A CLIP model with its tokenizer and preprocessing, in float32.

    Attributes:
        name: the address from which it was loaded.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocessing: Preprocessing, device: str, *, name: str) -> None:
        self.name = name
        self._model = frozen(model, device)
        self._tokenizer = tokenizer
        self._preprocessing = preprocessing
        self._device = device

    @classmethod
    def load(cls, address: str, device: str = "cpu") -> Clip:
        """Load a CLIP or SigLIP model, also of open_clip, from `zoo:`, a folder or a hub id; safetensors only.

        Raises:
            JobError: it cannot be loaded.
        """
        folder = resolve(address)
        check_clip(folder, address)
        clip = _load(folder, address, device)
        with loading(address, "a CLIP model of images from its image processor"):
            clip.image_embeds([PIL.Image.new("RGB", (64, 64))])
        return clip

    @property
    def logit_scale(self) -> float:
        """The factor that its loss multiplies cosines with."""
        return float(self._model.logit_scale.exp())

    @property
    def logit_bias(self) -> float:
        """What its loss adds to the scaled cosines; 0 for a softmax over all texts, which it would not change."""
        return 0.0

    @torch.no_grad()
    def text_embeds(self, prompts: Sequence[str]) -> Tensor:
        """Projected text embeddings [len(prompts), d] on the CPU, not normalised.

        Raises:
            JobError: an embedding is not finite or zero, so that no cosine with it is defined.
        """
        chunks = [prompts[start : start + TEXT_BATCH] for start in range(0, len(prompts), TEXT_BATCH)]
        embeds = torch.cat([self._text_embeds(chunk) for chunk in chunks])
        if not (usable := usable_embeds(embeds)).all():
            prompt = prompts[usable.tolist().index(False)]
            raise JobError(
                f"'{self.name}' gives a text embedding that is not finite or has no direction for '{prompt}'; replace"
                " its weights"
            )
        return embeds

    def _text_embeds(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        with full_float32(self._device):
            return _embeds(self._model.get_text_features(**tokens)).float().cpu()

    def image_embeds(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Projected image embeddings [B, d] of 8-bit images, on the CPU, not normalised."""
        return self.embeds_of_pixels(self.preprocess(images))

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """The model's input [B, 3, h, w] for 8-bit images, on the CPU; may run on any thread."""
        return self._preprocessing.of_images(images)

    @torch.no_grad()
    def embeds_of_pixels(self, pixels: Tensor) -> Tensor:
        """As `image_embeds`, of what `preprocess` gave."""
        with full_float32(self._device):
            return _embeds(self._model.get_image_features(pixel_values=pixels.to(self._device))).float().cpu()

    def embeds_of_tensor(self, images: Tensor) -> Tensor:
        """Projected image embeddings [B, d] of images [B, 3, H, W] in [0, 1], differentiable."""
        pixels = self._preprocessing.of_tensor(images)
        return _embeds(self._model.get_image_features(pixel_values=pixels)).float()


class SigLip(Clip):
    """SigLIP and SigLIP 2 of a fixed resolution: trained with a sigmoid for each pair of an image and a text.

    Zhai et al., "Sigmoid loss for language image pre-training" (ICCV 2023), equation 1: the logit of a pair is
    `scale * cosine + bias`. Texts are padded to the full length, and no token is masked, as in training.
    """

    @property
    def logit_bias(self) -> float:
        """What its loss adds to the scaled cosines."""
        return float(self._model.logit_bias)

    def _text_embeds(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        with full_float32(self._device):
            return _embeds(self._model.get_text_features(input_ids=tokens["input_ids"].to(self._device))).float().cpu()


class OpenClip(Clip):
    """A model of open_clip, trained with either loss."""

    @property
    def logit_bias(self) -> float:
        """What its loss adds to the scaled cosines; 0 for a softmax over all texts."""
        return float(self._model.logit_bias)

    def _text_embeds(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(prompts)).to(self._device)
        with full_float32(self._device):
            return _embeds(self._model.get_text_features(tokens)).float().cpu()


def _load(folder: Path, address: str, device: str) -> Clip:
    if is_open_clip(folder):
        from engine.models.open_clip_loading import load_open_clip

        return OpenClip(*load_open_clip(folder, address), device, name=address)
    return (_load_siglip if is_siglip(folder) else _load_clip)(folder, address, device)


def _load_clip(folder: Path, address: str, device: str) -> Clip:
    from transformers.models.clip.modeling_clip import CLIPModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    with loading(address, "a CLIP model"):
        model = load_weights(CLIPModel, folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return Clip(model, tokenizer, Preprocessing.load(folder), device, name=address)


def _load_siglip(folder: Path, address: str, device: str) -> Clip:
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.models.siglip.modeling_siglip import SiglipModel

    with loading(address, "a SigLIP model"):
        model = load_weights(SiglipModel, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return SigLip(model, tokenizer, Preprocessing.load(folder), device, name=address)


class ImageEncoder(Protocol):
    """What embeds images, and need not know texts. `Clip` is one.

    Attributes:
        name: the address from which it was loaded.
    """

    name: str

    def image_embeds(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Embeddings [B, d] of 8-bit images, on the CPU, not normalised."""
        ...

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """The model's input [B, 3, h, w] for 8-bit images, on the CPU; may run on any thread."""
        ...

    def embeds_of_pixels(self, pixels: Tensor) -> Tensor:
        """As `image_embeds`, of what `preprocess` gave."""
        ...

    def embeds_of_tensor(self, images: Tensor) -> Tensor:
        """Embeddings [B, d] of images [B, 3, H, W] in [0, 1], differentiable."""
        ...


class Dino:
    """DINOv2: the normalised class token of its last layer (Oquab et al., arXiv 2304.07193).

    Attributes: as `ImageEncoder`.
    """

    def __init__(self, model: Any, preprocessing: Preprocessing, device: str, *, name: str) -> None:
        self.name = name
        self._model = frozen(model, device)
        self._preprocessing = preprocessing
        self._device = device

    def image_embeds(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """As `ImageEncoder.image_embeds`."""
        return self.embeds_of_pixels(self.preprocess(images))

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """As `ImageEncoder.preprocess`."""
        return self._preprocessing.of_images(images)

    @torch.no_grad()
    def embeds_of_pixels(self, pixels: Tensor) -> Tensor:
        """As `ImageEncoder.embeds_of_pixels`."""
        with full_float32(self._device):
            return self._embeds(pixels.to(self._device)).cpu()

    def embeds_of_tensor(self, images: Tensor) -> Tensor:
        """As `ImageEncoder.embeds_of_tensor`."""
        return self._embeds(self._preprocessing.of_tensor(images))

    def _embeds(self, pixels: Tensor) -> Tensor:
        embeds: Tensor = self._model(pixel_values=pixels).pooler_output
        return embeds.float()


def load_image_encoder(address: str, device: str = "cpu") -> ImageEncoder:
    """A CLIP, SigLIP or DINOv2 model from `zoo:`, a folder or a hub id; safetensors only.

    Raises:
        JobError: it cannot be loaded.
    """
    folder = resolve(address)
    if not is_dino(folder):
        return Clip.load(address, device)
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

    check_image_encoder(folder, address)
    with loading(address, "a DINOv2 model"):
        model = load_weights(Dinov2Model, folder)
    encoder = Dino(model, Preprocessing.load(folder), device, name=address)
    with loading(address, "a DINOv2 model of images from its image processor"):
        encoder.image_embeds([PIL.Image.new("RGB", (64, 64))])
    return encoder


def _embeds(features: Any) -> Tensor:
    """transformers 5 wraps the projected features in an output object, 4 does not."""
    return features if isinstance(features, Tensor) else features.pooler_output
