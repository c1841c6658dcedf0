"""A model's own image preprocessing, twice: exact on stored images, and differentiable on tensors.

Scores use the first, so that they equal what plain transformers computes from the stored file. Guidance uses the
second; on loading both are compared, because a resize that differs costs accuracy without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.models.runtime import loading

# PIL resizes and rounds to 8 bits, the tensor path does not; beyond this mean difference the paths disagree.
_MAX_MEAN_DIFFERENCE = 2.0 / 255
_FILTERS = {PIL.Image.Resampling.BILINEAR: "bilinear", PIL.Image.Resampling.BICUBIC: "bicubic"}


class Preprocessing:
    """The image processor in a model's folder.

    Raises:
        JobError: the folder has none, or one that the differentiable path cannot follow.
    """

    def __init__(self, folder: Path) -> None:
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self._matrices: dict[tuple[int, int], Tensor] = {}
        with loading(str(folder), "an image processor"):
            self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
            self._resize, self._crop = _sizes(self._processor, folder)
            self._mean = torch.tensor(_normalisation(self._processor, "image_mean", 0.0)).reshape(1, 3, 1, 1)
            self._std = torch.tensor(_normalisation(self._processor, "image_std", 1.0)).reshape(1, 3, 1, 1)
            self._check_agreement(folder)

    def of_images(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Model input [B, 3, h, w] of 8-bit images, exactly as plain transformers makes it."""
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"]

    def of_tensor(self, images: Tensor) -> Tensor:
        """Model input [B, 3, h, w] of images [B, 3, H, W] in [0, 1], differentiable."""
        height, width = images.shape[-2:]
        if self._resize is not None:
            images = self._resized(images, *_resized_shape(self._resize, height, width))
        if self._crop is not None:
            images = _centre_crop(images, *self._crop)
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
            mode = _FILTERS[PIL.Image.Resampling(int(self._processor.resample))]
            unit = torch.eye(old)[None, None]
            weights = torch.nn.functional.interpolate(unit, size=(new, old), mode=mode, antialias=True)[0, 0]
            self._matrices[old, new] = weights
        return self._matrices[old, new]

    def _check_agreement(self, folder: Path) -> None:
        rows, columns = np.mgrid[0:1:320j, 0:1:272j]
        channels = [rows, columns, 0.5 + 0.5 * np.sin(40 * rows * columns)]
        pixels = (np.stack(channels, -1) * 255).round().astype(np.uint8)
        exact = self.of_images([PIL.Image.fromarray(pixels)])
        ours = self.of_tensor(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        if exact.shape != ours.shape or ((exact - ours) * self._std).abs().mean() > _MAX_MEAN_DIFFERENCE:
            raise JobError(
                f"'{folder}': {type(self._processor).__name__} with these settings has no differentiable equivalent"
                " here; guidance would see other images than the classifier"
            )


def _sizes(processor: Any, folder: Path) -> tuple[dict[str, int] | None, tuple[int, int] | None]:
    """Resize target (`shortest_edge`, or `height` and `width`) and centre crop of a processor."""
    resize = _plain_size(processor, "size") if getattr(processor, "do_resize", False) else None
    crop = _plain_size(processor, "crop_size") if getattr(processor, "do_center_crop", False) else None
    share = getattr(processor, "crop_pct", None)
    if resize and share and "shortest_edge" in resize and resize["shortest_edge"] < 384:
        # ConvNeXT's processor: resize to size / crop_pct, then crop to size.
        edge = resize["shortest_edge"]
        resize, crop = {"shortest_edge": int(edge / share)}, {"height": edge, "width": edge}
    elif resize and share and "shortest_edge" in resize:
        resize = {"height": resize["shortest_edge"], "width": resize["shortest_edge"]}
    if resize is not None and PIL.Image.Resampling(int(processor.resample)) not in _FILTERS:
        raise JobError(f"'{folder}': only bilinear and bicubic resizing can be differentiated here")
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


def _centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    if top < 0 or left < 0:
        pad = (max(-left, 0), max(width - images.shape[-1] + left, 0))
        rows = (max(-top, 0), max(height - images.shape[-2] + top, 0))
        images, top, left = torch.nn.functional.pad(images, (*pad, *rows)), max(top, 0), max(left, 0)
    return images[..., top : top + height, left : left + width]
