"""Tiny SigLIP, SigLIP 2 and DINOv2 models with random weights, in the folder formats of transformers."""

from __future__ import annotations

import json
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
    named = {"id2label": dict(enumerate(labels))} if labels else {}
    kind = Dinov2ForImageClassification if labels else Dinov2Model
    kind(Dinov2Config(**layers, **named)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_open_clip(folder: Path, *, seed: int = 0, is_sigmoid: bool = False, **images: Any) -> Path:
    """A model of open_clip in its hub format, as `open_clip.push_to_hf_hub` writes it.

    Args:
        is_sigmoid: whether it was made for SigLIP's loss.
        images: fields of `preprocess_cfg`.
    """
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    bias = {"init_logit_bias": -7.0, "custom_text": True} if is_sigmoid else {}
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text} | bias, "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {name: one.contiguous() for name, one in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder
