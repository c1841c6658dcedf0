"""Drawing scans in contexts: strokes, background and texture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.data.images.digits.contexts import BACKGROUNDS, COLOURS, INKS, SIZES, TEXTURES, Contexts
from engine.data.images.digits.scans import SCAN_SIZE, Sources

IMAGE_SIZE = 32

_SIZE_RANGES_PX = {"normal": (26.0, 28.0), "small": (16.0, 18.0), "large": (31.0, 33.0)}
_OFFSET_PX = 7.0
_TEXTURE_STRENGTH = 0.22


@dataclass(frozen=True, slots=True, kw_only=True)
class Composites:
    """N composed samples: `images` [N, 32, 32, 3] uint8, `labels` [N], `contexts` of length N."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    contexts: Contexts

    def __len__(self) -> int:
        return len(self.labels)


def compose(
    sources: Sources, rows: NDArray[np.int64], contexts: Contexts, *, rng: np.random.Generator, augment: bool = False
) -> Composites:
    """Draw scans `rows` [N] in `contexts`; with `augment` the strokes are turned, sheared, stretched and thickened."""
    strokes = draw_strokes(sources.glyphs, rows, contexts, rng=rng, augment=augment)
    return Composites(images=paint(strokes, contexts, rng=rng), labels=sources.labels[rows], contexts=contexts)


def paint(strokes: NDArray[np.float32], contexts: Contexts, *, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images [N, 32, 32, 3] of ink coverage [N, 32, 32] in 0..1, in the colours and on the grounds of `contexts`."""
    strokes = strokes[..., None]
    ink = _jittered(np.array([COLOURS[name] for name in INKS])[contexts.ink], rng)
    background = _draw_background(contexts, rng=rng)
    images = strokes * ink[:, None, None, :] + (1 - strokes) * background
    return np.rint(images).clip(0, 255).astype(np.uint8)


def draw_strokes(
    glyphs: NDArray[np.float32], rows: NDArray[np.int64], contexts: Contexts, *, rng: np.random.Generator, augment: bool
) -> NDArray[np.float32]:
    """Ink coverage in 0..1 of glyphs `rows` [N] at the sizes and places of `contexts`, [N, 32, 32]."""
    count = len(rows)
    strength = 1.0 if augment else 0.0
    ranges = np.array([_SIZE_RANGES_PX[name] for name in SIZES])[contexts.size]
    size_px = rng.uniform(ranges[:, 0], ranges[:, 1])
    centre = digit_centres(contexts) + strength * rng.uniform(-1.0, 1.0, size=(count, 2))
    matrix = _inverse_shapes(count, rng=rng, strength=strength) * (SCAN_SIZE / size_px)[:, None, None]
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
