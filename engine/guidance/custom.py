"""Guidance by a criterion of the user's own: what it is given, how it is tried, and the wrapper around a denoiser.

Legend: B samples, z latents [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.guidance.boundary import is_guided_step
from engine.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.guidance.rules import rule_of, shifting
from engine.spec import CustomGuidanceSpec


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


# Images [B, 3, H, W] in [0, 1] to a distance [B]: differentiable, never negative, zero where a sample has arrived.
Criterion = Callable[[Tensor, Scene], Tensor]


def guide_by(
    criterion: Criterion,
    denoiser: ConditionalDenoiser,
    spec: CustomGuidanceSpec,
    *,
    scene: Scene,
    decode: Callable[[Tensor], Tensor],
) -> GuidedDenoiser:
    """Wrap a denoiser so that guided steps descend a criterion.

    Args:
        denoiser: what to guide.
        spec: step rule, size and schedule.
        scene: what the criterion is given beside the images.
        decode: latents [B, C, H, W] to images [B, 3, H, W].
    """
    return GuidedDenoiser(
        denoiser,
        criteria=lambda images: criterion(images, scene)[None],
        decode=decode,
        update=shifting(rule_of(spec)),
        is_guided=lambda step: is_guided_step(step, spec),
        source="unet" if spec.gradient == "unet" else "conditional",
        num_samples=len(scene.labels),
    )


def criterion_problem(criterion: Criterion, scene: Scene, shape: tuple[int, int, int]) -> str | None:
    """What is wrong with what a criterion gives for a grey and a darker image, or None.

    Args:
        scene: of two samples.
        shape: channels, height and width of an image.

    Raises:
        Exception: whatever the criterion raises.
    """
    levels = torch.tensor([0.5, 0.4], device=scene.labels.device)
    images = levels.reshape(2, 1, 1, 1).expand(2, *shape).clone().requires_grad_(True)
    with torch.enable_grad():
        distance = criterion(images, scene)
        if not isinstance(distance, Tensor) or distance.shape != (2,):
            shown = list(distance.shape) if isinstance(distance, Tensor) else f"a {type(distance).__name__}"
            return f"gives {shown} for 2 images; return a tensor of shape [2], a distance for each"
        if not distance.isfinite().all() or (distance < 0).any():
            return (
                f"gives {distance.tolist()}; a distance is finite, never negative, and zero where a sample has arrived"
            )
        if not distance.requires_grad:
            return "gives what cannot be differentiated in the images; use torch alone, without detach, argmax or numpy"
        (gradient,) = torch.autograd.grad(distance[0], images, allow_unused=True)
    if gradient is not None and gradient[1].abs().max() > 0:
        return "mixes the samples of a batch: the distance of one depends on another; compute each by itself"
    return None
