"""Models of open_clip, from local folders in its hub format."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor, nn

from engine.models.configurations import read_config
from engine.models.loading import loading
from engine.models.open_clip_checks import CONFIG, MEAN, STD, WEIGHTS, image_shape
from engine.models.preprocessing import Preprocessing
from engine.models.preprocessing_steps import Steps


class OpenClipTowers(nn.Module):
    """A model of open_clip by the interface of transformers' `CLIPModel`, as far as embeddings need it.

    Attributes:
        model: of open_clip.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the factor of cosines."""
        scale: Tensor = self.model.logit_scale
        return scale

    @property
    def logit_bias(self) -> float:
        """What a sigmoid loss adds; 0 for a softmax."""
        return 0.0 if self.model.logit_bias is None else float(self.model.logit_bias)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [B, d] of images [B, 3, h, w] after preprocessing, not normalised."""
        features: Tensor = self.model.encode_image(pixel_values)
        return features

    def get_text_features(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, d] of tokens [B, length], not normalised."""
        features: Tensor = self.model.encode_text(tokens)
        return features


def load_open_clip(folder: Path, address: str) -> tuple[OpenClipTowers, Any, Preprocessing]:
    """Model in float32, tokenizer and preprocessing of a folder that `check_open_clip` lets through.

    Raises:
        JobError: it cannot be loaded.
    """
    with loading(address, "a model of open_clip"):
        import open_clip
        from open_clip.factory import load_checkpoint

        name = f"local-dir:{folder}"
        with _without_advice():
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False, precision="fp32")
        load_checkpoint(model, str(folder / WEIGHTS), strict=True)
        tokenizer = open_clip.get_tokenizer(name)
    return OpenClipTowers(model), tokenizer, Preprocessing.plain(address, _steps(read_config(folder / CONFIG)))


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep out of the terminal that a new model has no weights; they are loaded next."""
    root = logging.getLogger()

    def is_kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    # `logging.warning` gives a root logger without handlers one that writes to stderr, for good.
    handler = logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(is_kept)
    try:
        yield
    finally:
        root.removeFilter(is_kept)
        root.removeHandler(handler)


def _steps(config: dict[str, Any]) -> Steps:
    """The transform of open_clip for evaluation: torchvision's resize and crop."""
    images, (height, width) = config.get("preprocess_cfg") or {}, image_shape(config)
    is_squashed = images.get("resize_mode") == "squash"
    return Steps(
        resize={"height": height, "width": width} if is_squashed else {"shortest_edge": height},
        crop=None if is_squashed else (height, width),
        resample=PIL.Image.Resampling[(images.get("interpolation") or "bicubic").upper()],
        mean=_three(images.get("mean"), MEAN),
        std=_three(images.get("std"), STD),
        rounds=True,
    )


def _three(values: Any, default: Sequence[float]) -> list[float]:
    return [float(value) for value in values or default]
