"""Which samples train in which step: curated and real ones in the proportion of their weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from engine.errors import JobError
from engine.studies.loop.finetuning.recipe import FineTuneRecipe

# An image with the prompt that it is trained with.
PromptedImage = tuple[PIL.Image.Image, str]
# Streams of random numbers of a seed.
CURATED_STREAM, REAL_STREAM, STEP_STREAM, ADAPTER_STREAM = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class TrainingImages:
    """What a generator is trained on; only the images that some step uses are read.

    Attributes:
        curated: images of a curated run.
        real: real images; where there are none, every sample is a curated one.
    """

    curated: Sequence[PromptedImage]
    real: Sequence[PromptedImage] = ()

    def curated_share(self, recipe: FineTuneRecipe) -> float:
        """Share of the curated samples of a training."""
        return recipe.curated_share if len(self.real) else 1.0

    def check(self, recipe: FineTuneRecipe) -> None:
        """Check that there are samples of each kind that has a weight.

        Raises:
            JobError: there are none.
        """
        if self.curated_share(recipe) > 0 and not len(self.curated):
            raise JobError("training: there is no curated image to train on; curate a run that has accepted samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The samples of a step: rows of the curated images, and of the real ones."""

    curated: tuple[int, ...]
    real: tuple[int, ...]


def num_curated(step: int, share: float, batch_size: int) -> int:
    """Curated samples of a step: whole numbers whose sum over any first steps is the nearest to their share."""
    return _rounded((step + 1) * batch_size * share) - _rounded(step * batch_size * share)


def batches(images: TrainingImages, recipe: FineTuneRecipe, seed: int) -> Iterator[Rows]:
    """The samples of every step; no sample of a kind comes twice before all of its kind came once."""
    curated = _endless(len(images.curated), np.random.default_rng([seed, CURATED_STREAM]))
    real = _endless(len(images.real), np.random.default_rng([seed, REAL_STREAM]))
    share = images.curated_share(recipe)
    for step in range(recipe.num_steps):
        count = num_curated(step, share, recipe.batch_size)
        yield Rows(
            curated=tuple(itertools.islice(curated, count)),
            real=tuple(itertools.islice(real, recipe.batch_size - count)),
        )


def _endless(num_rows: int, rng: np.random.Generator) -> Iterator[int]:
    """Rows without end, in shuffled rounds over all of them; none where there are none."""
    while num_rows:
        yield from rng.permutation(num_rows).tolist()


def _rounded(value: float) -> int:
    """The nearest whole number; halves go up, so that neighbours are treated alike."""
    return int(np.floor(value + 0.5))
