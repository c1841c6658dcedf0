"""Common corruptions of images after Hendrycks and Dietterich (2019): JPEG, noise, blur, brightness, contrast, pixels.

Six of the 75 of ImageNet-C, computed here with numpy and Pillow. Strengths are theirs: those of CIFAR-10-C for images
of at most 64 pixels a side, those of ImageNet-C for larger ones. Everything is a function of the image alone: the seed
of its noise is a digest of its pixels.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.data.images.decode import decode_rgb
from engine.data.images.image_source import LabelledImage, image_key

SEVERITIES = 5
MAX_SMALL_SIDE = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Corruption:
    """A corruption at a severity from 1 to 5."""

    name: str
    severity: int

    def __str__(self) -> str:
        return f"{self.name} {self.severity}"

    def apply(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The corrupted image, of the same size, in RGB."""
        record = CORRUPTIONS[self.name]
        strengths = record.small if max(image.size) <= MAX_SMALL_SIDE else record.large
        return record.change(image.convert("RGB"), strengths[self.severity - 1])


@dataclass(frozen=True, slots=True)
class CorruptionRecord:
    """How a corruption is made.

    Attributes:
        change: from an RGB image and a strength.
        small, large: strengths of severities 1 to 5, of CIFAR-10-C and of ImageNet-C.
    """

    change: Callable[[PIL.Image.Image, float], PIL.Image.Image]
    small: tuple[float, float, float, float, float]
    large: tuple[float, float, float, float, float]


def corrupted_item(corruption: Corruption, image: LabelledImage) -> LabelledImage:
    """An image in a corruption, whose name becomes its only context."""
    return dataclasses.replace(image, image=corruption.apply(image.image), contexts=(str(corruption),))


def _values(image: PIL.Image.Image) -> Floats:
    """[H, W, 3] in 0..1."""
    return np.asarray(image, dtype=np.float64) / 255


def _image(values: Floats) -> PIL.Image.Image:
    return PIL.Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _jpeg(image: PIL.Image.Image, quality: float) -> PIL.Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality))
    return decode_rgb(buffer.getvalue())


def _noise(image: PIL.Image.Image, deviation: float) -> PIL.Image.Image:
    rng = np.random.default_rng(int.from_bytes(image_key(image)[:8], "big"))
    values = _values(image)
    return _image(values + rng.normal(scale=deviation, size=values.shape))


def _blur(image: PIL.Image.Image, sigma: float) -> PIL.Image.Image:
    from scipy.ndimage import gaussian_filter

    return _image(gaussian_filter(_values(image), sigma=(sigma, sigma, 0), mode="nearest"))


def _brightness(image: PIL.Image.Image, added: float) -> PIL.Image.Image:
    """Added to the V of HSV, which is the largest of R, G and B; hue and saturation stay."""
    values = _values(image)
    brightest = values.max(-1, keepdims=True)
    wanted = (brightest + added).clip(0, 1)
    return _image(np.where(brightest > 0, values * wanted / np.maximum(brightest, 1e-9), wanted))


def _contrast(image: PIL.Image.Image, factor: float) -> PIL.Image.Image:
    values = _values(image)
    means = values.mean((0, 1), keepdims=True)
    return _image((values - means) * factor + means)


def _pixelate(image: PIL.Image.Image, share: float) -> PIL.Image.Image:
    width, height = (max(1, int(side * share)) for side in image.size)
    return image.resize((width, height), PIL.Image.Resampling.BOX).resize(image.size, PIL.Image.Resampling.BOX)


CORRUPTIONS: Mapping[str, CorruptionRecord] = {
    "jpeg": CorruptionRecord(_jpeg, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "gaussian noise": CorruptionRecord(_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian blur": CorruptionRecord(_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "brightness": CorruptionRecord(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": CorruptionRecord(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": CorruptionRecord(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
}
