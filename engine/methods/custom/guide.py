"""Guidance by a criterion of the user's own: what it is given, how it is tried, and the wrapper around a denoiser.

Legend: B samples, z latents [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.boundary.guide import is_guided_step, rule_of
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import shifting


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


# The remedy for a criterion whose distances are not decided by images and scene.
NO_CHANCE = (
    "samples are decided by their seeds alone: draw nothing, keep nothing between calls, ask no clock, and switch"
    " dropout off; what must vary can be computed from the images"
)
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


def same_values(first: Tensor, second: object) -> bool:
    """Whether two evaluations gave the same: to the bit on a CPU; kernels of a GPU may add in another order."""
    if not isinstance(second, Tensor) or first.shape != second.shape:
        return False
    if first.is_cuda:
        return torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
    # NaN equals NaN here: what is not finite is counted by the step's rule.
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def criterion_problem(criteria: Sequence[Criterion], scene: Scene, shape: tuple[int, int, int]) -> str | None:
    """What is wrong with what a criterion gives for a grey and a darker image, or None.

    Args:
        criteria: the criterion, and others that its factory made for other workers, which must give the same.
        scene: of two samples.
        shape: channels, height and width of an image.

    Raises:
        Exception: whatever the criterion raises.
    """
    levels = torch.tensor([0.5, 0.4], device=scene.labels.device)
    images = levels.reshape(2, 1, 1, 1).expand(2, *shape).clone().requires_grad_(True)
    with torch.enable_grad():
        distance = criteria[0](images, scene)
        if not isinstance(distance, Tensor) or distance.shape != (2,):
            shown = list(distance.shape) if isinstance(distance, Tensor) else f"a {type(distance).__name__}"
            return f"gives {shown} for 2 images; return a tensor of shape [2], a distance for each"
        if not distance.isfinite().all() or (distance < 0).any():
            return (
                f"gives {distance.tolist()}; a distance is finite, never negative, and zero where a sample has arrived"
            )
        if not same_values(distance, criteria[0](images, scene)):
            return f"gives other distances for equal images when it is asked again; {NO_CHANCE}"
        if not all(same_values(distance, criterion(images, scene)) for criterion in criteria[1:]):
            return f"gives other distances when its factory is called again, as every worker does; {NO_CHANCE}"
        if not torch.allclose(criteria[0](images.flip(0), scene).flip(0), distance, rtol=1e-3, atol=1e-5):
            return f"gives a sample another distance in another row of its batch; {NO_CHANCE}"
        if not distance.requires_grad:
            return "gives what cannot be differentiated in the images; use torch alone, without detach, argmax or numpy"
        (gradient,) = torch.autograd.grad(distance[0], images, allow_unused=True)
    if gradient is not None and gradient[1].abs().max() > 0:
        return "mixes the samples of a batch: the distance of one depends on another; compute each by itself"
    return None
