"""KLDB boundary guidance (Gomes et al.): samples on the decision boundary between the classes of a subset."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.guidance.rules import rule_of, shifting
from engine.sampling.denoiser import Step
from engine.scores import kldb
from engine.spec import BoundaryGuidanceSpec


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
