"""KLDB boundary guidance (Gomes et al.): samples on the decision boundary between the classes of a subset."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser, Source
from engine.methods.guidance.rules import Rule, beyond, polyak, scaled_by_latents, scaled_by_maximum, shifting
from engine.methods.guidance.scene import GuidanceScene
from engine.methods.scores import kldb

SOURCES: Mapping[str, Source] = {"combined": "combined-unet", "unet": "unet", "detached": "conditional"}


def guide_to_boundary(
    denoiser: ConditionalDenoiser, spec: BoundaryGuidanceSpec, scene: GuidanceScene
) -> GuidedDenoiser:
    """Wrap a denoiser in KLDB guidance.

    Args:
        denoiser: the denoiser to guide.
        spec: step rule, size and schedule.
        scene: of samples of one joint prompt, whose subset is C.
    """
    # Made once: a list would be copied to a GPU at every step.
    subset = torch.tensor(scene.classes[0], device=scene.labels.device)
    return GuidedDenoiser(
        denoiser,
        criteria=lambda images, rows: within(spec, kldb(rows.logits(images), subset))[None],
        scene=scene,
        update=shifting(rule_of(spec)),
        is_guided=lambda step: spec.is_guided(step.index, step.total),
        source=SOURCES[spec.gradient],
    )


def within(spec: BoundaryGuidanceSpec, distance: Tensor) -> Tensor:
    """A distance [B], zero within the tolerance of a job; without one as it is, rounding below zero included."""
    return beyond(distance, spec.tolerance) if spec.can_arrive else distance


def rule_of(spec: BoundaryGuidanceSpec) -> Rule:
    """The step rule of a job, with its step size."""
    alpha = spec.step_size
    if spec.step == "polyak":
        return lambda loss, gradient, latents: polyak(loss, gradient, latents, alpha=alpha, cap=spec.cap)
    rule = scaled_by_latents if spec.step == "norm" else scaled_by_maximum
    return lambda loss, gradient, latents: rule(loss, gradient, latents, alpha=alpha)
