"""Digits that a person would read with less certainty, and how certain: what `oracle-b` learns to doubt.

Everything happens to the strokes, before they are painted, at the size and place that the context gives. A target is
a distribution over the classes: the label of an intact digit, both labels of a mixture by how much of each is left,
uniform where the digit is destroyed, and between those by the damage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from engine.data.images.digits import CLASS_NAMES, SIZES, Contexts, digit_centres, load_sources, random_contexts
from engine.data.images.digits.drawing import IMAGE_SIZE, draw_strokes, paint

Strokes = NDArray[np.float32]
"""Ink coverage in 0..1, [N, 32, 32]."""

KINDS = {
    "intact": 0.50,
    "morph": 0.08,  # between the shapes of two digits
    "cross-fade": 0.03,  # pixelwise mean
    "splice": 0.07,  # one digit in one region, another in the rest
    "overlay": 0.03,  # one on top of the other
    "erased": 0.12,  # ground over parts of the strokes
    "frayed": 0.07,  # strokes that come apart, and run together, at random
    "faint": 0.03,
    "blot": 0.03,  # so thick that gaps close
    "scribble": 0.04,  # curves and blots that are no digit
}
_SHARPNESS = 9.0  # of the edge of a stroke, as in the drawing of digits
_RADIUS_PX = {"normal": 13.0, "small": 8.5, "large": 15.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubtfulDigits:
    """N images [N, 32, 32, 3] uint8, the `labels` [N] of their first digits, their targets [N, 10] and kinds [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    targets: NDArray[np.float32]
    kinds: NDArray[np.str_]


def doubtful_digits(
    split: str,
    count: int,
    *,
    rng: np.random.Generator,
    kinds: dict[str, float] = KINDS,
    plain_share: float = 0.25,
    augment: bool = True,
) -> DoubtfulDigits:
    """`count` digits of random scans of a split in random contexts, with kinds drawn by their shares."""
    sources = load_sources(split)
    contexts = random_contexts(count, rng=rng, plain_share=plain_share)
    rows, others = rng.integers(len(sources), size=(2, count))
    first = draw_strokes(sources.glyphs, rows, contexts, rng=rng, augment=augment)
    second = draw_strokes(sources.glyphs, others, contexts, rng=rng, augment=augment)
    labels, other_labels = sources.labels[rows], sources.labels[others]
    kind = rng.choice(list(kinds), size=count, p=np.array(list(kinds.values())) / sum(kinds.values()))
    strokes, weights = first.copy(), np.tile(np.array([1.0, 0.0], dtype=np.float32), (count, 1))
    for name in kinds:
        chosen = np.flatnonzero(kind == name)
        if name != "intact" and len(chosen):
            strokes[chosen], weights[chosen] = _spoil(name, first[chosen], second[chosen], contexts.take(chosen), rng)
    targets = _targets(labels, other_labels, weights)
    return DoubtfulDigits(images=paint(strokes, contexts, rng=rng), labels=labels, targets=targets, kinds=kind)


def _targets(labels: NDArray[np.int64], others: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distributions [N, 10]: `weights` [N, 2] on the two labels, brought to a sum of at most 1, the rest uniform."""
    weights = weights / weights.sum(-1, keepdims=True).clip(1)
    classes = np.eye(len(CLASS_NAMES), dtype=np.float32)
    known = weights[:, :1] * classes[labels] + weights[:, 1:] * classes[others]
    return known + (1 - weights.sum(-1, keepdims=True)) / len(CLASS_NAMES)


def _spoil(
    kind: str, first: Strokes, second: Strokes, contexts: Contexts, rng: np.random.Generator
) -> tuple[Strokes, NDArray[np.float32]]:
    """Strokes of one kind from two digits each, and how far either can still be read, [N, 2]."""
    count = len(first)
    if kind in ("morph", "cross-fade"):
        share = rng.uniform(0.0, 1.0, size=count).astype(np.float32)[:, None, None]
        mixed = share * first + (1 - share) * second
        if kind == "morph":
            mixed = _coverage(share * _levels(first) + (1 - share) * _levels(second))
        shares = np.concatenate([share[..., 0], 1 - share[..., 0]], axis=-1)
        return mixed, _ramp(shares, 0.15, 0.85)
    if kind == "splice":
        mask = _coverage(3 * (_smooth_noise(count, rng) + rng.uniform(-1, 1, size=(count, 1, 1)).astype(np.float32)))
        kept = np.stack([_ink(mask * first) / _ink(first), _ink((1 - mask) * second) / _ink(second)], axis=-1)
        return mask * first + (1 - mask) * second, _ramp(kept, 0.4, 0.9)
    if kind == "overlay":
        return np.maximum(first, second), np.full((count, 2), 0.5, dtype=np.float32)
    if kind == "scribble":
        return _scribbles(contexts, rng), np.zeros((count, 2), dtype=np.float32)
    if kind == "faint":
        share = rng.uniform(0.03, 0.5, size=(count, 1)).astype(np.float32)
        return first * share[..., None], _first_only(_ramp(share, 0.08, 0.25)[:, 0])
    spoilt = {"erased": _erase, "frayed": _fray, "blot": _blot}[kind](first, contexts, rng)
    lost = _ink((first - spoilt).clip(0)) / _ink(first)
    added = _ink((spoilt - first).clip(0)) / _ink(first)
    return spoilt, _first_only(1 - _ramp(lost + 0.25 * added, 0.08, 0.36))


def _erase(strokes: Strokes, contexts: Contexts, rng: np.random.Generator) -> Strokes:
    """One to three discs of ground over strokes, each centred on ink."""
    rows, columns = np.indices((IMAGE_SIZE, IMAGE_SIZE))[:, None]
    radius = _radii(contexts)
    for _ in range(3):
        inked = strokes.reshape(len(strokes), -1) + 1e-6
        place = (inked.cumsum(-1) > rng.random((len(strokes), 1)) * inked.sum(-1, keepdims=True)).argmax(-1)
        size = radius * rng.uniform(0.0, 0.42, size=len(strokes))
        row, column = (place // IMAGE_SIZE)[:, None, None], (place % IMAGE_SIZE)[:, None, None]
        distance = np.hypot(rows - row, (columns - column) * rng.uniform(0.6, 1.6, size=(len(strokes), 1, 1)))
        strokes = strokes * _coverage((distance - size[:, None, None]).astype(np.float32) / 4)
    return strokes


def _fray(strokes: Strokes, _: Contexts, rng: np.random.Generator) -> Strokes:
    """Strokes whose thickness varies so much that they break, and join."""
    strength = rng.uniform(0.05, 0.3, size=(len(strokes), 1, 1)).astype(np.float32)
    thinner = rng.uniform(-0.1, 0.2, size=(len(strokes), 1, 1)).astype(np.float32)
    return _coverage(_levels(strokes) - strength * _smooth_noise(len(strokes), rng, finest=12) - thinner)


def _blot(strokes: Strokes, contexts: Contexts, rng: np.random.Generator) -> Strokes:
    """Strokes blurred and cut again, so that loops and gaps fill."""
    blurred = torch.from_numpy(strokes)[:, None]
    for _ in range(3):
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False)
    cut = rng.uniform(0.1, 0.35, size=(len(strokes), 1, 1)).astype(np.float32)
    small = np.where(contexts.size == SIZES.index("small"), 1.0, 0.6).astype(np.float32)[:, None, None]
    return _coverage(3 * (blurred[:, 0].numpy() - cut * small))


def _scribbles(contexts: Contexts, rng: np.random.Generator) -> Strokes:
    """Contours and hills of smooth noise about as large as the digit would be, where the digit would be."""
    count = len(contexts)
    noise = _smooth_noise(count, rng, finest=10)
    width = rng.uniform(0.15, 0.5, size=(count, 1, 1)).astype(np.float32)
    drawn = np.where(rng.random((count, 1, 1)) < 0.7, width - np.abs(noise), 0.6 * (noise - width))
    centre, pixels = digit_centres(contexts), np.indices((IMAGE_SIZE, IMAGE_SIZE)) + 0.5
    distance = np.linalg.norm(pixels[None] - centre[..., None, None], axis=1)
    inside = _radii(contexts)[:, None, None] * rng.uniform(0.5, 1.1, size=(count, 1, 1)) - distance
    return _coverage(np.minimum(drawn, inside / 4).astype(np.float32))


def _smooth_noise(count: int, rng: np.random.Generator, finest: int = 6) -> NDArray[np.float32]:
    """Standard normal numbers on a coarse grid of random fineness, interpolated, [N, 32, 32]."""
    fineness = int(rng.integers(3, finest + 1))
    grid = torch.from_numpy(rng.standard_normal((count, 1, fineness, fineness), dtype=np.float32))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(grid, size=size, mode="bicubic", align_corners=True)[:, 0].numpy()


def _radii(contexts: Contexts) -> NDArray[np.float64]:
    return np.array([_RADIUS_PX[name] for name in SIZES])[contexts.size]


def _levels(strokes: Strokes) -> NDArray[np.float32]:
    """Height of the pen's field above its edge, of which the coverage is a sigmoid."""
    inside = strokes.clip(1e-4, 1 - 1e-4)
    return (np.log(inside / (1 - inside)) / _SHARPNESS).astype(np.float32)


def _coverage(levels: NDArray[np.float32]) -> Strokes:
    return (1 / (1 + np.exp((-_SHARPNESS * levels).clip(-80, 80)))).astype(np.float32)


def _ink(strokes: Strokes) -> NDArray[np.float32]:
    """Ink of each image, [N]; never zero."""
    return strokes.sum((1, 2)) + 1e-6


def _ramp(values: NDArray[np.float32], zero_at: float, one_at: float) -> NDArray[np.float32]:
    """0 up to one value, 1 from another, a line between."""
    return ((values - zero_at) / (one_at - zero_at)).clip(0, 1).astype(np.float32)


def _first_only(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([weights, np.zeros_like(weights)], axis=-1).astype(np.float32)
