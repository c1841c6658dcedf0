"""Which folders of CLIP models and image encoders are scored with correctly, by their files. Imports no torch.

SigLIP, and SigLIP 2 of a fixed resolution, which is of the same type, are CLIP models here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.configurations import need_file, read_config, reading_configuration
from engine.models.open_clip_checks import check_open_clip, is_open_clip
from engine.models.processor_checks import check_processor
from engine.models.stored_tensors import tensors_of
from engine.models.weight_files import check_weights, conversion_line, has_weights

# By the type in config.json: the class of the whole model, and weights that one of its parts lacks.
CLIP_TYPES = {
    "clip": ("CLIPModel", ("text_projection.weight", "visual_projection.weight")),
    "siglip": ("SiglipModel", ("text_model.head.weight", "vision_model.head.probe")),
}
_TOKENIZERS = {
    "clip": ("CLIPTokenizer", "CLIPTokenizerFast", None),
    "siglip": (
        "SiglipTokenizer", "Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast",
        "TokenizersBackend", None,
    ),
}  # fmt: skip
_DINO = "Dinov2Model"


def is_siglip(folder: Path) -> bool:
    """Whether a folder with a config.json is of a SigLIP model.

    Raises:
        JobError: its configuration cannot be read.
    """
    return read_config(folder / "config.json").get("model_type") == "siglip"


def is_dino(folder: Path) -> bool:
    """Whether a folder holds DINOv2 without a head.

    Raises:
        JobError: its configuration cannot be read.
    """
    path = folder / "config.json"
    return path.is_file() and (read_config(path).get("architectures") or [None])[0] == _DINO


def check_image_encoder(folder: Path, address: str, *, is_complete: bool = True) -> None:
    """Check by its files that a folder holds a model whose embeddings of images can be compared; as `check_clip`.

    Raises:
        JobError: it holds neither a CLIP model nor DINOv2, or not a whole one.
    """
    if not is_dino(folder):
        check_clip(folder, address, is_complete=is_complete)
        return
    with reading_configuration(address):
        config = read_config(folder / "config.json")
        if config.get("num_channels", 3) != 3:
            raise JobError(f"'{address}': num_channels: {config['num_channels']!r}; images here have three")
        if is_complete:
            check_processor(folder, address, config)
            check_weights(folder, address, conversion_line("transformers.AutoModel", address, folder))


def check_clip(folder: Path, address: str, *, is_complete: bool = True) -> None:
    """Check by its files that a folder holds a whole CLIP model.

    Args:
        is_complete: whether all of its files must exist; a hub id may be cached in part.

    Raises:
        JobError: what the folder holds instead, or what is missing.
    """
    if is_open_clip(folder):
        check_open_clip(folder, address)
        return
    need_file(folder, "config.json", address, "a transformers model folder")
    with reading_configuration(address):
        config = read_config(folder / "config.json")
        _check_kind(config, address)
        if is_complete:
            check_processor(folder, address, config)
            _check_tokenizer(folder, address, config["model_type"])
            name = CLIP_TYPES[config["model_type"]][0]
            check_weights(folder, address, conversion_line(f"transformers.{name}", address, folder))
        if has_weights(folder):
            _check_projections(folder, address, config["model_type"])


def _check_kind(config: dict[str, Any], address: str) -> None:
    family, kinds = config.get("model_type"), config.get("architectures")
    if family == "siglip2":
        raise JobError(
            f"'{address}' is a model of type 'siglip2', which takes images of any size (NaFlex); give SigLIP 2 of a"
            " fixed resolution, such as siglip2-base-patch16-224, whose type is 'siglip'"
        )
    known = CLIP_TYPES.get(str(family))
    if known is None or (kinds and known[0] not in kinds):
        raise JobError(
            f"'{address}' is a model of type {kinds[0] if known and kinds else family!r}; a CLIP model is needed:"
            " CLIP, SigLIP or open_clip"
        )
    vision = config.get("vision_config")
    if isinstance(vision, dict) and vision.get("num_channels", 3) != 3:
        raise JobError(f"'{address}': vision_config.num_channels: {vision['num_channels']!r}; images here have three")


def _check_projections(folder: Path, address: str, family: str) -> None:
    """Check that the weights have both towers to the end: transformers would fill missing ones with random numbers."""
    names = tensors_of(folder, address, "a CLIP model")
    for projection in CLIP_TYPES[family][1]:
        if not any(name.endswith(projection) for name in names):
            raise JobError(f"'{address}' has no {projection} in its weights; save the whole CLIP model")


def _check_tokenizer(folder: Path, address: str, family: str) -> None:
    path = folder / "tokenizer_config.json"
    kind = read_config(path).get("tokenizer_class") if path.is_file() else None
    if not (folder / "tokenizer.json").is_file():
        needed = ("vocab.json", "merges.txt") if family == "clip" else ("spiece.model",)
        for name in needed:
            need_file(folder, name, address, "the tokenizer of a CLIP model, or tokenizer.json,")
    if kind not in _TOKENIZERS[family]:
        raise JobError(
            f"'{address}': tokenizer_class: {kind!r} is not the tokenizer of a CLIP model; give a CLIP model"
        )
    # SigLIP's own tokenizer reads sentencepiece's file alone, whatever else is there.
    is_pieces = family == "siglip" and (kind == "SiglipTokenizer" or not (folder / "tokenizer.json").is_file())
    if is_pieces and importlib.util.find_spec("sentencepiece") is None:
        raise JobError(
            f"'{address}' has a tokenizer of sentencepiece, which is not installed; install riskforge[siglip]"
        )
