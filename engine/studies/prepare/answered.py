"""Images with what oracles, the target and people say of their labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from engine.data.images import Unusable
from engine.methods.validity_fitting import Answers
from engine.models.validity import ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class AnsweredImage:
    """An image with a label.

    Attributes:
        order: by which images are ordered: digest or key, after the class.
        p_labels: each oracle's probability of the label.
        target_errs: whether the target predicts another class.
        num_agreeing: people who said the label, of `num_asked`.
    """

    order: tuple[int, str]
    p_labels: tuple[float, ...]
    target_errs: bool
    num_agreeing: int
    num_asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredImages:
    """Images with answers, in an order that depends on no file.

    Attributes:
        oracles: whose probabilities they have.
        target: whose errors they have.
        num_raters: people who answered; None where that is unknown.
        source: where the images are from, in words.
        unused: what could not be used of the answers, by image.
        notes: on what was left out, a line each.
    """

    images: tuple[AnsweredImage, ...]
    oracles: tuple[ModelIdentity, ...]
    target: ModelIdentity
    num_raters: int | None
    source: str
    unused: tuple[Unusable, ...]
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> Answers:
        """As arrays."""
        return Answers(
            p_labels=np.array([image.p_labels for image in self.images], dtype=np.float64),
            num_agreeing=np.array([image.num_agreeing for image in self.images], dtype=np.int64),
            num_asked=np.array([image.num_asked for image in self.images], dtype=np.int64),
            target_errs=np.array([image.target_errs for image in self.images], dtype=bool),
        )

    @property
    def digest(self) -> str:
        """Of the images, their labels and the answers."""
        lines = (f"{image.order} {image.num_agreeing} {image.num_asked}\n" for image in self.images)
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]
