"""CIFAR-10 for the trainers of the zoo: images, captions and augmentation. The data itself is never part of the zoo."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_PARTS = 8
NUM_TUNING_ROWS = 2500


@dataclass(frozen=True, slots=True)
class Photographs:
    """Images [N, 32, 32, 3] in bytes and labels [N], indices of `CLASS_NAMES`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def of_classes(self, names: Sequence[str]) -> Photographs:
        """The images of these classes."""
        kept = np.isin(self.labels, [CLASS_NAMES.index(name) for name in names])
        return Photographs(self.images[kept], self.labels[kept])


def check_data(folder: Path) -> None:
    """End the program where a file of CIFAR-10 is missing below `folder` or is none."""
    for path in [*_train_files(folder), _test_file(folder)]:
        try:
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["images"], file["labels"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            reason = error.strerror if isinstance(error, OSError) else "no arrays `images` and `labels` can be read"
            raise SystemExit(f"error: --data: {path}: {reason}") from None
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8 or not len(labels):
            found = f"images are {images.dtype} {images.shape}"
            raise SystemExit(f"error: --data: {path}: {found}, not bytes [N, 32, 32, 3]")


def _train_files(folder: Path) -> list[Path]:
    return [folder / "cifar10" / f"cifar10_train_{i}of{NUM_PARTS}.npz" for i in range(NUM_PARTS)]


def _test_file(folder: Path) -> Path:
    return folder / "cifar10" / "cifar10_test_5000.npz"


def load_train(folder: Path) -> Photographs:
    """All 50,000 training images of the `cifar10` folder below `folder`."""
    return _load(_train_files(folder))


def load_test(folder: Path, part: str) -> Photographs:
    """Half of 5,000 test images: `tuning` for statistics and calibration, `reported` for figures alone."""
    return load_test_rows(folder, slice(NUM_TUNING_ROWS) if part == "tuning" else slice(NUM_TUNING_ROWS, None))


def load_test_rows(folder: Path, rows: slice) -> Photographs:
    """Some of the 5,000 test images, as many of them as there are."""
    whole = _load([_test_file(folder)])
    return Photographs(whole.images[rows], whole.labels[rows])


def _load(paths: list[Path]) -> Photographs:
    files = [np.load(path, allow_pickle=False) for path in paths]
    images = np.concatenate([file["images"] for file in files])
    return Photographs(images, np.concatenate([file["labels"] for file in files]).astype(np.int64))


def weighted_rows(labels: NDArray[np.int64], names: Sequence[str], count: int, rng: np.random.Generator) -> Tensor:
    """Row numbers [count]; half of them are of the classes `names`, the others of any class."""
    chosen = np.flatnonzero(np.isin(labels, [CLASS_NAMES.index(name) for name in names]))
    half = count // 2
    return torch.from_numpy(np.concatenate([rng.choice(chosen, half), rng.integers(len(labels), size=count - half)]))


def stacked(images: NDArray[np.uint8], device: str) -> Tensor:
    """[N, 32, 32, 3] bytes as bytes [N, 3, 32, 32] on the device."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


def scaled(images: Tensor) -> Tensor:
    """Bytes as -1..1."""
    return images.float() / 127.5 - 1


def augment(images: Tensor, rng: np.random.Generator, shift: int = 4, *, flip: bool = True) -> Tensor:
    """Flip half of the images [N, 3, 32, 32] and shift each by up to `shift` pixels over reflected borders."""
    count, side = len(images), images.shape[-1]
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    top, left = (torch.from_numpy(rng.integers(2 * shift + 1, size=count)).to(images.device) for _ in range(2))
    flipped = torch.from_numpy(rng.random(count) < 0.5 * flip).to(images.device)
    along = torch.arange(side, device=images.device)
    columns = torch.where(flipped[:, None], side - 1 - along, along) + left[:, None]
    rows = along + top[:, None]
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cut_out(images: Tensor, rng: np.random.Generator, side: int = 8) -> Tensor:
    """A square of each image [N, 3, H, W] in -1..1 becomes grey (DeVries and Taylor 2017)."""
    count, height, width = len(images), *images.shape[-2:]
    middles = [torch.from_numpy(rng.integers(size, size=count)).to(images.device) for size in (height, width)]
    rows, columns = (
        (torch.arange(size, device=images.device) - middle[:, None] + side // 2) // side == 0
        for size, middle in zip((height, width), middles, strict=True)
    )
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def distort(images: Tensor, rng: np.random.Generator, share: float = 0.5) -> Tensor:
    """A `share` of the images [N, 3, 32, 32] in -1..1 is darkened or lit, blurred, cropped or recoloured, one of them.

    Args:
        rng: of the choices; the strengths are uniform.
    """
    chosen = np.where(rng.random(len(images)) < share, rng.integers(len(_DISTORTIONS), size=len(images)), -1)
    images = images.clone()
    for index, change in enumerate(_DISTORTIONS):
        rows = torch.from_numpy(np.flatnonzero(chosen == index)).to(images.device)
        if len(rows):
            images[rows] = change(images[rows], rng)
    return images


def _uniform(low: float, high: float, shape: tuple[int, ...], rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape)).to(like)


def _relight(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Gamma from 0.4 (bright) to 2.5 (dark)."""
    gamma = _uniform(np.log(0.4), np.log(2.5), (len(images), 1, 1, 1), rng, images).exp()
    return ((images + 1) / 2).clamp(0, 1) ** gamma * 2 - 1


def blur(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean over 5 x 5 pixels of byte images [N, 32, 32, 3]."""
    return _box(stacked(images, "cpu").float()).round().byte().permute(0, 2, 3, 1).numpy()


def _box(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (2,) * 4, mode="replicate"), 5, stride=1)


def _blur(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Between the image and its mean over 5 x 5 pixels."""
    return images + _uniform(0.3, 1.0, (len(images), 1, 1, 1), rng, images) * (_box(images) - images)


def _crop(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A square of half to all of the side, anywhere, enlarged."""
    sides = _uniform(0.5, 1.0, (len(images),), rng, images)
    places = _uniform(-1.0, 1.0, (len(images), 2), rng, images) * (1 - sides)[:, None]
    maps = torch.zeros(len(images), 2, 3).to(images)
    maps[:, 0, 0] = maps[:, 1, 1] = sides
    maps[:, :, 2] = places
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _recolour(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Towards or away from grey, and each colour by a factor of its own."""
    grey = images.mean(1, keepdim=True)
    saturated = grey + _uniform(0.0, 1.8, (len(images), 1, 1, 1), rng, images) * (images - grey)
    factors = _uniform(0.6, 1.4, (len(images), 3, 1, 1), rng, images)
    return ((saturated + 1) * factors - 1).clamp(-1, 1)


_DISTORTIONS = (_relight, _blur, _crop, _recolour)
