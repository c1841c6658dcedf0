"""Step rules: how far a sample's latents move against the gradient of a criterion. Always sample by sample.

Legend: B samples, z latents [B, C, H, W], L criterion [B], g its gradient in z [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.spec import BoundaryGuidanceSpec

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class GradientHealth:
    """Counts of a batch, [B] integers each.

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


def polyak(loss: Tensor, gradient: Tensor, latents: Tensor, *, alpha: float, cap: float) -> Tensor:
    """Shift by the Polyak step `L / |g|^2` against g, at most `cap * |z|_2` long.

    The step that a linear model of L asks for to reach L = 0, the known minimum of a non-negative criterion (Polyak
    1987, section 5.3). `alpha` relaxes it (1: whole step).
    """
    length = (alpha * loss / norms(gradient)).minimum(cap * norms(latents))
    return -_columns(length, gradient) * _unit(gradient)


def scaled_by_latents(loss: Tensor, gradient: Tensor, latents: Tensor, *, alpha: float) -> Tensor:
    """Shift by `alpha * |z|_2` against g: `g / |g|_2 * |z|_2`, the later code of Gomes et al."""
    return -alpha * _columns(norms(latents), gradient) * _unit(gradient)


def scaled_by_maximum(loss: Tensor, gradient: Tensor, latents: Tensor, *, alpha: float) -> Tensor:
    """Shift by `alpha * g / max|g|` against g: Gomes et al., workshop version."""
    return -alpha * gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)


def rule_of(spec: BoundaryGuidanceSpec) -> Rule:
    """The step rule that a job asks for."""
    alpha = spec.step_size
    if spec.step == "polyak":
        return lambda loss, gradient, latents: polyak(loss, gradient, latents, alpha=alpha, cap=spec.cap)
    rule = scaled_by_latents if spec.step == "norm" else scaled_by_maximum
    return lambda loss, gradient, latents: rule(loss, gradient, latents, alpha=alpha)


def safe_shift(rule: Rule, loss: Tensor, gradient: Tensor, latents: Tensor, health: GradientHealth) -> Tensor:
    """Apply a rule to the samples whose gradient is usable; the others stay where they are and are counted."""
    finite = torch.isfinite(loss) & torch.isfinite(gradient).flatten(1).all(1)
    zero = finite & (gradient.flatten(1).abs().amax(1) == 0)
    usable = finite & ~zero
    health.nonfinite += (~finite).cpu()
    health.zero += zero.cpu()
    health.guided_steps += usable.cpu()
    mask = _columns(usable, gradient)
    shift = rule(loss, torch.where(mask, gradient, torch.ones_like(gradient)), latents)
    return torch.where(mask, shift, torch.zeros_like(shift))


def norms(values: Tensor) -> Tensor:
    """Euclidean norm of every sample, [B].

    Scaled by the largest entry first, so that squares neither underflow nor overflow.
    """
    flat = values.flatten(1)
    largest = flat.abs().amax(1).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat / largest[:, None]).norm(dim=1) * largest


def _unit(gradient: Tensor) -> Tensor:
    return gradient / _columns(norms(gradient), gradient)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
