"""What a guidance method knows of the samples of a batch, and the one signature of all guides.

Legend: B samples, C channels, H x W size, n classes of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceScene(Scene):
    """What a guide can ask: a criterion's scene, and what surrounds the criterion.

    Attributes:
        raw_conformity: as `conformity`, the inner product of the embeddings in place of their cosine.
        decode: latents [B, C, H, W] to images [B, 3, H, W], unclamped, nominally in [0, 1], differentiable.
    """

    raw_conformity: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


class Guide(Protocol):
    """Wraps a denoiser in the guidance of a method: `guide` of a record of `engine.methods.registry`."""

    def __call__(self, denoiser: ConditionalDenoiser, spec: Any, scene: GuidanceScene) -> GuidedDenoiser:
        """Wrap a denoiser.

        Args:
            denoiser: the denoiser to guide.
            spec: the parameters, of the class that the record names.
            scene: of the samples of a batch.
        """
