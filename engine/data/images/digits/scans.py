"""The 8 x 8 scans of digits, split once, as smooth strokes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SPLIT_SEED = 20240
SPLIT_SIZES = {"train": 1150, "validation": 300, "test": 347}

_CELLS = 8
_SUBCELLS = 6  # spline samples per cell of the scan
# Side of a scan without its margin, in spline samples.
SCAN_SIZE = _CELLS * _SUBCELLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Scans of one split: `glyphs` [N, 60, 60], smooth strokes in 0..1 with a margin of one cell, and `labels` [N]."""

    glyphs: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@cache
def load_sources(split: str) -> Sources:
    """The scans of `train`, `validation` or `test`: one stratified split with a fixed seed."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLIT_SIZES)}")
    scans, labels = load_digits(return_X_y=True)
    rows = _split_rows(labels)[split]
    padded = np.pad(scans[rows].reshape(-1, _CELLS, _CELLS) / 16.0, ((0, 0), (1, 1), (1, 1)))
    glyphs = zoom(padded, (1, _SUBCELLS, _SUBCELLS), order=3, grid_mode=True, mode="grid-constant")
    return Sources(glyphs=glyphs.clip(0, 1).astype(np.float32), labels=labels[rows].astype(np.int64))


def _split_rows(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    rows = np.arange(len(labels))
    rest, test = train_test_split(rows, test_size=SPLIT_SIZES["test"], stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=SPLIT_SIZES["validation"], stratify=labels[rest], random_state=SPLIT_SEED
    )
    return {"train": np.sort(train), "validation": np.sort(validation), "test": np.sort(test)}
