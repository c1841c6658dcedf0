"""Guidance by a criterion of the user's own: the steps and the schedule of `boundary`, descending that criterion."""

from __future__ import annotations

from engine.methods.boundary.guide import SOURCES, rule_of, within
from engine.methods.custom.criterion import Criterion
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import shifting
from engine.methods.guidance.scene import GuidanceScene


def guide_by_criterion(
    criterion: Criterion, denoiser: ConditionalDenoiser, spec: CustomGuidanceSpec, scene: GuidanceScene
) -> GuidedDenoiser:
    """Wrap a denoiser so that guided steps descend a criterion.

    Args:
        criterion: images and scene to distances; a guide once it is bound.
        denoiser: the denoiser to guide.
        spec: step rule, size and schedule.
        scene: of the batch; the criterion gets that of the rows that it is called with.
    """
    return GuidedDenoiser(
        denoiser,
        criteria=lambda images, rows: within(spec, criterion(images, rows))[None],
        scene=scene,
        update=shifting(rule_of(spec)),
        is_guided=lambda step: spec.is_guided(step.index, step.total),
        source=SOURCES[spec.gradient],
    )
