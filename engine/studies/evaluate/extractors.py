"""Features that distances between sets of images are measured in: of CLIP, of DINOv2, or of the Inception of FID."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from engine.errors import JobError, first_line
from engine.methods.neighbours import unit_features
from engine.models.clip import Clip, ImageEncoder, load_image_encoder
from engine.models.kernels import full_float32

# Of `--features`; anything else is the address of an encoder.
KINDS = ("auto", "clip", "inception")
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_SIDE = 299
INCEPTION_NAME = "Inception"
_SOUGHT = (
    f"give the TorchScript file {INCEPTION_FILE} of the FID and clean-fid programs, or a folder that holds it, or put"
    " it into TORCH_HOME; it is never downloaded"
)


class Extractor(Protocol):
    """Computes features of images.

    Attributes:
        name: by which figures are named.
    """

    name: str

    def features(self, images: Sequence[PIL.Image.Image], clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [B, D] of images of any size, whose CLIP embeddings [B, d] are known."""
        ...


class ClipFeatures:
    """CLIP embeddings of length sqrt(d), so that the cubic kernel of two is `(cosine + 1)^3`."""

    def __init__(self, address: str) -> None:
        self.name = f"CLIP {address}"

    def features(self, images: Sequence[PIL.Image.Image], clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """The given embeddings [B, d], scaled to that length."""
        return _scaled(clip)


class EncoderFeatures:
    """Embeddings by a model of the user's choice, such as DINOv2, of the length of `ClipFeatures`."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.name = encoder.name
        self._encoder = encoder

    def features(self, images: Sequence[PIL.Image.Image], clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [B, D] of 8-bit images; NaN in rows that are not finite or have no direction."""
        return _scaled(unit_features(self._encoder.image_embeds(images)).numpy())


def _scaled(unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings [B, d] of length one, at length sqrt(d)."""
    return unit * np.float32(np.sqrt(unit.shape[1]))


class Inception:
    """The Inception network of FID in TorchScript, 2,048 features, with the resizing of clean-fid.

    Parmar et al., "On aliased resizing and surprising subtleties in GAN evaluation" (CVPR 2022): bicubic with
    antialiasing to 299 x 299 in float, then (x - 128) / 128.

    Raises:
        JobError: the file cannot be opened, or is not this network.
    """

    name = INCEPTION_NAME

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._device = device
        try:
            # TorchScript is a program, not a pickle; it comes from the user's own folder.
            self._layers: Any = torch.jit.load(str(path), map_location=device).eval().layers
        except (RuntimeError, OSError, ValueError, AttributeError) as error:
            reason = first_line(error)[:200]
            raise JobError(f"--inception: '{path}' is not the Inception of FID ({reason}); {_SOUGHT}") from None

    @torch.no_grad()
    def features(self, images: Sequence[PIL.Image.Image], clip: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [B, 2048] of 8-bit images."""
        pixels = np.stack([_resized(image) for image in images])
        inputs = ((torch.from_numpy(pixels) - 128) / 128).to(self._device)
        with full_float32(self._device):
            layers = self._layers(inputs)
        return np.asarray(layers.reshape(len(images), -1).float().cpu().numpy())


def _resized(image: PIL.Image.Image) -> NDArray[np.float32]:
    """An image [3, 299, 299] in [0, 255], each channel resized as float."""
    size = (INCEPTION_SIDE, INCEPTION_SIDE)
    channels = [
        np.asarray(
            PIL.Image.fromarray(np.asarray(channel, dtype=np.float32)).resize(size, PIL.Image.Resampling.BICUBIC)
        )
        for channel in image.convert("RGB").split()
    ]
    return np.stack(channels)


def find_inception(place: str | None) -> Path | None:
    """The file of the Inception network: the given path, else in TORCH_HOME, or None.

    Raises:
        JobError: a path was given, and there is no such file.
    """
    home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser()
    if place is None:
        paths = [folder / INCEPTION_FILE for folder in (home, home / "hub" / "checkpoints", home / "checkpoints")]
        return next((path for path in paths if path.is_file()), None)
    path = Path(place).expanduser()
    path = path / INCEPTION_FILE if path.is_dir() else path
    if not path.is_file():
        raise JobError(f"--inception: there is no file '{path}'; {_SOUGHT}")
    return path


def choose_extractor(kind: str, clip: Clip, inception: str | None, device: str) -> Extractor:
    """The extractor that was asked for; `auto` takes Inception where its file is on this machine.

    Args:
        kind: `auto`, `clip`, `inception`, or the address of an image encoder.

    Raises:
        JobError: Inception was asked for and is not here, or the encoder cannot be loaded.
    """
    if kind not in KINDS:
        try:
            return EncoderFeatures(load_image_encoder(kind, device))
        except JobError as error:
            raise JobError([f"--features: {problem}" for problem in error.problems]) from None
    path = None if kind == "clip" else find_inception(inception)
    if path is not None:
        return Inception(path, device)
    if kind == "inception":
        raise JobError(f"--features: inception has no weights on this machine; {_SOUGHT}, or use --features clip")
    return ClipFeatures(clip.name)
