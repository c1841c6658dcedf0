"""The real images that samples start from (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class StartImage:
    """The image that a sample starts from.

    Attributes:
        key: its name in its set.
        sha256: of its pixels, as the column `start_sha256` has it.
        class_index: its class.
        pixels: [H, W, 3], 8 bits, at the size of the pipeline's images.
    """

    key: str
    sha256: str
    class_index: int
    pixels: np.ndarray
