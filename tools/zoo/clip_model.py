"""The CLIP model of the zoo: images and captions in one space, trained from scratch.

Two losses share the batch. *Captions*: every image is matched with its own full caption, in both directions; pairs
that are also true (same class and context, or a caption that names only the class) are left out of the negatives.
*Class prompts*: every image, in any context, is matched with the prompt that names its class alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizer import MAX_LENGTH, build_tokenizer, digit_words, save_tokenizer
from torch import Tensor
from training import Recipe, batches, export, fit, pixels, write_image_processor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from engine.data.images.digits import (
    BASE_TEMPLATES,
    CLASS_NAMES,
    ZERO_SHOT_TEMPLATE,
    Composites,
    Contexts,
    captions,
    training_batch,
)

BATCH_SIZE = 64  # of each replica
RECIPE = Recipe(num_steps=2400, learning_rate=1.5e-3, weight_decay=0.05, ema_decay=0.995, num_replicas=2)


def text_config(tokenizer: CLIPTokenizer, *, hidden_size: int = 96, num_layers: int = 2) -> CLIPTextConfig:
    """A small text tower for the vocabulary of the zoo."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A vision transformer on 4 x 4 patches next to a text tower of two layers."""
    vision = CLIPVisionConfig(
        image_size=32,
        patch_size=4,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=64,
    )
    text = text_config(tokenizer)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def train_clip(*, seed: int, build_folder: Path, output: Path) -> None:
    """Train both towers together and export them with tokenizer and image processor."""
    tokenizer = build_tokenizer(digit_words())
    torch.manual_seed(seed)
    model = build_clip(tokenizer)

    def loss(rng: np.random.Generator) -> Tensor:
        batch = training_batch(BATCH_SIZE, rng=rng)
        template = ZERO_SHOT_TEMPLATE if rng.random() < 0.5 else BASE_TEMPLATES[rng.integers(len(BASE_TEMPLATES))]
        prompts = [template.format(name) for name in CLASS_NAMES]
        image_embeds, text_embeds = _embed(
            model, tokenizer, batch, captions(batch.labels, batch.contexts, rng=rng) + prompts
        )
        scale = model.logit_scale.clamp(max=np.log(100.0)).exp()
        logits = scale * image_embeds @ text_embeds.T
        caption_logits = logits[:, :BATCH_SIZE].masked_fill(_also_true(batch), -torch.inf)
        own = torch.arange(BATCH_SIZE)
        caption_loss = F.cross_entropy(caption_logits, own) + F.cross_entropy(caption_logits.T, own)
        return 0.25 * caption_loss + F.cross_entropy(logits[:, BATCH_SIZE:], torch.from_numpy(batch.labels))

    fit("clip", model, loss, RECIPE, seed=seed, folder=build_folder)
    export(model, output)
    save_tokenizer(output, digit_words())
    write_image_processor(output, "CLIPImageProcessor", do_center_crop=False, do_convert_rgb=True)


def _embed(model: CLIPModel, tokenizer: CLIPTokenizer, batch: Composites, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Unit embeddings of the images and of the texts."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    image_embeds = model.visual_projection(model.vision_model(pixels(batch.images)).pooler_output)
    text_embeds = model.text_projection(model.text_model(**tokens).pooler_output)
    return F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)


def _also_true(batch: Composites) -> Tensor:
    """Where the caption of column j is true of image i although i is not j, [N, N]."""
    key = np.stack([batch.labels, *(getattr(batch.contexts, name) for name in Contexts.__slots__)], axis=1)
    same = (key[:, None] == key[None]).all(axis=-1)
    names_only = (batch.labels[:, None] == batch.labels[None]) & batch.contexts.is_plain[None]
    return torch.from_numpy((same | names_only) & ~np.eye(len(batch), dtype=bool))


@torch.no_grad()
def zero_shot_classes(
    model: CLIPModel, tokenizer: CLIPTokenizer, images: NDArray[np.uint8], names: Sequence[str] = CLASS_NAMES
) -> NDArray[np.int64]:
    """Of `names`, the class whose prompt is nearest to each image, [N]."""
    tokens = tokenizer([ZERO_SHOT_TEMPLATE.format(name) for name in names], padding=True, return_tensors="pt")
    text_embeds = F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)
    found = []
    for part in batches(len(images), 250):
        pooled = model.vision_model(pixels(images[part])).pooler_output
        found.append((model.visual_projection(pooled) @ text_embeds.T).argmax(-1))
    return torch.cat(found).numpy()
