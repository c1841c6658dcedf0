"""RiskyDiff guidance (Yu et al. 2025): risk for the target under conformity to the class, by two step rules.

`paper` ascends `S = risk + lambda * conformity` by a fixed step on eps. `polyak` needs no step size: risk has a target,
approached from both sides, conformity a floor, and so has the probability of the label under an oracle that guides;
each is a non-negative distance whose zero is known.

Legend: B samples, z latents [B, C, H, W], g gradients in z of the same shape.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

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
Distance = Callable[[RiskyGuidanceSpec, GuidanceScene, Tensor], Tensor]
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
    return distances(spec), polyak_above_floors(spec.cap)


def papers_objective(spec: RiskyGuidanceSpec) -> Criteria:
    """The paper's objective with the sign of a loss, `-(risk + lambda * conformity)`, [1, B]."""

    def objective(images: Tensor, scene: GuidanceScene) -> Tensor:
        measured = risk(scene.logits(images), scene.labels)
        return -(measured + spec.conformity_weight * _conformity(spec, scene, images))[None]

    return objective


def distances(spec: RiskyGuidanceSpec) -> Criteria:
    """Distances to the risk target and to each floor, the first one first where they conflict, [1 + floors, B].

    The distance to a floor is a backward pass, which a job without it does not pay for.
    """
    measured: list[Distance] = [_to_target]
    measured += [_below_conformity] if spec.conformity_floor is not None else []
    measured += [_below_oracle] if spec.oracle_floor is not None else []
    return lambda images, scene: torch.stack([distance(spec, scene, images) for distance in measured])


def _to_target(spec: RiskyGuidanceSpec, scene: GuidanceScene, images: Tensor) -> Tensor:
    return distance_to_target(risk(scene.logits(images), scene.labels), spec.target_risk, spec.tolerance)


def _below_conformity(spec: RiskyGuidanceSpec, scene: GuidanceScene, images: Tensor) -> Tensor:
    assert spec.conformity_floor is not None
    return distance_below(_conformity(spec, scene, images), spec.conformity_floor)


def _below_oracle(spec: RiskyGuidanceSpec, scene: GuidanceScene, images: Tensor) -> Tensor:
    assert spec.oracle_floor is not None and scene.oracle_logits is not None
    return distance_below_probability(scene.oracle_logits(images), scene.labels, spec.oracle_floor)


def _conformity(spec: RiskyGuidanceSpec, scene: GuidanceScene, images: Tensor) -> Tensor:
    measure = scene.raw_conformity if spec.conformity == "raw" else scene.conformity
    return measure(images, scene.labels)


def distance_to_target(measured: Tensor, target: float, tolerance: float) -> Tensor:
    """Distance `|risk - target|` of each sample [B]; zero, without gradient, within the tolerance."""
    return beyond((measured - target).abs(), tolerance)


def distance_below(conformity: Tensor, lowest: float) -> Tensor:
    """Hinge `max(0, lowest - conformity)` of each sample, [B]."""
    return (lowest - conformity).clamp_min(0)


def distance_below_probability(logits: Tensor, labels: Tensor, lowest: float) -> Tensor:
    """Hinge `max(0, log lowest - log p_y)` of each sample, in nats, [B]; logits [B, n].

    Of the logarithm, whose gradient does not vanish where the probability does.
    """
    return (risk(logits, labels) + math.log(lowest)).clamp_min(0)


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


def polyak_above_floors(cap: float) -> Update:
    """Polyak steps on the distances to the target and to the floors; where they conflict, a floor comes first.

    The gradient of a floor gives way to those of the floors before it, and the target's to all of them, each in its
    turn: what is left of a gradient conflicts with no other that is followed.
    """

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        floors: list[Tensor] = []
        for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
            floors.append(yielding(keep(loss > 0, gradient), floors))
        followed = [yielding(gradients[0], floors), *floors]
        # A sample is moved as a whole: its health is that of the sum of what moves it.
        usable, _ = usable_gradients(losses.sum(0), added(followed), health)
        shift = added([_polyak(loss, gradient) for loss, gradient in zip(losses, followed, strict=True)])
        return prediction.moved(keep(usable, capped(shift, cap * norms(prediction.latents))), step)

    return update


def yielding(gradient: Tensor, protected: Sequence[Tensor]) -> Tensor:
    """`gradient` after it gave way to each of the protected ones, in their order; to zero nothing has to."""
    for other in protected:
        gradient = without_conflict(gradient, other)
    return gradient


def added(terms: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor, in their order."""
    return functools.reduce(torch.add, terms)


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
