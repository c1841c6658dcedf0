"""A model's own image preprocessing, twice: exact on stored images, and differentiable on tensors.

Scores use the first, so that they equal what plain transformers computes from the stored file. Guidance uses the
second; on loading both are compared, because a resize that differs costs accuracy without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.models.configurations import TIMM_KEY, read_config
from engine.models.loading import loading
from engine.models.processor_checks import check_processor
from engine.models.processor_classes import UNCROPPED
from engine.models.timm_checks import check_timm_transform

# PIL resizes and rounds to 8 bits, the tensor path does not; beyond this mean difference the paths disagree.
_MAX_MEAN_DIFFERENCE = 2.0 / 255
# Not square either way, and square: smaller than most inputs, and larger.
_PROBE_SHAPES = ((320, 272), (48, 48), (150, 233))
_FILTERS = {PIL.Image.Resampling.BILINEAR: "bilinear", PIL.Image.Resampling.BICUBIC: "bicubic"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What is done to an image: resize, crop at its centre, normalise.

    Attributes:
        resize: `shortest_edge`, or `height` and `width`; None for none.
        crop: height and width; None for none.
        resample: the filter of the resize.
        rounds: whether half a pixel of an uneven margin is rounded to even, as in torchvision, or down.
        flips: whether the network takes blue first.
    """

    resize: dict[str, int] | None
    crop: tuple[int, int] | None
    resample: PIL.Image.Resampling
    mean: Sequence[float]
    std: Sequence[float]
    rounds: bool = False
    flips: bool = False


class Preprocessing:
    """Preprocessing of a model, exact on images and differentiable on tensors.

    Args:
        where: whose it is, for messages.
        steps: what the tensor path does.
        exact: model input [B, 3, h, w] of 8-bit images, by the model's own pipeline.

    Raises:
        JobError: the tensor path does not do what the pipeline does.
    """

    def __init__(self, where: str, steps: Steps, exact: Callable[[list[PIL.Image.Image]], Tensor]) -> None:
        self._matrices: dict[tuple[int, int], Tensor] = {}
        self._steps = steps
        self._exact = exact
        self._mean = torch.tensor(steps.mean).reshape(1, 3, 1, 1)
        self._std = torch.tensor(steps.std).reshape(1, 3, 1, 1)
        if steps.resize is not None and steps.resample not in _FILTERS:
            raise JobError(f"'{where}': only bilinear and bicubic resizing can be differentiated here")
        self._check_agreement(where)

    @classmethod
    def load(cls, folder: Path) -> Preprocessing:
        """That of a model's folder, by the image processor in it.

        Raises:
            JobError: the folder has none, or one that the differentiable path cannot follow.
        """
        model = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = None if TIMM_KEY in model else check_processor(folder, str(folder), model)
        import transformers

        options: dict[str, Any] = {"local_files_only": True}
        with loading(str(folder), "an image processor"):
            if kind is None:
                processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
                steps = _timm_steps(processor, folder)
            else:
                # `AutoImageProcessor` of transformers 5 does not know the names that 4 wrote (`ViTFeatureExtractor`).
                processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder, **options)
                steps = _steps(processor, kind)
            return cls(str(folder), steps, lambda images: processor(images=images, return_tensors="pt")["pixel_values"])

    @classmethod
    def plain(cls, where: str, steps: Steps) -> Preprocessing:
        """That which steps describe: PIL's resize, a crop, float32 in [0, 1], normalisation, as in torchvision."""
        mean, std = (torch.tensor(one).reshape(3, 1, 1) for one in (steps.mean, steps.std))

        def exact(images: list[PIL.Image.Image]) -> Tensor:
            return torch.stack([(_cropped_pixels(image, steps) - mean) / std for image in images])

        return cls(where, steps, exact)

    def of_images(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Model input [B, 3, h, w] of 8-bit images, exactly as the model's own pipeline makes it."""
        return self._exact(list(images))

    def of_tensor(self, images: Tensor) -> Tensor:
        """Model input [B, 3, h, w] of images [B, 3, H, W] in [0, 1], differentiable."""
        height, width = images.shape[-2:]
        if self._steps.resize is not None:
            images = self._resized(images, *_resized_shape(self._steps.resize, height, width))
        if self._steps.crop is not None:
            images = _centre_crop(images, *self._steps.crop, rounds=self._steps.rounds)
        images = images.flip(1) if self._steps.flips else images
        return (images - self._mean.to(images)) / self._std.to(images)

    def _resized(self, images: Tensor, height: int, width: int) -> Tensor:
        if images.shape[-2:] == (height, width):
            return images
        # Two fixed products give the antialiased resize with a deterministic backward pass.
        rows = self._matrix(images.shape[-2], height).to(images)
        columns = self._matrix(images.shape[-1], width).to(images)
        # PIL resizes the columns first and clips the overshoot of a bicubic filter after each pass.
        return (rows @ (images @ columns.T).clamp(0, 1)).clamp(0, 1)

    def _matrix(self, old: int, new: int) -> Tensor:
        """[new, old] weights of the processor's resampling filter, antialiased as in PIL."""
        if (old, new) not in self._matrices:
            mode = _FILTERS[self._steps.resample]
            unit = torch.eye(old)[None, None]
            weights = torch.nn.functional.interpolate(unit, size=(new, old), mode=mode, antialias=True)[0, 0]
            self._matrices[old, new] = weights
        return self._matrices[old, new]

    def _check_agreement(self, where: str) -> None:
        if not all(self._agrees(height, width) for height, width in _PROBE_SHAPES):
            raise JobError(
                f"'{where}': its image processor with these settings has no differentiable equivalent here; guidance"
                " would see other images than the classifier"
            )

    def _agrees(self, height: int, width: int) -> bool:
        """Whether an image of some shape comes out of both paths alike."""
        rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        channels = [rows, columns, 0.5 + 0.5 * np.sin(40 * rows * columns)]
        pixels = (np.stack(channels, -1) * 255).round().astype(np.uint8)
        exact = self.of_images([PIL.Image.fromarray(pixels)])
        ours = self.of_tensor(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        return exact.shape == ours.shape and bool(((exact - ours) * self._std).abs().mean() <= _MAX_MEAN_DIFFERENCE)


def _cropped_pixels(image: PIL.Image.Image, steps: Steps) -> Tensor:
    """An image resized and cropped, [3, h, w] in [0, 1]."""
    image = image.convert("RGB")
    if steps.resize is not None:
        height, width = _resized_shape(steps.resize, image.height, image.width)
        image = image.resize((width, height), steps.resample)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return pixels if steps.crop is None else _centre_crop(pixels, *steps.crop, rounds=steps.rounds)


def _steps(processor: Any, kind: str) -> Steps:
    """What an image processor of transformers does, of a class that is followed."""
    resize, crop = _sizes(processor, kind)
    resample = PIL.Image.Resampling(int(processor.resample)) if resize else PIL.Image.Resampling.BILINEAR
    mean, std = _normalisation(processor, "image_mean", 0.0), _normalisation(processor, "image_std", 1.0)
    if kind == "EfficientNetImageProcessor" and processor.include_top:
        # Divided once more.
        std = [one * float(more) for one, more in zip(std, processor.image_std, strict=True)]
    flips = kind == "MobileViTImageProcessor" and bool(processor.do_flip_channel_order)
    return Steps(resize=resize, crop=crop, resample=resample, mean=mean, std=std, flips=flips)


def _timm_steps(processor: Any, folder: Path) -> Steps:
    """What timm's transform for evaluation does: its `data_config` says it.

    Raises:
        JobError: it crops at random, or pads to a border.
    """
    config = processor.data_config
    check_timm_transform(config, str(folder))
    height, width = config["input_size"][1:]
    edges = [math.floor(one / config["crop_pct"]) for one in (height, width)]
    return Steps(
        resize=(
            {"shortest_edge": edges[0]} if config["crop_mode"] == "center" else {"height": edges[0], "width": edges[1]}
        ),
        crop=(height, width),
        resample=PIL.Image.Resampling[config["interpolation"].upper()],
        mean=[float(one) for one in config["mean"]],
        std=[float(one) for one in config["std"]],
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
        scaled = [int(one / processor.crop_pct) for one in resize.values()]
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


def _resized_shape(size: dict[str, int], height: int, width: int) -> tuple[int, int]:
    if "height" in size:
        return size["height"], size["width"]
    edge, short, long = size["shortest_edge"], min(height, width), max(height, width)
    other = int(edge * long / short)
    return (edge, other) if height <= width else (other, edge)


def _centre_crop(images: Tensor, height: int, width: int, *, rounds: bool) -> Tensor:
    margins = (images.shape[-2] - height, images.shape[-1] - width)
    top, left = (round(one / 2) if rounds else one // 2 for one in margins)
    if top < 0 or left < 0:
        pad = (max(-left, 0), max(width - images.shape[-1] + left, 0))
        rows = (max(-top, 0), max(height - images.shape[-2] + top, 0))
        images, top, left = torch.nn.functional.pad(images, (*pad, *rows)), max(top, 0), max(left, 0)
    return images[..., top : top + height, left : left + width]
