"""First training of the diffusion text encoder: every position after a caption's end must encode what the caption says.

The UNet attends to all positions, most of which are padding; once these hold class and context, cross-attention finds
them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clip_model import text_config
from tokenizer import MAX_LENGTH
from torch import Tensor, nn
from training import Recipe, fit
from transformers import CLIPTextModel, CLIPTokenizer

from engine.data.images.digits import (
    BACKGROUNDS,
    CLASS_NAMES,
    INKS,
    POSITIONS,
    SIZES,
    TEXTURES,
    Contexts,
    captions,
    random_contexts,
)

BATCH_SIZE = 192
RECIPE = Recipe(num_steps=300, learning_rate=2e-3, warmup_steps=30)
_JOINT_SHARE = 0.3


class CaptionReader(nn.Module):
    """A text encoder with linear heads: which classes are named, and the value of every attribute.

    `attributes` holds the number of values of each.
    """

    def __init__(self, text_encoder: CLIPTextModel, num_classes: int, attributes: Mapping[str, int]) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.classes = nn.Linear(width, num_classes)
        self.attributes = nn.ModuleDict({name: nn.Linear(width, size) for name, size in attributes.items()})

    def loss(self, tokens: Tensor, named: Tensor, attributes: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of what each position at or after the end says, summed over the heads.

        `tokens` [N, L]; `named` [N, classes], 1 for every class in the caption; values of each attribute [N].
        """
        states = self.text_encoder(tokens).last_hidden_state
        row, position = torch.nonzero(tokens == self.text_encoder.config.eos_token_id, as_tuple=True)
        states = states[row, position]
        total = 3 * F.binary_cross_entropy_with_logits(self.classes(states), named[row])
        for name, head in self.attributes.items():
            total = total + F.cross_entropy(head(states), attributes[name][row])
        return total


Draw = Callable[[np.random.Generator], tuple[list[str], dict[str, Tensor]]]
"""Random captions, and the value of each attribute that they name."""


def train_text_encoder(tokenizer: CLIPTokenizer, *, seed: int, build_folder: Path) -> CLIPTextModel:
    """A text encoder trained on random captions of digits, frozen; no image is needed."""
    sizes = {"ink": INKS, "background": BACKGROUNDS, "texture": TEXTURES, "size": SIZES, "position": POSITIONS}
    attributes = {name: len(values) for name, values in sizes.items()}
    folders: dict[str, Any] = {"seed": seed, "build_folder": build_folder}
    return train_caption_reader(tokenizer, draw_digit_captions, CLASS_NAMES, attributes, **folders)


def draw_digit_captions(rng: np.random.Generator) -> tuple[list[str], dict[str, Tensor]]:
    """Captions of digits in random contexts."""
    contexts = random_contexts(BATCH_SIZE, rng=rng, plain_share=0.2)
    labels = rng.integers(len(CLASS_NAMES), size=BATCH_SIZE)
    texts = captions(labels, contexts, rng=rng, joint_share=_JOINT_SHARE)
    return texts, {name: torch.from_numpy(getattr(contexts, name)) for name in Contexts.__slots__}


def train_caption_reader(
    tokenizer: CLIPTokenizer,
    draw: Draw,
    class_names: Sequence[str],
    attributes: Mapping[str, int],
    *,
    seed: int,
    build_folder: Path,
    recipe: Recipe = RECIPE,
) -> CLIPTextModel:
    """A text encoder trained to predict the classes and attributes of drawn captions, frozen."""
    torch.manual_seed(seed)
    reader = CaptionReader(CLIPTextModel(text_config(tokenizer)), len(class_names), attributes)

    def loss(rng: np.random.Generator) -> Tensor:
        texts, values = draw(rng)
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        return reader.loss(tokens.input_ids, _named_classes(texts, class_names), values)

    fit("caption-reader", reader, loss, recipe, seed=seed, folder=build_folder)
    return reader.text_encoder.requires_grad_(False)


def _named_classes(texts: list[str], class_names: Sequence[str]) -> Tensor:
    words = [text.replace(",", " ").split() for text in texts]
    return torch.tensor([[float(name in spoken) for name in class_names] for spoken in words])
