"""Folders in the hub format of open_clip: what is scored with correctly, by their files alone. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.config_values import is_integer
from engine.models.configurations import read_config, reading_configuration
from engine.models.processor_checks import is_three_numbers

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# What open_clip takes where the file has none: those of OpenAI's CLIP.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def is_open_clip(folder: Path) -> bool:
    """Whether a folder is in the format of open_clip alone; one that transformers reads, too, is read by it."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def clip_config(folder: Path) -> dict[str, Any]:
    """The configuration of a CLIP model in either format.

    Raises:
        JobError: it cannot be read.
    """
    return read_config(folder / (CONFIG if is_open_clip(folder) else "config.json"))


def check_open_clip(folder: Path, address: str) -> None:
    """Check by its files that a folder holds a whole model of open_clip.

    Raises:
        JobError: open_clip is not installed, a line for each thing that is not supported, or weights are missing.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise JobError(f"'{address}' is a model of open_clip, which is not installed; install riskforge[open_clip]")
    with reading_configuration(address):
        if problems := list(_problems(read_config(folder / CONFIG), folder)):
            raise JobError([f"'{address}': {CONFIG}: {problem}" for problem in problems])
    if not (folder / WEIGHTS).is_file():
        raise JobError(
            f"'{address}' has no {WEIGHTS}; pickles are not opened: save the model with"
            " open_clip.push_to_hf_hub.save_for_hf(..., safe_serialization=True)"
        )


def image_shape(config: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the input of a model's configuration."""
    size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    return (size, size) if is_integer(size) else (size[0], size[1])


def _problems(config: dict[str, Any], folder: Path) -> Iterator[str]:
    model, images = config.get("model_cfg"), config.get("preprocess_cfg") or {}
    if not isinstance(model, dict) or not all(
        isinstance(model.get(f"{part}_cfg"), dict) for part in ("vision", "text")
    ):
        yield "model_cfg: needs vision_cfg and text_cfg; save the model with open_clip"
        return
    text = model["text_cfg"]
    if text.get("hf_model_name"):
        yield f"text_cfg.hf_model_name: {text['hf_model_name']!r}: text towers of other models are not supported"
    if "multimodal_cfg" in model:
        yield "multimodal_cfg: captioning models are not supported; give a contrastive one"
    if text.get("hf_tokenizer_name") and not (folder / "tokenizer.json").is_file():
        yield f"text_cfg.hf_tokenizer_name: {text['hf_tokenizer_name']!r}, and the folder has no tokenizer.json; add it"
    size = model["vision_cfg"].get("image_size", 224)
    if not (is_integer(size) or (isinstance(size, list) and len(size) == 2 and all(map(is_integer, size)))):
        yield f"vision_cfg.image_size: {size!r} is not in pixels"
        return
    yield from _image_problems(images, is_square=len(set(image_shape(config))) == 1)


def _image_problems(images: dict[str, Any], *, is_square: bool) -> Iterator[str]:
    mode, interpolation = images.get("resize_mode") or "shortest", images.get("interpolation") or "bicubic"
    if mode != "squash" and not (mode == "shortest" and is_square):
        yield f"preprocess_cfg.resize_mode: {mode!r}: 'squash' is supported, and 'shortest' for square inputs"
    if interpolation not in ("bicubic", "bilinear"):
        yield f"preprocess_cfg.interpolation: {interpolation!r}: only bilinear and bicubic are differentiable here"
    for field in ("mean", "std"):
        value = images.get(field)
        if value is not None and (not is_three_numbers(value) or (field == "std" and min(value) <= 0)):
            yield f"preprocess_cfg.{field}: {value!r} is not three numbers, one for each of red, green and blue"
