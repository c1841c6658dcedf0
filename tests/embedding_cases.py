"""Tiny SigLIP, SigLIP 2 and DINOv2 models with random weights, in the folder formats of transformers."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = LAYERS | {"image_size": 32, "patch_size": 8}
TOKENS = 64


def save_siglip(folder: Path, *, seed: int = 0, is_second: bool = False) -> Path:
    """SigLIP with a tokenizer of sentencepiece, or SigLIP 2 with Gemma's."""
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    torch.manual_seed(seed)
    text = LAYERS | {"vocab_size": 96, "max_position_embeddings": TOKENS, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-7.5)
        for parameter in model.parameters():
            # As after training: with zero biases and ones a mistake in their order would not be seen.
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (_save_gemma if is_second else _save_pieces)(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _save_pieces(folder: Path) -> None:
    import sentencepiece
    from transformers import SiglipTokenizer

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "cat", "dog"]
    options: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"a photo of a {name}" for name in names] * 20), model_prefix=str(folder / "spiece"),
        vocab_size=40, minloglevel=2, **options,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)


def _save_gemma(folder: Path) -> None:
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_letters]
    GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)


def save_dino(folder: Path, *, labels: list[str] | None = None, seed: int = 0) -> Path:
    """DINOv2; with labels a classifier on it."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

    torch.manual_seed(seed)
    layers = LAYERS | {"image_size": 28, "patch_size": 14}
    named = (
        {"id2label": dict(enumerate(labels)), "label2id": {name: place for place, name in enumerate(labels)}}
        if labels
        else {}
    )
    kind = Dinov2ForImageClassification if labels else Dinov2Model
    kind(Dinov2Config(**layers, **named)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder
