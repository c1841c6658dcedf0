"""What an image processor of transformers or a transform of timm does to an image: resize, centre crop, normalise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from engine.models.processor_classes import UNCROPPED
from engine.models.timm_checks import check_timm_transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What is done to an image: resize, crop at its centre, normalise.

    Attributes:
        resize: `shortest_edge`, or `height` and `width`, in pixels; None for no resize.
        crop: height and width in pixels; None for no crop.
        resample: the filter of the resize.
        mean: subtracted from red, green and blue in [0, 1].
        std: divides red, green and blue after that.
        rounds: whether half a pixel of an odd margin is rounded to even, as in torchvision; else down.
        flips: whether the network takes channels in the order blue, green, red; mean and std are in this order then.
    """

    resize: dict[str, int] | None
    crop: tuple[int, int] | None
    resample: PIL.Image.Resampling
    mean: Sequence[float]
    std: Sequence[float]
    rounds: bool = False
    flips: bool = False


def processor_steps(processor: Any, kind: str) -> Steps:
    """The steps of an image processor of transformers of a supported class, a key of `DEFAULTS`."""
    resize, crop = _sizes(processor, kind)
    resample = PIL.Image.Resampling(int(processor.resample)) if resize else PIL.Image.Resampling.BILINEAR
    mean, std = _normalisation(processor, "image_mean", 0.0), _normalisation(processor, "image_std", 1.0)
    if kind == "EfficientNetImageProcessor" and processor.include_top:
        # Divided a second time.
        std = [first * float(second) for first, second in zip(std, processor.image_std, strict=True)]
    flips = kind == "MobileViTImageProcessor" and bool(processor.do_flip_channel_order)
    return Steps(resize=resize, crop=crop, resample=resample, mean=mean, std=std, flips=flips)


def timm_steps(processor: Any, folder: Path) -> Steps:
    """The steps of timm's transform for evaluation, by the `data_config` of the processor.

    Raises:
        JobError: the transform is not supported.
    """
    config = processor.data_config
    check_timm_transform(config, str(folder))
    height, width = config["input_size"][1:]
    edges = [math.floor(size / config["crop_pct"]) for size in (height, width)]
    return Steps(
        resize=(
            {"shortest_edge": edges[0]} if config["crop_mode"] == "center" else {"height": edges[0], "width": edges[1]}
        ),
        crop=(height, width),
        resample=PIL.Image.Resampling[config["interpolation"].upper()],
        mean=[float(value) for value in config["mean"]],
        std=[float(value) for value in config["std"]],
        rounds=True,
    )


def _sizes(processor: Any, kind: str) -> tuple[dict[str, int] | None, tuple[int, int] | None]:
    """Resize target (`shortest_edge`, or `height` and `width`) and centre crop of a processor."""
    resize = _plain_size(processor, "size") if processor.do_resize else None
    crop = _plain_size(processor, "crop_size") if processor.do_center_crop else None
    edge = resize.get("shortest_edge", 0) if resize else 0
    if kind == "LevitImageProcessor" and edge:
        resize = {"shortest_edge": int((256 / 224) * edge)}
    elif kind == "PoolFormerImageProcessor" and resize and processor.crop_pct is not None:
        scaled = [int(size / processor.crop_pct) for size in resize.values()]
        is_edge = len(set(scaled)) == 1
        resize = {"shortest_edge": scaled[0]} if is_edge else {"height": scaled[0], "width": scaled[1]}
    elif kind == "ConvNextImageProcessor" and 0 < edge < UNCROPPED:
        # Resized to size / crop_pct, then cropped to size.
        resize, crop = {"shortest_edge": int(edge / processor.crop_pct)}, {"height": edge, "width": edge}
    elif kind == "ConvNextImageProcessor" and edge:
        resize = {"height": edge, "width": edge}
    return resize, (crop["height"], crop["width"]) if crop else None


def _plain_size(processor: Any, name: str) -> dict[str, int]:
    size = dict(getattr(processor, name))
    return {key: int(value) for key, value in size.items() if value is not None}


def _normalisation(processor: Any, name: str, neutral: float) -> list[float]:
    if not getattr(processor, "do_normalize", False):
        return [neutral] * 3
    return [float(value) for value in getattr(processor, name)]


def resized_shape(size: dict[str, int], height: int, width: int) -> tuple[int, int]:
    """Height and width after the resize of an image of some height and width.

    Args:
        size: as `Steps.resize`. The longer edge is rounded down, as in transformers and torchvision.
    """
    if "height" in size:
        return size["height"], size["width"]
    edge, short, long = size["shortest_edge"], min(height, width), max(height, width)
    other = int(edge * long / short)
    return (edge, other) if height <= width else (other, edge)
