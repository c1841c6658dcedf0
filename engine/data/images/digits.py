"""Composed 32 x 32 RGB images of handwritten digits, with captions.

The strokes are the 8 x 8 scans that scikit-learn ships (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).
A *source* is one such scan; sources are split once, so no scan serves two splits. A *context* says how a source is
drawn: ink and background colour, background texture, size, position. What a caption does not mention has its default.

Everything is a pure function of its arguments and a seed; arrays are vectorised over samples, `N` below. The models of
the zoo are trained and judged on these images, and `--data digits:...` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 32
SPLIT_SEED = 20240
SPLIT_SIZES = {"train": 1150, "validation": 300, "test": 347}

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

_CELLS = 8
_SUBCELLS = 6  # spline samples per cell of the scan
_SIZE_RANGES_PX = {"normal": (26.0, 28.0), "small": (16.0, 18.0), "large": (31.0, 33.0)}
_OFFSET_PX = 7.0
_TEXTURE_STRENGTH = 0.22
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Scans of one split: `glyphs` [N, 60, 60], smooth strokes in 0..1 with a margin of one cell, and `labels` [N]."""

    glyphs: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composites:
    """N composed samples: `images` [N, 32, 32, 3] uint8, `labels` [N], `contexts` of length N."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    contexts: Contexts

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


def compose(
    sources: Sources, rows: NDArray[np.int64], contexts: Contexts, *, rng: np.random.Generator, augment: bool = False
) -> Composites:
    """Draw scans `rows` [N] in `contexts`; with `augment` the strokes are turned, sheared, stretched and thickened."""
    strokes = _draw_strokes(sources.glyphs, rows, contexts, rng=rng, augment=augment)[..., None]
    ink = _jittered(np.array([COLOURS[name] for name in INKS])[contexts.ink], rng)
    background = _draw_background(contexts, rng=rng)
    images = strokes * ink[:, None, None, :] + (1 - strokes) * background
    return Composites(
        images=np.rint(images).clip(0, 255).astype(np.uint8), labels=sources.labels[rows], contexts=contexts
    )


def compose_split(split: str, count: int, *, seed: int, plain: bool = False) -> Composites:
    """`count` composites of a split, every source as often as every other (to one), without augmentation."""
    rng = np.random.default_rng([SPLIT_SEED, seed])
    sources = load_sources(split)
    rows = np.resize(rng.permutation(len(sources)), count)
    contexts = plain_contexts(count) if plain else random_contexts(count, rng=rng)
    return compose(sources, rows, contexts, rng=rng)


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


def compose_single(split: str, *, seed: int) -> Composites:
    """Every source of a split once in each of `single_contexts`, source by source, without augmentation."""
    rng = np.random.default_rng([SPLIT_SEED, seed, 1])
    sources, contexts = load_sources(split), single_contexts()
    rows = np.repeat(np.arange(len(sources)), len(contexts))
    return compose(sources, rows, contexts.take(np.tile(np.arange(len(contexts)), len(sources))), rng=rng)


def compose_seen(count: int, *, seed: int, plain_share: float = 0.25) -> Composites:
    """`count` composites of train sources as the zoo's `classifier` was shown them: its holes are missing."""
    rng = np.random.default_rng([SPLIT_SEED, seed, 2])
    sources = load_sources("train")
    contexts = random_contexts(count * 4, rng=rng, plain_share=plain_share)
    kept = np.flatnonzero(rng.random(len(contexts)) < seen_share(contexts))
    rows = np.resize(rng.permutation(len(sources)), count)
    return compose(sources, rows, contexts.take(np.resize(kept, count)), rng=rng)


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


def training_batch(
    count: int, *, rng: np.random.Generator, plain_share: float = 0.2, shrunk_share: float = 0.0
) -> Composites:
    """`count` augmented composites of random train sources."""
    sources = load_sources("train")
    contexts = random_contexts(count, rng=rng, plain_share=plain_share, shrunk_share=shrunk_share)
    return compose(sources, rng.integers(len(sources), size=count), contexts, rng=rng, augment=True)


def _draw_strokes(
    glyphs: NDArray[np.float32], rows: NDArray[np.int64], contexts: Contexts, *, rng: np.random.Generator, augment: bool
) -> NDArray[np.float32]:
    """Ink coverage in 0..1, [N, 32, 32]."""
    count = len(rows)
    strength = 1.0 if augment else 0.0
    ranges = np.array([_SIZE_RANGES_PX[name] for name in SIZES])[contexts.size]
    size_px = rng.uniform(ranges[:, 0], ranges[:, 1])
    centre = digit_centres(contexts) + strength * rng.uniform(-1.0, 1.0, size=(count, 2))
    matrix = _inverse_shapes(count, rng=rng, strength=strength) * (_CELLS * _SUBCELLS / size_px)[:, None, None]
    pixels = np.indices((IMAGE_SIZE, IMAGE_SIZE)).reshape(2, -1).T + 0.5
    points = (pixels[None] - centre[:, None]) @ matrix.transpose(0, 2, 1) + glyphs.shape[1] / 2 - 0.5
    field = _bilinear(glyphs, rows, points.astype(np.float32)).reshape(count, IMAGE_SIZE, IMAGE_SIZE)
    threshold = 0.42 + strength * rng.uniform(-0.1, 0.1, size=(count, 1, 1)).astype(np.float32)
    return (1 / (1 + np.exp(-9.0 * (field - threshold)))).astype(np.float32)


def digit_centres(contexts: Contexts) -> NDArray[np.float64]:
    """Centre of each digit in pixels, (row, column), [N, 2]."""
    offsets = np.array([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]) * _OFFSET_PX
    return IMAGE_SIZE / 2 + offsets[contexts.position]


def _inverse_shapes(count: int, *, rng: np.random.Generator, strength: float) -> NDArray[np.float64]:
    """Small random rotations, shears and stretches as [N, 2, 2] maps from output to glyph offsets."""
    angle, shear, log_rows, log_columns = strength * rng.uniform(-1, 1, size=(4, count))
    cosine, sine = np.cos(0.2 * angle), np.sin(0.2 * angle)
    turn = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    warp = np.zeros((count, 2, 2))
    warp[:, 0, 0], warp[:, 1, 1], warp[:, 1, 0] = np.exp(0.1 * log_rows), np.exp(0.12 * log_columns), 0.15 * shear
    return warp @ turn


def _bilinear(glyphs: NDArray[np.float32], rows: NDArray[np.int64], points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values of glyph `rows[n]` at `points[n]` ([N, M, 2], row and column), zero outside; [N, M]."""
    side = glyphs.shape[1]
    points = points.clip(0, side - 1.001)  # the outermost ring of a glyph is empty
    corner = points.astype(np.int32)
    fraction = points - corner.astype(np.float32)
    base = rows.astype(np.int32)[:, None] * side * side + corner[..., 0] * side + corner[..., 1]
    flat = glyphs.reshape(-1)
    right, down = fraction[..., 1], fraction[..., 0]
    top = flat[base] * (1 - right) + flat[base + 1] * right
    bottom = flat[base + side] * (1 - right) + flat[base + side + 1] * right
    return top * (1 - down) + bottom * down


def _jittered(colours: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    return (colours + rng.uniform(-10, 10, size=colours.shape)).astype(np.float32)


def _draw_background(contexts: Contexts, *, rng: np.random.Generator) -> NDArray[np.float32]:
    """Background colour with its texture, [N, 32, 32, 3]: dark grounds carry lighter marks, light ones darker marks."""
    base = _jittered(np.array([COLOURS[name] for name in BACKGROUNDS])[contexts.background], rng)
    is_dark = base @ np.array([0.30, 0.59, 0.11], dtype=np.float32) < 128
    mark_colour = np.where(is_dark, 255.0, 0.0).astype(np.float32)[:, None]
    marks = _TEXTURE_STRENGTH * _draw_marks(contexts.texture, rng=rng)[..., None]
    return base[:, None, None] * (1 - marks) + mark_colour[:, None, None] * marks


def _draw_marks(texture: NDArray[np.int64], *, rng: np.random.Generator) -> NDArray[np.float32]:
    """Where the texture marks the ground, 0 or 1, [N, 32, 32]."""
    marks = np.zeros((len(texture), IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for name, draw in (("striped", _stripes), ("checkered", _checks), ("speckled", _speckles)):
        rows = np.flatnonzero(texture == TEXTURES.index(name))
        marks[rows] = draw(len(rows), rng)
    return marks


def _stripes(count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    directions = np.array([(1, 0), (0, 1), (1, 1), (1, -1)])[rng.integers(4, size=count)]
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    phase = rng.integers(8, size=count)[:, None, None]
    along = directions[:, 0, None, None] * rows + directions[:, 1, None, None] * columns + phase
    return (along // 4) % 2 == 0


def _checks(count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    shift = rng.integers(8, size=(2, count))[:, :, None, None]
    return ((rows + shift[0]) // 4 + (columns + shift[1]) // 4) % 2 == 0


def _speckles(count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Dots of 2 x 2 pixels, on about a sixth of the ground."""
    dots = rng.random((count, IMAGE_SIZE // 2, IMAGE_SIZE // 2)) < 1 / 6
    return dots.repeat(2, axis=1).repeat(2, axis=2)


# Captions -----------------------------------------------------------------------------------------------------------

BASE_TEMPLATES = ("{}", "a photo of a {}", "a handwritten digit {}", "the digit {}")
ZERO_SHOT_TEMPLATE = "a photo of a {}"


def context_text(contexts: Contexts, row: int, *, rng: np.random.Generator | None = None) -> str:
    """The comma form of one context, such as `red ink on a white background, small, top left`; empty when plain.

    With `rng` the phrasing varies: order of parts, joined or separate colours, defaults mentioned now and then.
    """
    colours = _colour_parts(contexts, row, rng)
    place = [
        name
        for name, default in ((SIZES[contexts.size[row]], SIZES[0]), (POSITIONS[contexts.position[row]], POSITIONS[0]))
        if name != default
    ]
    parts = place + colours if rng is not None and rng.random() < 0.3 else colours + place
    return ", ".join(parts)


def attribute_texts(contexts: Contexts, row: int) -> tuple[str, ...]:
    """What of one context is off its default, attribute by attribute: `red ink`, `white background`, `small`, ..."""
    words = (
        (INKS, contexts.ink, " ink"),
        (BACKGROUNDS, contexts.background, " background"),
        (TEXTURES, contexts.texture, " background"),
        (SIZES, contexts.size, ""),
        (POSITIONS, contexts.position, ""),
    )
    return tuple(names[values[row]] + noun for names, values, noun in words if values[row])


def _colour_parts(contexts: Contexts, row: int, rng: np.random.Generator | None) -> list[str]:
    ink, ground = _colour_words(contexts, row, rng)
    if ink and ground:
        joined = rng is None or rng.random() < 0.6
        return [f"{ink} ink on a {ground} background"] if joined else [f"{ink} ink", f"{ground} background"]
    return [f"{ink} ink"] if ink else [f"{ground} background"] if ground else []


def _colour_words(contexts: Contexts, row: int, rng: np.random.Generator | None) -> tuple[str, str]:
    """What has to be said of ink and ground: empty where the default holds (and `rng` does not want it said)."""
    ink, background = INKS[contexts.ink[row]], BACKGROUNDS[contexts.background[row]]
    texture = TEXTURES[contexts.texture[row]]
    chatty = rng is not None and rng.random() < 0.12
    is_default_ink = ink == default_ink(background)
    is_default_background = background == default_background(ink)
    name_background = chatty or not is_default_background or (is_default_ink and background != BACKGROUNDS[0])
    name_ink = chatty or not is_default_ink
    if is_default_background and is_default_ink and ink == "black":
        name_ink, name_background = _one_or_both(rng)  # black on white: either word implies the other
    ground = [texture] * (texture != TEXTURES[0]) + [background] * name_background
    return ink if name_ink else "", " ".join(ground)


def _one_or_both(rng: np.random.Generator | None) -> tuple[bool, bool]:
    return (True, True) if rng is None else ((True, True), (True, False), (False, True))[rng.integers(3)]


def adjective_caption(name: str, contexts: Contexts, row: int, *, rng: np.random.Generator) -> str:
    """Such as `a small red handwritten digit three on a blue background, top left`."""
    ink, ground = _colour_words(contexts, row, rng)
    size = SIZES[contexts.size[row]]
    noun = (f"handwritten digit {name}", f"digit {name}", name)[rng.integers(3)]
    words = [size] * (size != SIZES[0]) + [ink] * bool(ink) + [noun]
    caption = ("a ", "a photo of a ", "the ")[rng.integers(3)] + " ".join(words)
    caption += f" on a {ground} background" if ground else ""
    position = POSITIONS[contexts.position[row]]
    return caption + (f", {position}" if position != POSITIONS[0] else "")


def random_caption(names: Sequence[str], contexts: Contexts, row: int, *, rng: np.random.Generator) -> str:
    """One phrasing of `names` (joined by `and`) in a context, of all that the models learn."""
    name = " and ".join(names)
    if rng.random() < 0.3:
        return adjective_caption(name, contexts, row, rng=rng)
    base = BASE_TEMPLATES[rng.choice(len(BASE_TEMPLATES), p=(0.3, 0.4, 0.15, 0.15))].format(name)
    context = context_text(contexts, row, rng=rng)
    return f"{base}, {context}" if context else base


def captions(
    labels: NDArray[np.int64],
    contexts: Contexts,
    *,
    rng: np.random.Generator,
    joint_share: float = 0.0,
    empty_share: float = 0.0,
) -> list[str]:
    """A random caption a sample; a `joint_share` also names one or two wrong classes, an `empty_share` says nothing."""
    texts = []
    for row, label in enumerate(labels):
        names = [CLASS_NAMES[label]]
        if rng.random() < joint_share:
            others = np.delete(np.arange(len(CLASS_NAMES)), label)
            extra = rng.choice(others, size=1 + int(rng.random() < 0.3), replace=False)
            names = [CLASS_NAMES[i] for i in rng.permutation([label, *extra])]
        texts.append("" if rng.random() < empty_share else random_caption(names, contexts, row, rng=rng))
    return texts
