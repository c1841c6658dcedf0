"""A criterion of the user's own: what it is, and the trial that every criterion must pass before it guides samples.

Legend: B samples, H x W the size of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.methods.guidance.scene import Scene

# Images [B, 3, H, W] in [0, 1] to a distance [B]: differentiable, never negative, zero where a sample has arrived.
Criterion = Callable[[Tensor, Scene], Tensor]
# The remedy for a criterion whose distances are not decided by images and scene.
NOT_REPRODUCIBLE = (
    "samples must depend on their seeds alone: draw no random numbers, keep no state between calls, read no clock, and"
    " switch dropout off; what must vary can be computed from the images"
)


def same_values(first: Tensor, second: object) -> bool:
    """Whether two evaluations are equal: to the bit on a CPU; kernels of a GPU may add in another order."""
    if not isinstance(second, Tensor) or first.shape != second.shape:
        return False
    if first.is_cuda:
        return torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True)
    # NaN equals NaN here: what is not finite is counted by the step's rule.
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def criterion_problem(criteria: Sequence[Criterion], scene: Scene, shape: tuple[int, int, int]) -> str | None:
    """What is wrong with the distances of a criterion for a grey and a darker image, or None.

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
        return (
            _value_problem(distance)
            or _reproducibility_problem(distance, criteria, images, scene)
            or _gradient_problem(distance, images)
        )


def _value_problem(distance: object) -> str | None:
    if not isinstance(distance, Tensor) or distance.shape != (2,):
        shown = list(distance.shape) if isinstance(distance, Tensor) else f"a {type(distance).__name__}"
        return f"gives {shown} for 2 images; return a tensor of shape [2], a distance for each"
    if not distance.isfinite().all() or (distance < 0).any():
        return f"gives {distance.tolist()}; a distance is finite, never negative, and zero where a sample has arrived"
    return None


def _reproducibility_problem(
    distance: Tensor, criteria: Sequence[Criterion], images: Tensor, scene: Scene
) -> str | None:
    """Evaluates the criterion again, then the others, then the criterion with the rows in reverse order."""
    if not same_values(distance, criteria[0](images, scene)):
        return f"gives different distances when it is called again with equal images; {NOT_REPRODUCIBLE}"
    if not all(same_values(distance, criterion(images, scene)) for criterion in criteria[1:]):
        return f"gives different distances when its factory is called again, as every worker does; {NOT_REPRODUCIBLE}"
    if not torch.allclose(criteria[0](images.flip(0), scene).flip(0), distance, rtol=1e-3, atol=1e-5):
        return f"gives a sample another distance in another row of its batch; {NOT_REPRODUCIBLE}"
    return None


def _gradient_problem(distance: Tensor, images: Tensor) -> str | None:
    if not distance.requires_grad:
        return "gives what cannot be differentiated in the images; use torch alone, without detach, argmax or numpy"
    (gradient,) = torch.autograd.grad(distance[0], images, allow_unused=True)
    if gradient is not None and gradient[1].abs().max() > 0:
        return "mixes the samples of a batch: the distance of one depends on another; compute each by itself"
    return None
