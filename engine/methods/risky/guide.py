"""RiskyDiff guidance (Yu et al. 2025): risk for the target under conformity to the class, by two step rules.

`paper` ascends `S = risk + lambda * conformity` by a fixed step on eps. `polyak` needs no step size: risk has a target,
approached from both sides, conformity a floor; each is a non-negative distance whose zero is known.

Legend: B samples, z latents [B, C, H, W], g gradients in z of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.methods.guidance.guided import ConditionalDenoiser, Criteria, GuidedDenoiser, Source
from engine.methods.guidance.rules import (
    GradientHealth,
    Update,
    beyond,
    keep,
    norms,
    per_sample,
    unit,
    usable_gradients,
)
from engine.methods.guidance.scene import GuidanceScene
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.sampling.denoiser import Prediction, Step
from engine.methods.scores import risk

# The paper's step size is for Stable Diffusion's 4 x 64 x 64 latents: g has length 1, eps has length sqrt(d).
PAPER_LATENT_ELEMENTS = 16384
PAPER_EPSILON = 1e-10
SOURCES: Mapping[str, Source] = {"unet": "conditional-unet", "combined": "combined-unet", "detached": "combined"}


def guide_to_risk(denoiser: ConditionalDenoiser, spec: RiskyGuidanceSpec, scene: GuidanceScene) -> GuidedDenoiser:
    """Wrap a denoiser in risk guidance.

    Args:
        denoiser: the denoiser to guide.
        spec: step rule, risk target, constraint and schedule.
        scene: of samples of single classes.
    """
    criteria, update = _criteria_and_update(spec)
    return GuidedDenoiser(
        denoiser,
        criteria=criteria,
        scene=scene,
        update=update,
        is_guided=lambda step: spec.is_guided(step.index, step.total),
        source=SOURCES[spec.gradient],
    )


def _criteria_and_update(spec: RiskyGuidanceSpec) -> tuple[Criteria, Update]:
    """What is descended, and how the prediction moves."""
    if spec.step == "paper":
        return papers_objective(spec), fixed_step(spec.scale)
    if spec.conformity_floor is None:
        # The distance to a floor is a backward pass, which a job without one does not pay for.
        return lambda images, scene: _to_target(spec, scene, images)[None], polyak_to_target(spec.cap)
    return _target_and_floor(spec, spec.conformity_floor), polyak_with_floor(spec.cap)


def papers_objective(spec: RiskyGuidanceSpec) -> Criteria:
    """The paper's objective with the sign of a loss, `-(risk + lambda * conformity)`, [1, B]."""

    def objective(images: Tensor, scene: GuidanceScene) -> Tensor:
        measured = risk(scene.logits(images), scene.labels)
        return -(measured + spec.conformity_weight * _conformity(spec, scene, images))[None]

    return objective


def _target_and_floor(spec: RiskyGuidanceSpec, lowest: float) -> Criteria:
    """Distances to the risk target and to the floor of conformity, [2, B]."""
    return lambda images, scene: torch.stack(
        [_to_target(spec, scene, images), distance_below(_conformity(spec, scene, images), lowest)]
    )


def _to_target(spec: RiskyGuidanceSpec, scene: GuidanceScene, images: Tensor) -> Tensor:
    return distance_to_target(risk(scene.logits(images), scene.labels), spec.target_risk, spec.tolerance)


def _conformity(spec: RiskyGuidanceSpec, scene: GuidanceScene, images: Tensor) -> Tensor:
    measure = scene.raw_conformity if spec.conformity == "raw" else scene.conformity
    return measure(images, scene.labels)


def distance_to_target(measured: Tensor, target: float, tolerance: float) -> Tensor:
    """Distance `|risk - target|` of each sample [B]; zero, without gradient, within the tolerance."""
    return beyond((measured - target).abs(), tolerance)


def distance_below(conformity: Tensor, lowest: float) -> Tensor:
    """Hinge `max(0, lowest - conformity)` of each sample, [B]."""
    return (lowest - conformity).clamp_min(0)


def fixed_step(scale: float) -> Update:
    """The paper's update: `eps <- eps - s sqrt(1 - abar) g / sqrt(|g|^2 + 1e-10)`, s rescaled to the latents' size."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        usable, gradient = usable_gradients(losses[0], gradients[0], health)
        size = scale * math.sqrt(gradient[0].numel() / PAPER_LATENT_ELEMENTS)
        length = torch.sqrt(norms(gradient) ** 2 + PAPER_EPSILON)
        # The criterion is -S, so that its gradient is the `-g` of the equation.
        noise_share = step.sigma / math.hypot(step.scale, step.sigma)
        return prediction.with_eps_moved(
            keep(usable, size * noise_share * gradient / per_sample(length, gradient)), step
        )

    return update


def polyak_to_target(cap: float) -> Update:
    """Polyak steps on the distance to the risk target alone."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        usable, _ = usable_gradients(losses[0], gradients[0], health)
        shift = capped(_polyak(losses[0], gradients[0]), cap * norms(prediction.latents))
        return prediction.moved(keep(usable, shift), step)

    return update


def polyak_with_floor(cap: float) -> Update:
    """Polyak steps on both distances; where they conflict, the gradient of the risk target gives way to the floor's."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        below = losses[1] > 0
        to_target = torch.where(
            per_sample(below, gradients[0]), without_conflict(gradients[0], gradients[1]), gradients[0]
        )
        # A sample is moved as a whole: its health is that of the sum of what moves it.
        total = to_target + keep(below, gradients[1])
        usable, _ = usable_gradients(losses.sum(0), total, health)
        shift = _polyak(losses[0], to_target) + keep(below, _polyak(losses[1], gradients[1]))
        return prediction.moved(keep(usable, capped(shift, cap * norms(prediction.latents))), step)

    return update


def without_conflict(gradient: Tensor, protected: Tensor) -> Tensor:
    """`gradient` less its part against `protected` where the two point apart (Yu et al. 2020, PCGrad), per sample."""
    overlap = (gradient * protected).flatten(1).sum(1)
    square = (protected * protected).flatten(1).sum(1)
    share = torch.where((overlap < 0) & (square > 0), overlap / square, torch.zeros_like(overlap))
    return gradient - per_sample(share, gradient) * protected


def capped(shift: Tensor, longest: Tensor) -> Tensor:
    """`shift` shortened to at most `longest` [B] for each sample."""
    factor = (longest / norms(shift).clamp_min(torch.finfo(shift.dtype).tiny)).clamp_max(1)
    return shift * per_sample(factor, shift)


def _polyak(loss: Tensor, gradient: Tensor) -> Tensor:
    """Shift `-L / |g|^2 g`; zero where the loss or the gradient is."""
    length = norms(gradient)
    movable = (loss > 0) & (length > 0)
    safe = torch.where(per_sample(movable, gradient), gradient, torch.ones_like(gradient))
    return keep(movable, -per_sample(loss / norms(safe), gradient) * unit(safe))
