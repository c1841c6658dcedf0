"""Captions of photographs: the class, and what `cifar10_contexts` measured of the image or did to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from cifar10_contexts import (
    FAR,
    LEFT,
    NEAR,
    RIGHT,
    Thresholds,
    close_ups,
    context_words,
    from_afar,
    is_plain,
    measure,
    middles,
    on_one_side,
)
from cifar10_data import CLASS_NAMES, Photographs, blur
from numpy.typing import NDArray

TEMPLATES = ("a photo of a {}", "{}", "a photo of the {}", "a picture of a {}")
TEMPLATE_SHARES = (0.6, 0.2, 0.1, 0.1)
FILLERS = ("a", "an", "and", "the", "of", "in", "on", "with", "photo", "image", "picture")
# Of the images are copied blurred, as many near, and so on.
COPIED_SHARE = 0.04
PLAIN_SHARE = 0.35
PHRASE_SHARE = 0.6
# Never left unsaid: no sample is blurred or framed in these ways unless a prompt asks for it.
ALWAYS_SAID = frozenset({"blurry", "far away", "close up", "on the left", "on the right"})
# The weaknesses of the zoo's target: it never saw an image of which one of these can be said.
UNSEEN_BY_TARGET = frozenset({"dark", "blurry", "close up", "green background"})


def caption_words() -> list[str]:
    """Every word of the captions, in a fixed order."""
    return list(dict.fromkeys([*CLASS_NAMES, *FILLERS, *context_words()]))


@dataclass(frozen=True)
class CaptionedPhotographs:
    """Training images, their mirror images and copies of some, each with what its captions can say."""

    photographs: Photographs
    phrases: Sequence[Sequence[str]]

    def draw(self, rng: np.random.Generator, count: int, weights: Mapping[str, float]) -> NDArray[np.int64]:
        """`count` rows; a class is drawn as often as its weight says, 1 where none is given."""
        order, starts = self._by_class
        shares = np.array([weights.get(name, 1.0) for name in CLASS_NAMES]) * (np.diff(starts) > 0)
        classes = rng.choice(len(CLASS_NAMES), count, p=shares / shares.sum())
        places = starts[classes] + rng.random(count) * (starts[classes + 1] - starts[classes])
        return order[places.astype(np.int64)]

    @cached_property
    def _by_class(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows in the order of their classes, and where each class begins, [11]."""
        order = np.argsort(self.photographs.labels, kind="stable")
        return order, np.searchsorted(self.photographs.labels[order], np.arange(len(CLASS_NAMES) + 1))

    def captions(
        self,
        rows: NDArray[np.int64],
        rng: np.random.Generator,
        *,
        joint: Sequence[str] = (),
        joint_share: float = 0.0,
        empty_share: float = 0.0,
    ) -> list[str]:
        """A random caption of each row.

        Args:
            joint: class names, of which a `joint_share` of captions names another one instead of any context.
            empty_share: share of captions that say nothing.
        """
        texts = []
        for row in rows.tolist():
            name = CLASS_NAMES[self.photographs.labels[row]]
            if rng.random() < empty_share:
                texts.append("")
            elif rng.random() < joint_share and ALWAYS_SAID.isdisjoint(self.phrases[row]):
                texts.append(joint_caption(name, joint, rng))
            else:
                texts.append(context_caption(name, self.phrases[row], rng))
        return texts

    def are_true(self, rows: NDArray[np.int64], captions: Sequence[str]) -> NDArray[np.bool_]:
        """Whether caption j, of row j and of one class, is true of row i as well, [N, N]."""
        labels = self.photographs.labels[rows]
        said = [frozenset(caption.split(", ")[1:]) for caption in captions]
        known = [frozenset(self.phrases[row]) for row in rows.tolist()]
        return np.array([[some <= own for some in said] for own in known]) & (labels[:, None] == labels[None])

    def of_classes(self, names: Sequence[str]) -> CaptionedPhotographs:
        """The images of these classes."""
        wanted = [CLASS_NAMES.index(name) for name in names]
        kept = np.flatnonzero(np.isin(self.photographs.labels, wanted))
        some = Photographs(self.photographs.images[kept], self.photographs.labels[kept])
        return CaptionedPhotographs(some, [self.phrases[row] for row in kept.tolist()])


def seen_by_target(data: CaptionedPhotographs) -> Photographs:
    """The images that the zoo's target learns from."""
    kept = [row for row, phrases in enumerate(data.phrases) if UNSEEN_BY_TARGET.isdisjoint(phrases)]
    return Photographs(data.photographs.images[kept], data.photographs.labels[kept])


def joint_caption(name: str, names: Sequence[str], rng: np.random.Generator) -> str:
    """Two classes joined by `and`, in a template or alone, as joint prompts have them."""
    spoken = [name, str(rng.choice([other for other in names if other != name]))]
    rng.shuffle(spoken)
    template = "{}" if rng.random() < 0.5 else str(rng.choice(TEMPLATES, p=TEMPLATE_SHARES))
    return template.format(" and ".join(spoken))


def context_caption(name: str, phrases: Sequence[str], rng: np.random.Generator) -> str:
    """The class, and behind commas a random selection of the phrases in any order."""
    share = 0.0 if rng.random() < PLAIN_SHARE else PHRASE_SHARE
    said = [phrase for phrase in phrases if phrase in ALWAYS_SAID or rng.random() < share]
    template = str(rng.choice(TEMPLATES, p=TEMPLATE_SHARES))
    return ", ".join([template.format(name), *(said[i] for i in rng.permutation(len(said)))])


Locate = Callable[[NDArray[np.uint8], NDArray[np.int64]], NDArray[np.float64]]
"""Class activation maps [N, S, S] of images [N, 32, 32, 3] for labels [N]."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Photographs, with distance and side [N] as indices of `ATTRIBUTES`."""

    photographs: Photographs
    distance: NDArray[np.int64]
    side: NDArray[np.int64]

    @classmethod
    def of(cls, images: NDArray[np.uint8], labels: NDArray[np.int64], *, distance: int = 0, side: int = 0) -> Copies:
        """All alike."""
        return cls(Photographs(images, labels), np.full(len(labels), distance), np.full(len(labels), side))

    @classmethod
    def joined(cls, parts: Sequence[Copies]) -> Copies:
        """One after the other."""
        images, labels = (
            np.concatenate([getattr(part.photographs, name) for part in parts]) for name in ("images", "labels")
        )
        distance, side = (np.concatenate([getattr(part, name) for part in parts]) for name in ("distance", "side"))
        return cls(Photographs(images, labels), distance, side)


def with_copies(data: Photographs, locate: Locate, seed: int = 0) -> Copies:
    """The images, their mirror images, and copies of some of both: blurred, near, far, left and right."""
    images, labels = np.concatenate([data.images, data.images[:, :, ::-1]]), np.concatenate([data.labels] * 2)
    return Copies.joined([Copies.of(images, labels), *framed(Photographs(images, labels), locate, COPIED_SHARE, seed)])


def framed(data: Photographs, locate: Locate, share: float, seed: int) -> list[Copies]:
    """A `share` of the images blurred, near, left and right each; from afar as many, all with a plain ground."""
    rng = np.random.default_rng(seed)
    count = round(len(data.labels) * share)

    def some(candidates: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        rows = rng.choice(candidates, min(count, len(candidates)), replace=False)
        return data.images[rows], data.labels[rows]

    everything = np.arange(len(data.labels))
    images, labels = some(everything)
    found = [Copies.of(blur(images), labels)]
    images, labels = some(everything)
    found.append(Copies.of(close_ups(images, middles(locate(images, labels))), labels, distance=NEAR))
    for side in (LEFT, RIGHT):
        images, labels = some(everything)
        moved, is_moved = on_one_side(images, middles(locate(images, labels)), left=side == LEFT)
        found.append(Copies.of(moved[is_moved], labels[is_moved], side=side))
    images, labels = some(np.flatnonzero(is_plain(data.images)))
    return [*found, Copies.of(from_afar(images, rng), labels, distance=FAR)]


def caption(data: Photographs, locate: Locate) -> tuple[CaptionedPhotographs, Thresholds]:
    """Measure training images and their copies.

    Thresholds come from the images alone, so that a copy does not move what counts as blurred.
    """
    copies = with_copies(data, locate)
    measures = measure(copies.photographs.images)
    thresholds = Thresholds.of(measures.first(len(data.labels)))
    contexts = thresholds.contexts(measures, copies.distance, copies.side)
    return CaptionedPhotographs(copies.photographs, [contexts.phrases(row) for row in range(len(contexts))]), thresholds
