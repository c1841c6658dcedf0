"""What a guidance method knows of the samples of a batch.

Legend: B samples, C channels, H x W size, n classes of the target, d entries of an embedding, N given images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from engine.methods.parameters import Ensemble

# Some rows of a batch: one after another, or by their numbers, on the CPU.
Rows = slice | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneScorer:
    """A model of the job that a criterion may ask, in float32 on its own device, whatever those of the images are.

    What a scorer does not have raises `LookupError`: a classifier has no embeddings, a CLIP model no logits.

    Attributes:
        name: address of the model.
        logits: images [B, 3, H, W] in [0, 1] to temperature-scaled logits [B, n + k], differentiable: the target's n
            classes, and behind them what else the model knows.
        embeds: such images to projected CLIP embeddings [B, d], differentiable, not normalised.
        text_embeds: texts to projected embeddings [number of texts, d] on the device of the model, not normalised.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    embeds: Callable[[Tensor], Tensor]
    text_embeds: Callable[[Sequence[str]], Tensor]

    def cached(self) -> Self:
        """The scorer, which is asked once about the same images."""
        return dataclasses.replace(self, logits=functools.cache(self.logits), embeds=functools.cache(self.embeds))


class GivenFeatures(NamedTuple):
    """The images of `guidance.custom.images`, as CLIP sees them.

    Attributes:
        features: embeddings [N, d] of length 1, on the device of the samples.
        classes: the class index of each, [N].
    """

    features: Tensor
    classes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a criterion can ask about the samples of a batch.

    Attributes:
        logits: images [B, 3, H, W] in [0, 1] to the target's temperature-scaled logits [B, n], differentiable.
        conformity: such images, and class indices [B], to CLIP's conformity to the prompts of these classes [B],
            differentiable.
        labels: [B] class index of each sample; of a joint prompt the first of its subset.
        classes: of each sample, its class, or the subset of its joint prompt.
        scorers: the models of the job that may guide: `target`, further targets as `target.1`, ..., `clip`, and with
            `guidance.custom.with_oracle` the last oracle as `oracle`.
        given: the images of `guidance.custom.images`; None without them.
    """

    logits: Callable[[Tensor], Tensor]
    conformity: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    classes: tuple[tuple[int, ...], ...]
    scorers: Mapping[str, SceneScorer] = dataclasses.field(default_factory=dict)
    given: GivenFeatures | None = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.classes)

    def rows(self, part: Rows) -> Self:
        """The scene of some of the samples."""
        places = range(self.num_samples)[part] if isinstance(part, slice) else part.tolist()
        return dataclasses.replace(self, labels=self.labels[part], classes=tuple(self.classes[row] for row in places))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How guidance decodes predicted latents.

    Attributes:
        decode: latents [B, C, H, W] to images [B, 3, H, W], unclamped, nominally in [0, 1], differentiable.
        slice_rows: most rows that are decoded and differentiated at a time, as a GPU's memory and kernels have limits;
            None for all.
    """

    decode: Callable[[Tensor], Tensor]
    slice_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceScene(Scene):
    """What a guide can ask: a criterion's scene, and what surrounds the criterion.

    Attributes:
        raw_conformity: as `conformity`, the inner product of the embeddings in place of their cosine.
        decoding: of predicted latents.
        further_logits: as `logits`, of each further target.
        ensemble: what is descended where there are some.
        oracle_logits: as `logits`, of the oracle that guides; None without one.
        row_multiple: a gradient may be that of some rows, a multiple of so many; None: all rows stay together.
    """

    raw_conformity: Callable[[Tensor, Tensor], Tensor]
    decoding: Decoding
    further_logits: tuple[Callable[[Tensor], Tensor], ...] = ()
    ensemble: Ensemble = "mean"
    oracle_logits: Callable[[Tensor], Tensor] | None = None
    row_multiple: int | None = None

    def over_targets(self, criteria: Callable[[Tensor, Self], Tensor], images: Tensor) -> Tensor:
        """Criteria [K, B] of images [B, 3, H, W], each sample's the mean or the largest over the targets.

        Args:
            criteria: called once for each target, with a scene whose `logits` are that target's; with this one where
                there is no other.
        """
        if not self.further_logits:
            return criteria(images, self)
        # What does not depend on the target is measured once: the calls have the same images.
        one = dataclasses.replace(
            self,
            conformity=functools.cache(self.conformity),
            raw_conformity=functools.cache(self.raw_conformity),
            oracle_logits=self.oracle_logits and functools.cache(self.oracle_logits),
            scorers={name: scorer.cached() for name, scorer in self.scorers.items()},
            further_logits=(),
        )
        each = [
            criteria(images, dataclasses.replace(one, logits=logits)) for logits in (self.logits, *self.further_logits)
        ]
        # Not `mean`, whose order of summation depends on the number of rows from five targets on.
        return sum(each[1:], each[0]) / len(each) if self.ensemble == "mean" else torch.stack(each).amax(0)
