"""Contexts of photographs: what a caption can say beside the class.

Brightness, colour of the ground and blur are measured on the image itself, by a few lines of arithmetic. Photographs of
32 pixels are hardly ever blurred, and what they show is in the middle and fills most of them; so copies of some are
blurred, or framed anew about the object: closer, from afar, or with the object on one side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from cifar10_data import stacked
from numpy.typing import NDArray
from torch import Tensor
from training import batches

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]

GROUND_COLOURS = ("black", "grey", "white", "brown", "green", "blue")
# Of each attribute: nothing said, and what can be said.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "brightness": ("", "dark", "bright"),
    "ground": ("", *(f"{colour} background" for colour in GROUND_COLOURS)),
    "sharpness": ("", "blurry"),
    "distance": ("", "far away", "close up"),
    "side": ("", "on the left", "on the right"),
}
FAR, NEAR = (ATTRIBUTES["distance"].index(name) for name in ("far away", "close up"))
LEFT, RIGHT = (ATTRIBUTES["side"].index(name) for name in ("on the left", "on the right"))
# Of the photographs are called dark, and as many bright.
EXTREME_SHARE = 0.2
# Of the photographs are less sharp than what is called blurry; nearly all blurred copies are.
BLURRED_SHARE = 0.01
_REACH = 4  # Pixels over which an edge may rise.
_FRAME = 4  # Pixels from the border that count as ground.
_GROUND_SHARE = 0.6  # Of the frame that must have one colour.
_PLAIN_DEVIATION = 0.06  # Of the frame's luma: what is shrunk must go on beyond its borders.
_LUMA = np.array([0.299, 0.587, 0.114])
# Sides of the windows that copies are cut out of, and where in them the object's middle is wanted.
_NEAR_SIDE, _SIDE_SIDE, _FAR_SIDE = 19.0, 23.0, 46.0
_OFF_CENTRE = 0.28
_STILL_CENTRED = 0.4


@dataclass(frozen=True, slots=True)
class Measures:
    """What was measured on N images.

    Attributes:
        brightness: mean luma, 0 to 1.
        sharpness: how much of what changes over a few pixels changes between neighbours, 0 to about 2.
        ground: index of the colour in `ATTRIBUTES`.
    """

    brightness: Floats
    sharpness: Floats
    ground: Indices

    def first(self, count: int) -> Measures:
        """Of the first images."""
        return Measures(**{field.name: getattr(self, field.name)[:count] for field in fields(self)})


def measure(images: Bytes) -> Measures:
    """Measure images [N, 32, 32, 3]."""
    parts = [_measure(images[part]) for part in batches(len(images), 2000)]
    names = [field.name for field in fields(Measures)]
    return Measures(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _measure(images: Bytes) -> Measures:
    luma = images @ _LUMA / 255
    return Measures(luma.mean((1, 2)), edge_sharpness(luma), ground_colours(images))


def edge_sharpness(luma: Floats) -> Floats:
    """Squared differences of neighbours over those across `_REACH` pixels, of luma [N, H, W]: 0.25 at a clean edge."""

    def energy(reach: int) -> Floats:
        across, down = luma[:, :, reach:] - luma[:, :, :-reach], luma[:, reach:] - luma[:, :-reach]
        return np.asarray((across**2).mean((1, 2)) + (down**2).mean((1, 2)))

    return energy(1) / (energy(_REACH) + 1e-4)


def ground_colours(images: Bytes) -> Indices:
    """The colour that most pixels of the frame have, as an index; 0 where none has `_GROUND_SHARE`."""
    names = colour_names(images[:, _frame(images)])
    shares = np.stack([(names == index).mean(1) for index in range(len(GROUND_COLOURS))], axis=1)
    return np.where(shares.max(1) >= _GROUND_SHARE, shares.argmax(1) + 1, 0)


def is_plain(images: Bytes) -> NDArray[np.bool_]:
    """Whether the frame of each image has one colour and hardly any structure, [N]."""
    deviation = (images[:, _frame(images)] @ _LUMA / 255).std(1)
    return (deviation < _PLAIN_DEVIATION) & (ground_colours(images) > 0)


def _frame(images: Bytes) -> NDArray[np.bool_]:
    frame = np.ones(images.shape[1:3], bool)
    frame[_FRAME:-_FRAME, _FRAME:-_FRAME] = False
    return frame


def colour_names(pixels: Bytes) -> Indices:
    """Index of `GROUND_COLOURS` of each pixel [..., 3]; -1 for reds, oranges, yellows and purples that are vivid."""
    values = pixels / 255.0
    high, low = values.max(-1), values.min(-1)
    chroma = high - low
    saturation = chroma / np.maximum(high, 1e-6)
    red, green, blue = np.moveaxis(values, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        hue = np.select(
            [high == red, high == green],
            [(green - blue) / chroma % 6, (blue - red) / chroma + 2],
            (red - green) / chroma + 4,
        )
    hue = np.nan_to_num(hue) * 60
    is_warm = (hue < 55) | (hue > 345)
    return np.select(
        [
            high < 0.2,
            (saturation < 0.15) & (high > 0.8),
            saturation < 0.15,
            (hue >= 60) & (hue < 165),
            (hue >= 165) & (hue < 265),
            is_warm & ((high < 0.75) | (saturation < 0.5)),
        ],
        [0, 2, 1, 4, 5, 3],
        -1,
    )


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What is called dark, bright and blurry."""

    dark_below: float
    bright_above: float
    blurry_below: float

    @classmethod
    def of(cls, measures: Measures) -> Thresholds:
        """Those of photographs as they are."""
        dark, bright = np.quantile(measures.brightness, (EXTREME_SHARE, 1 - EXTREME_SHARE))
        blurry = np.quantile(measures.sharpness, BLURRED_SHARE)
        return cls(*(round(float(value), 4) for value in (dark, bright, blurry)))

    def contexts(self, measures: Measures, distance: Indices | None = None, side: Indices | None = None) -> Contexts:
        """The value of each attribute of each image; distance and side are known of copies alone.

        What was enlarged is less sharp for that, and not called blurry.
        """
        unknown = np.zeros(len(measures.brightness), np.int64)
        distance, side = unknown if distance is None else distance, unknown if side is None else side
        is_enlarged = (distance == NEAR) | (side > 0)
        brightness = np.where(measures.brightness > self.bright_above, 2, measures.brightness < self.dark_below)
        return Contexts(
            brightness=brightness,
            ground=measures.ground,
            sharpness=((measures.sharpness < self.blurry_below) & ~is_enlarged).astype(np.int64),
            distance=distance,
            side=side,
        )


@dataclass(frozen=True, slots=True)
class Contexts:
    """Indices [N] of the values in `ATTRIBUTES`."""

    brightness: Indices
    ground: Indices
    sharpness: Indices
    distance: Indices
    side: Indices

    def __len__(self) -> int:
        return len(self.brightness)

    def phrases(self, row: int) -> list[str]:
        """What a caption can say of one image."""
        named = ((values, getattr(self, name)[row]) for name, values in ATTRIBUTES.items())
        return [values[index] for values, index in named if index]


def context_words() -> list[str]:
    """Every word of the phrases, in a fixed order."""
    return list(dict.fromkeys(word for values in ATTRIBUTES.values() for value in values for word in value.split()))


def middles(activation: Floats, size: int = 32) -> Floats:
    """Where objects are, in pixels [N, 2] of column and row, by class activation maps [N, S, S]."""
    along = (np.arange(activation.shape[-1]) + 0.5) / activation.shape[-1] * size
    density = activation / (activation.sum((1, 2), keepdims=True) + 1e-9)
    return np.stack([density.sum(1) @ along, density.sum(2) @ along], axis=1)


def close_ups(images: Bytes, centres: Floats) -> Bytes:
    """The middle of the object enlarged, of images whose object is at `centres` [N, 2]."""
    return _windows(images, _inside(centres - _NEAR_SIDE / 2, _NEAR_SIDE), _NEAR_SIDE)


def on_one_side(images: Bytes, centres: Floats, *, left: bool) -> tuple[Bytes, NDArray[np.bool_]]:
    """Cut so that the object is on one side; and where that was possible, [N]."""
    wanted = np.array([_OFF_CENTRE if left else 1 - _OFF_CENTRE, 0.5]) * _SIDE_SIDE
    corners = _inside(centres - wanted, _SIDE_SIDE)
    place = (centres[:, 0] - corners[:, 0]) / _SIDE_SIDE
    return _windows(images, corners, _SIDE_SIDE), place < _STILL_CENTRED if left else place > 1 - _STILL_CENTRED


def from_afar(images: Bytes, rng: np.random.Generator) -> Bytes:
    """Images with a plain frame, shrunk and put anywhere on their ground."""
    corners = -rng.uniform(0.15, 0.85, (len(images), 2)) * (_FAR_SIDE - images.shape[1])
    return _windows(images, corners, _FAR_SIDE)


def _inside(corners: Floats, side: float, size: int = 32) -> Floats:
    return np.clip(corners, 0, size - side)


def _windows(images: Bytes, corners: Floats, side: float) -> Bytes:
    """Square windows at `corners` [N, 2] of column and row, at the size of the images; beyond, borders go on."""
    size, found = images.shape[1], []
    for part in batches(len(images), 2000):
        pixels = stacked(images[part], "cpu").float()
        maps = torch.zeros(len(pixels), 2, 3)
        maps[:, 0, 0] = maps[:, 1, 1] = side / size
        maps[:, :, 2] = torch.from_numpy((corners[part] + side / 2) / size * 2 - 1)
        grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
        mode = "bicubic" if side < size else "bilinear"
        pixels = _smoothed(pixels) if side > size else pixels
        drawn: Tensor = F.grid_sample(pixels, grid, mode=mode, padding_mode="border", align_corners=False)
        found.append(drawn.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(found) if found else images[:0]


def _smoothed(pixels: Tensor) -> Tensor:
    """A little, so that nothing flickers when every second pixel is left out."""
    kernel = torch.tensor([0.2, 0.6, 0.2])
    weights = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(pixels, (1,) * 4, mode="replicate"), weights, groups=3)
