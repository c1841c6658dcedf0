"""First training of the diffusion text encoder: every position after a caption's end must tell what the caption says.

The UNet attends to all positions, most of which are padding; once these hold class and context, cross-attention finds
them at once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clip_model import text_config
from tokenizer import MAX_LENGTH
from torch import Tensor, nn
from training import Recipe, fit
from transformers import CLIPTextModel, CLIPTokenizer

from engine.digits import (
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
    """A text encoder with linear heads: which classes are named, and the value of every attribute."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        sizes = {"ink": INKS, "background": BACKGROUNDS, "texture": TEXTURES, "size": SIZES, "position": POSITIONS}
        self.classes = nn.Linear(width, len(CLASS_NAMES))
        self.attributes = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in sizes.items()})

    def loss(self, tokens: Tensor, named: Tensor, contexts: Contexts) -> Tensor:
        """Cross-entropy of what each position at or after the end says, summed over the heads.

        `tokens` [N, L]; `named` [N, classes], 1 for every class in the caption.
        """
        states = self.text_encoder(tokens).last_hidden_state
        row, position = torch.nonzero(tokens == self.text_encoder.config.eos_token_id, as_tuple=True)
        states = states[row, position]
        total = 3 * F.binary_cross_entropy_with_logits(self.classes(states), named[row])
        for name, head in self.attributes.items():
            total = total + F.cross_entropy(head(states), torch.from_numpy(getattr(contexts, name))[row])
        return total


def train_text_encoder(tokenizer: CLIPTokenizer, *, seed: int, build_folder: Path) -> CLIPTextModel:
    """A text encoder trained on random captions, frozen; no image is needed."""
    torch.manual_seed(seed)
    reader = CaptionReader(CLIPTextModel(text_config(tokenizer)))

    def loss(rng: np.random.Generator) -> Tensor:
        contexts = random_contexts(BATCH_SIZE, rng=rng, plain_share=0.2)
        labels = rng.integers(len(CLASS_NAMES), size=BATCH_SIZE)
        texts = captions(labels, contexts, rng=rng, joint_share=_JOINT_SHARE)
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        return reader.loss(tokens.input_ids, _named_classes(texts), contexts)

    fit("caption-reader", reader, loss, RECIPE, seed=seed, folder=build_folder)
    return reader.text_encoder.requires_grad_(False)


def _named_classes(texts: list[str]) -> Tensor:
    words = [text.replace(",", " ").split() for text in texts]
    return torch.tensor([[float(name in spoken) for name in CLASS_NAMES] for spoken in words])
