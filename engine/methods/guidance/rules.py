"""Step rules: how far a sample's latents move against the gradient of a criterion. Always sample by sample.

Legend: B samples, z latents [B, C, H, W], L criterion [B], g its gradient in z [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.sampling.denoiser import Prediction, Step

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
Update = Callable[[Tensor, Tensor, Prediction, Step, "GradientHealth"], Prediction]


@dataclass(slots=True)
class GradientHealth:
    """Counts of a batch, [B] integers each, kept where the gradients are: reading one waits for a GPU.

    Attributes:
        guided_steps: steps at which the sample was moved.
        zero: steps at which its gradient was exactly zero.
        nonfinite: steps at which its gradient or criterion was not finite.
    """

    guided_steps: Tensor
    zero: Tensor
    nonfinite: Tensor

    @classmethod
    def of(cls, num_samples: int) -> GradientHealth:
        """All counts zero."""
        return cls(*(torch.zeros(num_samples, dtype=torch.long) for _ in range(3)))

    def rows(self, rows: Tensor) -> GradientHealth:
        """The counts of the samples of these numbers."""
        return GradientHealth(self.guided_steps[rows], self.zero[rows], self.nonfinite[rows])

    def on_host(self) -> GradientHealth:
        """The same counts in the memory of the host."""
        return GradientHealth(self.guided_steps.cpu(), self.zero.cpu(), self.nonfinite.cpu())

    def add(self, *, guided: Tensor, zero: Tensor, nonfinite: Tensor) -> None:
        """Count one step, from which samples [B] were moved and which had a gradient of each kind, on one device."""
        self.guided_steps = _added(self.guided_steps, guided)
        self.zero = _added(self.zero, zero)
        self.nonfinite = _added(self.nonfinite, nonfinite)


def _added(counts: Tensor, which: Tensor) -> Tensor:
    return counts.to(which.device, non_blocking=True) + which


def polyak(loss: Tensor, gradient: Tensor, latents: Tensor, *, alpha: float, cap: float) -> Tensor:
    """Shift by the Polyak step `L / |g|^2` against g, at most `cap * |z|_2` long.

    The step that a linear model of L asks for to reach L = 0, the known minimum of a non-negative criterion (Polyak
    1987, section 5.3). `alpha` relaxes it (1: whole step).
    """
    length = (alpha * loss / norms(gradient)).minimum(cap * norms(latents))
    return -per_sample(length, gradient) * unit(gradient)


def scaled_by_latents(loss: Tensor, gradient: Tensor, latents: Tensor, *, alpha: float) -> Tensor:
    """Shift by `alpha * |z|_2` against g: `g / |g|_2 * |z|_2`, the later code of Gomes et al."""
    return -alpha * per_sample(norms(latents), gradient) * unit(gradient)


def scaled_by_maximum(loss: Tensor, gradient: Tensor, latents: Tensor, *, alpha: float) -> Tensor:
    """Shift by `alpha * g / max|g|` against g: Gomes et al., workshop version."""
    return -alpha * gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)


def usable_gradients(loss: Tensor, gradient: Tensor, health: GradientHealth) -> tuple[Tensor, Tensor]:
    """Which samples can be moved; the others are counted.

    Args:
        loss: [B].
        gradient: [B, C, H, W].

    Returns:
        Which samples are usable [B], and the gradient with ones in place of the unusable. A sample whose loss is
        zero has arrived: it is not moved, and counts as healthy.
    """
    finite = torch.isfinite(loss) & torch.isfinite(gradient).flatten(1).all(1)
    arrived = finite & (loss == 0)
    zero = finite & ~arrived & (gradient.flatten(1).abs().amax(1) == 0)
    usable = finite & ~arrived & ~zero
    health.add(guided=usable, zero=zero, nonfinite=~finite)
    return usable, torch.where(per_sample(usable, gradient), gradient, torch.ones_like(gradient))


def beyond(distance: Tensor, tolerance: float) -> Tensor:
    """`distance` of each sample [B]; zero, without gradient, within the tolerance: the sample has arrived."""
    return torch.where(distance > tolerance, distance, distance * 0)


def shifting(rule: Rule) -> Update:
    """The update that moves the latents by a step rule for a single criterion, with the eps from before the shift."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        usable, gradient = usable_gradients(losses[0], gradients[0], health)
        shift = rule(losses[0], gradient, prediction.latents)
        return prediction.moved(keep(usable, shift), step)

    return update


def keep(usable: Tensor, values: Tensor) -> Tensor:
    """`values` [B, C, H, W] of the usable samples, zero for the others."""
    return torch.where(per_sample(usable, values), values, torch.zeros_like(values))


def norms(values: Tensor) -> Tensor:
    """Euclidean norm of every sample, [B].

    Scaled by the largest entry first, so that squares neither underflow nor overflow.
    """
    flat = values.flatten(1)
    largest = flat.abs().amax(1).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / largest[:, None]).norm(dim=1) * largest


def unit(gradient: Tensor) -> Tensor:
    """The gradient of every sample at length 1."""
    return gradient / per_sample(norms(gradient), gradient)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1], to meet `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
