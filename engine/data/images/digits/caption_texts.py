"""Captions of composed digits; what a caption does not mention has its default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.data.images.digits.contexts import (
    BACKGROUNDS,
    INKS,
    POSITIONS,
    SIZES,
    TEXTURES,
    Contexts,
    default_background,
    default_ink,
)
from engine.data.images.digits.scans import CLASS_NAMES

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
    """Words for ink and ground: empty for the default (unless `rng` decides to mention it)."""
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
    """A random caption a sample; a `joint_share` also names one or two wrong classes, an `empty_share` is empty."""
    texts = []
    for row, label in enumerate(labels):
        names = [CLASS_NAMES[label]]
        if rng.random() < joint_share:
            others = np.delete(np.arange(len(CLASS_NAMES)), label)
            extra = rng.choice(others, size=1 + int(rng.random() < 0.3), replace=False)
            names = [CLASS_NAMES[i] for i in rng.permutation([label, *extra])]
        texts.append("" if rng.random() < empty_share else random_caption(names, contexts, row, rng=rng))
    return texts
