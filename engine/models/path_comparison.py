"""The two paths of a target compared: what guidance sees of an image as a tensor, and what is scored of the stored one.

Legend: n classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch

from engine.models.classifier import Classifier

NUM_IMAGES = 8
# A difference of probabilities from which on guidance is taken to be led by another image than is scored.
LARGE_DIFFERENCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PathDifference:
    """How much the probabilities of a classifier differ between its two paths.

    Attributes:
        address: of the classifier.
        mean: over images, of the largest difference of a class' probability.
        largest: of these.
        num_changed: images whose predicted class differs.
    """

    address: str
    mean: float
    largest: float
    num_changed: int

    @property
    def is_large(self) -> bool:
        """Whether guidance may be led by another image than is scored."""
        return self.largest >= LARGE_DIFFERENCE or self.num_changed > 0

    @property
    def line(self) -> str:
        """The difference in words."""
        changed = f"; {self.num_changed} of them are of another class" if self.num_changed else ""
        return (
            f"{self.address}: probabilities on tensors and on stored images differ by {self.largest:.2g} at most,"
            f" {self.mean:.2g} in the mean of {NUM_IMAGES} images{changed}"
        )

    @property
    def warning(self) -> str:
        """What a large difference means, and what to do about it."""
        return (
            f"{self.line}; guidance is led by another image than is scored: compare its resize and crop with those that"
            " it was trained with, or sample at the size that it takes"
        )


def compare_paths(classifier: Classifier, height: int, width: int) -> PathDifference:
    """Compare the probabilities of a classifier for eight images, as tensors and as 8-bit images.

    Args:
        height, width: of the images, in pixels.
    """
    images = probe_images(height, width)
    stored = classifier.score(images)
    with torch.no_grad():
        tensors = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        seen = classifier.logits(tensors.float() / 255)
    differences = (stored.softmax(1) - seen.cpu().softmax(1)).abs().amax(1)
    return PathDifference(
        address=classifier.name,
        mean=float(differences.mean()),
        largest=float(differences.max()),
        num_changed=int((stored.argmax(1) != seen.cpu().argmax(1)).sum()),
    )


def probe_images(height: int, width: int) -> Sequence[PIL.Image.Image]:
    """Eight images, the same at every call: noise from coarse to fine, whose spectrum is like that of photographs."""
    drawn, images = np.random.default_rng(0), []
    for number in range(NUM_IMAGES):
        pixels = np.full((height, width, 3), 127.5)
        for level in range(1, 7):
            cells = 2 ** (level + number % 2)
            noise = drawn.normal(0, 1, (cells, cells, 3))
            scaled = [
                PIL.Image.fromarray(noise[..., channel].astype(np.float32)).resize(
                    (width, height), PIL.Image.Resampling.BICUBIC
                )
                for channel in range(3)
            ]
            # Amplitudes fall with the frequency.
            pixels += 160 / 2**level * np.stack([np.asarray(one) for one in scaled], -1)
        images.append(PIL.Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)))
    return images
