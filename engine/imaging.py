"""From tensors to the stored file and back: rounding to 8 bits, deterministic encoding."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import PIL.Image
import torch
from torch import Tensor

# PNG and WebP are lossless; JPEG at the quality that moves classifier scores least.
_OPTIONS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG", "compress_level": 6},
    "webp": {"format": "WEBP", "lossless": True, "method": 4},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
LOSSLESS = ("png", "webp")


def quantise(images: Tensor) -> np.ndarray:
    """8-bit pixels [B, H, W, 3] of images [B, 3, H, W] in [0, 1]: rounded, not truncated."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def encode(pixels: np.ndarray, image_format: str) -> bytes:
    """The image file of 8-bit pixels [H, W, 3]; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, **_OPTIONS[image_format])  # type: ignore[arg-type]
    return buffer.getvalue()


def stored(pixels: np.ndarray, image_format: str) -> tuple[list[Callable[[], bytes]], list[PIL.Image.Image]]:
    """What becomes the files of 8-bit pixels [B, H, W, 3], and the images as a reader of these files will see them.

    A lossless format gives back its pixels, so that nobody needs to wait for the files; JPEG must be encoded first.
    """
    if image_format in LOSSLESS:
        return [partial(encode, one, image_format) for one in pixels], [PIL.Image.fromarray(one) for one in pixels]
    files = [encode(one, image_format) for one in pixels]
    return [partial(bytes, file) for file in files], [decode(file) for file in files]


def decode(data: bytes) -> PIL.Image.Image:
    """The RGB image in a file, as any reader sees it."""
    return PIL.Image.open(io.BytesIO(data)).convert("RGB")
