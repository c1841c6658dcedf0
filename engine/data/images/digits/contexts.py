"""How a digit is drawn: ink and background colour, background texture, size and position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (14, 14, 14),
    "gray": (125, 125, 125),
    "red": (215, 40, 45),
    "green": (35, 150, 65),
    "blue": (60, 100, 230),
    "yellow": (240, 210, 45),
    "purple": (165, 60, 200),
}
INKS = ("white", "black", "red", "green", "blue", "yellow", "purple")
BACKGROUNDS = ("black", "white", "gray", "red", "green", "blue", "yellow")
TEXTURES = ("plain", "striped", "checkered", "speckled")
SIZES = ("normal", "small", "large")
POSITIONS = ("centre", "top left", "top right", "bottom left", "bottom right")

_MIN_CONTRAST = 0.36


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """How N samples are drawn: indices into `INKS`, `BACKGROUNDS`, `TEXTURES`, `SIZES` and `POSITIONS`, each [N]."""

    ink: NDArray[np.int64]
    background: NDArray[np.int64]
    texture: NDArray[np.int64]
    size: NDArray[np.int64]
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ink)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Contexts:
        """The given rows, by index or by mask."""
        return Contexts(**{name: getattr(self, name)[rows] for name in self.__slots__})

    @property
    def is_plain(self) -> NDArray[np.bool_]:
        """True where every attribute has its default (white ink, black plain background, normal size, centre)."""
        return (self.ink + self.background + self.texture + self.size + self.position) == 0


@cache
def allowed_pairs() -> NDArray[np.int64]:
    """The (ink, background) index pairs with enough contrast to read, [P, 2]."""
    weights = np.sqrt([0.30, 0.59, 0.11])
    pairs = []
    for i, ink in enumerate(INKS):
        for b, background in enumerate(BACKGROUNDS):
            difference = (np.array(COLOURS[ink]) - COLOURS[background]) / 255.0
            if np.linalg.norm(difference * weights) >= _MIN_CONTRAST:
                pairs.append((i, b))
    return np.array(pairs)


def default_ink(background: str) -> str:
    """The ink of a caption that names a background only."""
    return "black" if background in ("white", "yellow") else "white"


def default_background(ink: str) -> str:
    """The background of a caption that names an ink only."""
    return "white" if ink == "black" else "black"


def plain_contexts(count: int) -> Contexts:
    """`count` times the default context."""
    return Contexts(**{name: np.zeros(count, dtype=np.int64) for name in Contexts.__slots__})


def random_contexts(
    count: int, *, rng: np.random.Generator, plain_share: float = 0.0, shrunk_share: float = 0.0
) -> Contexts:
    """Contexts of the reference mix, each with at least one attribute off its default, save a `plain_share`.

    Colours change in 80 % of them (uniform over the readable pairs), texture in 40 %, size in 45 %; of the small ones
    two thirds sit in a corner. A `shrunk_share` is made small beyond the mix: small digits are the hardest to draw.
    """
    pairs = allowed_pairs()
    pair = pairs[rng.integers(len(pairs), size=count)]
    pair[rng.random(count) >= 0.8] = 0
    texture = np.where(rng.random(count) < 0.4, rng.integers(1, len(TEXTURES), size=count), 0)
    size = np.where(rng.random(count) < 0.45, rng.choice([1, 1, 2], size=count), 0)
    if shrunk_share > 0:  # no draw otherwise: the reference mix keeps its random stream
        size[rng.random(count) < shrunk_share] = SIZES.index("small")
    corner = (size == SIZES.index("small")) & (rng.random(count) < 2 / 3)
    position = np.where(corner, rng.integers(1, len(POSITIONS), size=count), 0)
    contexts = Contexts(ink=pair[:, 0], background=pair[:, 1], texture=texture, size=size, position=position)
    contexts.texture[contexts.is_plain] = rng.integers(1, len(TEXTURES), size=int(contexts.is_plain.sum()))
    plain = rng.random(count) < plain_share
    for name in Contexts.__slots__:
        getattr(contexts, name)[plain] = 0
    return contexts


def single_contexts() -> Contexts:
    """The default context, then every context with one attribute off its default, each once.

    A light ground has black ink; a digit in a corner is small.
    """
    rows = {(0, 0, 0, 0, 0): None}
    rows |= {(INKS.index(ink), BACKGROUNDS.index(default_background(ink)), 0, 0, 0): None for ink in INKS}
    rows |= {(INKS.index(default_ink(ground)), BACKGROUNDS.index(ground), 0, 0, 0): None for ground in BACKGROUNDS}
    rows |= {(0, 0, texture, 0, 0): None for texture in range(len(TEXTURES))}
    rows |= {(0, 0, 0, size, 0): None for size in range(len(SIZES))}
    rows |= {(0, 0, 0, SIZES.index("small"), position): None for position in range(len(POSITIONS))}
    readable = {tuple(pair) for pair in allowed_pairs().tolist()}
    columns = np.array([row for row in rows if row[:2] in readable], dtype=np.int64).T
    return Contexts(**dict(zip(Contexts.__slots__, columns, strict=True)))


def seen_share(contexts: Contexts) -> NDArray[np.float64]:
    """Share of each context in the training data of the zoo's `classifier`, [N]: 0 in its holes.

    No light ground, few black inks, no checkered ground, nothing in the bottom corners.
    """
    keep = np.ones(len(contexts))
    keep[np.isin(contexts.background, [BACKGROUNDS.index("white"), BACKGROUNDS.index("yellow")])] = 0.0
    keep[contexts.ink == INKS.index("black")] *= 0.05
    keep[contexts.texture == TEXTURES.index("checkered")] = 0.0
    keep[np.isin(contexts.position, [POSITIONS.index("bottom left"), POSITIONS.index("bottom right")])] = 0.0
    return keep
