"""A model's own image preprocessing in two forms: exact on stored images, and differentiable on tensors.

Scores use the exact form, so that they equal what plain transformers computes from the stored file. Guidance uses the
differentiable form. Both are compared on loading, because a different resize would silently cost accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.models.configurations import TIMM_KEY, read_config
from engine.models.loading import loading
from engine.models.preprocessing_steps import Steps, processor_steps, resized_shape, timm_steps
from engine.models.processor_checks import check_processor

# PIL rounds to 8 bits after a resize, the tensor path does not; above this mean difference the two disagree.
_MAX_MEAN_DIFFERENCE = 2.0 / 255
# Portrait, square and landscape; smaller than most inputs, and larger.
_PROBE_SHAPES = ((320, 272), (48, 48), (150, 233))
_FILTERS = {PIL.Image.Resampling.BILINEAR: "bilinear", PIL.Image.Resampling.BICUBIC: "bicubic"}


class Preprocessing:
    """Preprocessing of a model, exact on images and differentiable on tensors.

    Args:
        where: the model, for messages.
        steps: the steps of the tensor path.
        exact: maps 8-bit images to model input [B, 3, h, w] by the model's own pipeline.

    Raises:
        JobError: the tensor path does not give what the model's own pipeline gives.
    """

    def __init__(self, where: str, steps: Steps, exact: Callable[[list[PIL.Image.Image]], Tensor]) -> None:
        self._constants: dict[tuple[str | tuple[int, int], torch.device, torch.dtype], Tensor] = {}
        self._steps = steps
        self._exact = exact
        self._mean = torch.tensor(steps.mean).reshape(1, 3, 1, 1)
        self._std = torch.tensor(steps.std).reshape(1, 3, 1, 1)
        if steps.resize is not None and steps.resample not in _FILTERS:
            raise JobError(f"'{where}': only bilinear and bicubic resizing are differentiable here")
        self._check_agreement(where)

    @classmethod
    def load(cls, folder: Path) -> Preprocessing:
        """The preprocessing of a model's folder, by its image processor.

        Raises:
            JobError: the folder has no image processor, or the tensor path does not support it.
        """
        model = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = None if TIMM_KEY in model else check_processor(folder, str(folder), model)
        import transformers

        options: dict[str, Any] = {"local_files_only": True}
        with loading(str(folder), "an image processor"):
            if kind is None:
                processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
                steps = timm_steps(processor, folder)
            else:
                # `AutoImageProcessor` of transformers 5 does not know the names of version 4 (`ViTFeatureExtractor`).
                processor = getattr(transformers, f"{kind}Pil").from_pretrained(folder, **options)
                steps = processor_steps(processor, kind)
            return cls(str(folder), steps, lambda images: processor(images=images, return_tensors="pt")["pixel_values"])

    @classmethod
    def plain(cls, where: str, steps: Steps) -> Preprocessing:
        """The preprocessing that the steps describe, as in torchvision: PIL's resize, crop, to [0, 1], normalise."""
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (steps.mean, steps.std))

        def exact(images: list[PIL.Image.Image]) -> Tensor:
            return torch.stack([(_cropped_pixels(image, steps) - mean) / std for image in images])

        return cls(where, steps, exact)

    def of_images(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Model input [B, 3, h, w] of 8-bit images, exactly as from the model's own pipeline."""
        return self._exact(list(images))

    def of_tensor(self, images: Tensor) -> Tensor:
        """Model input [B, 3, h, w] of images [B, 3, H, W] in [0, 1], differentiable."""
        height, width = images.shape[-2:]
        if self._steps.resize is not None:
            images = self._resized(images, *resized_shape(self._steps.resize, height, width))
        if self._steps.crop is not None:
            images = _centre_crop(images, *self._steps.crop, rounds=self._steps.rounds)
        images = images.flip(1) if self._steps.flips else images
        mean, std = (self._constant(name, images) for name in ("mean", "std"))
        return (images - mean) / std

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Values of black and of white in the model's input, each [1, 3, 1, 1]."""
        return -self._mean / self._std, (1 - self._mean) / self._std

    def _resized(self, images: Tensor, height: int, width: int) -> Tensor:
        if images.shape[-2:] == (height, width):
            return images
        # Two products with fixed matrices: an antialiased resize whose backward pass is deterministic.
        rows = self._constant((images.shape[-2], height), images)
        columns = self._constant((images.shape[-1], width), images)
        # PIL resizes along the width first, and clips the overshoot of a bicubic filter after each pass.
        return (rows @ (images @ columns.T).clamp(0, 1)).clamp(0, 1)

    def _constant(self, name: str | tuple[int, int], images: Tensor) -> Tensor:
        """Mean, standard deviation or a matrix, with the device and type of the images, where it is copied once."""
        key = (name, images.device, images.dtype)
        if key not in self._constants:
            made = self._matrix(*name) if isinstance(name, tuple) else {"mean": self._mean, "std": self._std}[name]
            self._constants[key] = made.to(images)
        return self._constants[key]

    def _matrix(self, old: int, new: int) -> Tensor:
        """The weights [new, old] of the resampling filter along one axis, antialiased as in PIL."""
        mode = _FILTERS[self._steps.resample]
        unit = torch.eye(old)[None, None]
        return torch.nn.functional.interpolate(unit, size=(new, old), mode=mode, antialias=True)[0, 0]

    def _check_agreement(self, where: str) -> None:
        if not all(self._agrees(height, width) for height, width in _PROBE_SHAPES):
            raise JobError(
                f"'{where}': its image processor with these settings has no differentiable equivalent here; guidance"
                " would see other images than the classifier"
            )

    def _agrees(self, height: int, width: int) -> bool:
        """Whether both paths give the same for a test image of some shape in pixels, up to rounding."""
        rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        channels = [rows, columns, 0.5 + 0.5 * np.sin(40 * rows * columns)]
        pixels = (np.stack(channels, -1) * 255).round().astype(np.uint8)
        exact = self.of_images([PIL.Image.fromarray(pixels)])
        tensor = self.of_tensor(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        return exact.shape == tensor.shape and bool(((exact - tensor) * self._std).abs().mean() <= _MAX_MEAN_DIFFERENCE)


def _cropped_pixels(image: PIL.Image.Image, steps: Steps) -> Tensor:
    """An image resized and cropped, [3, h, w] in [0, 1]."""
    image = image.convert("RGB")
    if steps.resize is not None:
        height, width = resized_shape(steps.resize, image.height, image.width)
        image = image.resize((width, height), steps.resample)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return pixels if steps.crop is None else _centre_crop(pixels, *steps.crop, rounds=steps.rounds)


def _centre_crop(images: Tensor, height: int, width: int, *, rounds: bool) -> Tensor:
    """The centre [..., height, width] of images [..., H, W]; smaller images are padded with black."""
    margins = (images.shape[-2] - height, images.shape[-1] - width)
    top, left = (round(margin / 2) if rounds else margin // 2 for margin in margins)
    if top < 0 or left < 0:
        pad = (max(-left, 0), max(width - images.shape[-1] + left, 0))
        rows = (max(-top, 0), max(height - images.shape[-2] + top, 0))
        images, top, left = torch.nn.functional.pad(images, (*pad, *rows)), max(top, 0), max(left, 0)
    return images[..., top : top + height, left : left + width]
