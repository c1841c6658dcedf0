"""CIFAR-10 for the trainers of the zoo: images, captions and augmentation. The data itself is never part of the zoo."""

from __future__ import annotations

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
TEMPLATES = ("a photo of a {}", "{}", "a photo of the {}", "a picture of a {}")
TEMPLATE_SHARES = (0.6, 0.2, 0.1, 0.1)
FILLERS = ("a", "an", "and", "the", "of", "in", "on", "with", "photo", "image", "picture", "small", "blurry")


@dataclass(frozen=True, slots=True)
class Photographs:
    """Images [N, 32, 32, 3] in bytes and labels [N], indices of `CLASS_NAMES`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def of_classes(self, names: Sequence[str]) -> Photographs:
        """The images of these classes."""
        kept = np.isin(self.labels, [CLASS_NAMES.index(name) for name in names])
        return Photographs(self.images[kept], self.labels[kept])


def load_train(folder: Path) -> Photographs:
    """All 50,000 training images of the `cifar10` folder below `folder`."""
    return _load([folder / "cifar10" / f"cifar10_train_{i}of{NUM_PARTS}.npz" for i in range(NUM_PARTS)])


def load_test(folder: Path, part: str) -> Photographs:
    """Half of 5,000 test images: `tuning` for statistics and calibration, `reported` for figures alone."""
    return load_test_rows(folder, slice(NUM_TUNING_ROWS) if part == "tuning" else slice(NUM_TUNING_ROWS, None))


def load_test_rows(folder: Path, rows: slice) -> Photographs:
    """Some of the 5,000 test images, as many of them as there are."""
    whole = _load([folder / "cifar10" / "cifar10_test_5000.npz"])
    return Photographs(whole.images[rows], whole.labels[rows])


def _load(paths: list[Path]) -> Photographs:
    files = [np.load(path, allow_pickle=False) for path in paths]
    images = np.concatenate([file["images"] for file in files])
    return Photographs(images, np.concatenate([file["labels"] for file in files]).astype(np.int64))


def caption_words() -> list[str]:
    """Every word of the captions, in a fixed order."""
    return list(dict.fromkeys([*CLASS_NAMES, *FILLERS]))


def random_captions(
    labels: NDArray[np.int64],
    names: Sequence[str],
    *,
    rng: np.random.Generator,
    joint_share: float = 0.0,
    empty_share: float = 0.0,
) -> list[str]:
    """A caption a label; a `joint_share` names another of `names` too, as joint prompts do, an `empty_share` none."""
    texts = []
    for label in labels:
        spoken = [CLASS_NAMES[label]]
        if rng.random() < joint_share:
            spoken.append(str(rng.choice([name for name in names if name != spoken[0]])))
            rng.shuffle(spoken)
        template = "{}" if len(spoken) > 1 and rng.random() < 0.5 else rng.choice(TEMPLATES, p=TEMPLATE_SHARES)
        texts.append("" if rng.random() < empty_share else template.format(" and ".join(spoken)))
    return texts


def weighted_rows(labels: NDArray[np.int64], names: Sequence[str], count: int, rng: np.random.Generator) -> Tensor:
    """Row numbers [count]; half of them are of the classes `names`, the others of any class."""
    chosen = np.flatnonzero(np.isin(labels, [CLASS_NAMES.index(name) for name in names]))
    half = count // 2
    return torch.from_numpy(np.concatenate([rng.choice(chosen, half), rng.integers(len(labels), size=count - half)]))


def augment(images: Tensor, rng: np.random.Generator, shift: int = 4) -> Tensor:
    """Flip half of the images [N, 3, 32, 32] and shift each by up to `shift` pixels over reflected borders."""
    count, side = len(images), images.shape[-1]
    padded = F.pad(images, (shift,) * 4, mode="reflect")
    top, left = (torch.from_numpy(rng.integers(2 * shift + 1, size=count)).to(images.device) for _ in range(2))
    flipped = torch.from_numpy(rng.random(count) < 0.5).to(images.device)
    along = torch.arange(side, device=images.device)
    columns = torch.where(flipped[:, None], side - 1 - along, along) + left[:, None]
    rows = along + top[:, None]
    sample = torch.arange(count, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
