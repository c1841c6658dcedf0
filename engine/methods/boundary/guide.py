"""KLDB boundary guidance (Gomes et al.): samples on the decision boundary between the classes of a subset."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import Rule, polyak, scaled_by_latents, scaled_by_maximum, shifting
from engine.methods.sampling.denoiser import Step
from engine.methods.scores import kldb


def guide_to_boundary(
    denoiser: ConditionalDenoiser,
    spec: BoundaryGuidanceSpec,
    *,
    logits: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    classes: tuple[int, ...],
    num_samples: int,
) -> GuidedDenoiser:
    """Wrap a denoiser in KLDB guidance.

    Args:
        denoiser: what to guide.
        spec: step rule, size and schedule.
        logits: images [B, 3, H, W] in [0, 1] to temperature-scaled logits [B, n], differentiable.
        decode: latents [B, C, H, W] to images [B, 3, H, W].
        classes: the subset C.
        num_samples: B.
    """
    return GuidedDenoiser(
        denoiser,
        criteria=lambda images: kldb(logits(images), classes)[None],
        decode=decode,
        update=shifting(rule_of(spec)),
        is_guided=lambda step: is_guided_step(step, spec),
        source="unet" if spec.gradient == "unet" else "conditional",
        num_samples=num_samples,
    )


def is_guided_step(step: Step, spec: BoundaryGuidanceSpec) -> bool:
    """Whether `i % every == 0`, i counted from 1, and not the last step where `skip_last`."""
    return step.index % spec.every == 0 and not (spec.skip_last and step.is_last)


def rule_of(spec: BoundaryGuidanceSpec) -> Rule:
    """The step rule that a job asks for."""
    alpha = spec.step_size
    if spec.step == "polyak":
        return lambda loss, gradient, latents: polyak(loss, gradient, latents, alpha=alpha, cap=spec.cap)
    rule = scaled_by_latents if spec.step == "norm" else scaled_by_maximum
    return lambda loss, gradient, latents: rule(loss, gradient, latents, alpha=alpha)
