"""What a guidance method knows of the samples of a batch.

Legend: B samples, C channels, H x W size, n classes of the target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.methods.parameters import Ensemble

# Some rows of a batch: one after another, or by their numbers, on the CPU.
Rows = slice | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a criterion can ask about the samples of a batch.

    Attributes:
        logits: images [B, 3, H, W] in [0, 1] to the target's temperature-scaled logits [B, n], differentiable.
        conformity: such images, and class indices [B], to CLIP's conformity to the prompts of these classes [B],
            differentiable.
        labels: [B] class index of each sample; of a joint prompt the first of its subset.
        classes: of each sample, its class, or the subset of its joint prompt.
    """

    logits: Callable[[Tensor], Tensor]
    conformity: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    classes: tuple[tuple[int, ...], ...]

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
            further_logits=(),
        )
        each = [
            criteria(images, dataclasses.replace(one, logits=logits)) for logits in (self.logits, *self.further_logits)
        ]
        # Not `mean`, whose order of summation depends on the number of rows from five targets on.
        return sum(each[1:], each[0]) / len(each) if self.ensemble == "mean" else torch.stack(each).amax(0)
