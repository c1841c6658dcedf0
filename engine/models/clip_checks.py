"""Which folders of CLIP models are scored with correctly, by their files alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.configurations import need_file, read_config, reading_configuration
from engine.models.processor_checks import check_processor
from engine.models.stored_tensors import tensors_of
from engine.models.weight_files import check_weights, conversion_line, has_weights

_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", None)


def check_clip(folder: Path, address: str, *, is_complete: bool = True) -> None:
    """Check by its files that a folder holds a whole CLIP model.

    Args:
        is_complete: whether all of its files must exist; a hub id may be cached in part.

    Raises:
        JobError: what the folder holds instead, or what is missing.
    """
    need_file(folder, "config.json", address, "a transformers model folder")
    with reading_configuration(address):
        config = read_config(folder / "config.json")
        _check_kind(config, address)
        if is_complete:
            check_processor(folder, address, config)
            _check_tokenizer(folder, address)
            check_weights(folder, address, conversion_line("transformers.CLIPModel", address, folder))
        if has_weights(folder):
            _check_projections(folder, address)


def _check_kind(config: dict[str, Any], address: str) -> None:
    kinds = config.get("architectures") or ["CLIPModel"]
    if config.get("model_type") != "clip" or "CLIPModel" not in kinds:
        kind = config.get("model_type") if config.get("model_type") != "clip" else kinds[0]
        raise JobError(f"'{address}' is a model of type {kind!r}; a CLIP model is needed")
    vision = config.get("vision_config")
    if isinstance(vision, dict) and vision.get("num_channels", 3) != 3:
        raise JobError(f"'{address}': vision_config.num_channels: {vision['num_channels']!r}; images here have three")


def _check_projections(folder: Path, address: str) -> None:
    """Check that the weights have both projections: transformers would fill missing ones with random numbers."""
    names = tensors_of(folder, address, "a CLIP model")
    for projection in ("text_projection.weight", "visual_projection.weight"):
        if not any(name.endswith(projection) for name in names):
            raise JobError(f"'{address}' has no {projection} in its weights; save the whole CLIP model")


def _check_tokenizer(folder: Path, address: str) -> None:
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            need_file(folder, name, address, "the tokenizer of a CLIP model, or tokenizer.json,")
    path = folder / "tokenizer_config.json"
    kind = read_config(path).get("tokenizer_class") if path.is_file() else None
    if kind not in _TOKENIZERS:
        raise JobError(
            f"'{address}': tokenizer_class: {kind!r} is not the tokenizer of a CLIP model; give a CLIP model"
        )
