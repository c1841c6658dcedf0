"""RiskyDiff guidance (Yu et al. 2025): risk for the target under conformity to the class, by two step rules.

`paper` ascends `S = risk + lambda * conformity` by a fixed step on eps. `polyak` needs no step size: risk is a dial,
held from both sides, conformity a floor; each is a non-negative distance whose zero is known.

Legend: B samples, z latents [B, C, H, W], g gradients in z of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import GradientHealth, Update, keep, norms, per_sample, unit, usable_gradients
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.sampling.denoiser import Prediction, Step
from engine.methods.scores import risk

# The paper's step size is for Stable Diffusion's 4 x 64 x 64 latents: g has length 1, eps has length sqrt(d).
PAPER_LATENT_ELEMENTS = 16384
PAPER_EPSILON = 1e-10


def guide_to_risk(
    denoiser: ConditionalDenoiser,
    spec: RiskyGuidanceSpec,
    *,
    logits: Callable[[Tensor], Tensor],
    conformity: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    labels: Tensor,
) -> GuidedDenoiser:
    """Wrap a denoiser in risk guidance at the combined prediction, without gradient through the UNet.

    Args:
        denoiser: what to guide.
        spec: step rule, dial, constraint and schedule.
        logits: images [B, 3, H, W] in [0, 1] to temperature-scaled logits [B, n], differentiable.
        conformity: images to conformity [B] with the prompt of each sample's class, differentiable.
        decode: latents [B, C, H, W] to images [B, 3, H, W].
        labels: [B] class indices y.
    """

    def objective(images: Tensor) -> Tensor:
        return -(risk(logits(images), labels) + spec.conformity_weight * conformity(images))[None]

    def distances(images: Tensor) -> Tensor:
        to_dial = dial(risk(logits(images), labels), spec.target_risk, spec.tolerance)
        if spec.conformity_floor is None:
            return to_dial[None]
        return torch.stack([to_dial, floor(conformity(images), spec.conformity_floor)])

    if spec.step == "paper":
        criteria, update = objective, fixed_step(spec.scale)
    else:
        criteria = distances
        # A distance that is not asked for is a backward pass saved.
        update = polyak_to_dial(spec.cap) if spec.conformity_floor is None else polyak_with_floor(spec.cap)
    return GuidedDenoiser(
        denoiser,
        criteria=criteria,
        decode=decode,
        update=update,
        is_guided=lambda step: is_guided_step(step, spec),
        source="combined",
        num_samples=len(labels),
    )


def is_guided_step(step: Step, spec: RiskyGuidanceSpec) -> bool:
    """Whether a step is in the guided range and on the schedule."""
    in_range = step.index > step.total * (1 - spec.gradient_range)
    return in_range and step.index % spec.every == 0 and not (spec.skip_last and step.is_last)


def dial(measured: Tensor, target: float, tolerance: float) -> Tensor:
    """Distance `|risk - target|` of each sample [B]; zero, without gradient, within the tolerance: it has arrived."""
    distance = (measured - target).abs()
    return torch.where(distance > tolerance, distance, distance * 0)


def floor(agreement: Tensor, lowest: float) -> Tensor:
    """Hinge `max(0, lowest - conformity)` of each sample, [B]."""
    return (lowest - agreement).clamp_min(0)


def fixed_step(scale: float) -> Update:
    """The paper's update: `eps <- eps - s sqrt(1 - abar) g / sqrt(|g|^2 + 1e-10)`, s rescaled to the latents' size."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        usable, gradient = usable_gradients(losses[0], gradients[0], health)
        size = scale * math.sqrt(gradient[0].numel() / PAPER_LATENT_ELEMENTS)
        length = torch.sqrt(norms(gradient) ** 2 + PAPER_EPSILON)
        # The criterion is -S, descended: its gradient already points the other way.
        noise_share = step.sigma / math.hypot(step.scale, step.sigma)
        return prediction.with_eps_moved(
            keep(usable, size * noise_share * gradient / per_sample(length, gradient)), step
        )

    return update


def polyak_to_dial(cap: float) -> Update:
    """Polyak steps on the dial alone."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        usable, _ = usable_gradients(losses[0], gradients[0], health)
        shift = capped(_polyak(losses[0], gradients[0]), cap * norms(prediction.latents))
        return prediction.moved(keep(usable, shift), step)

    return update


def polyak_with_floor(cap: float) -> Update:
    """Polyak steps on the dial and on the floor; the dial's gradient gives way where the two conflict."""

    def update(
        losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step, health: GradientHealth
    ) -> Prediction:
        below = losses[1] > 0
        to_dial = torch.where(
            per_sample(below, gradients[0]), without_conflict(gradients[0], gradients[1]), gradients[0]
        )
        # One verdict a sample: it can be moved if what it has to move by is usable.
        total = to_dial + keep(below, gradients[1])
        usable, _ = usable_gradients(losses.sum(0), total, health)
        shift = _polyak(losses[0], to_dial) + keep(below, _polyak(losses[1], gradients[1]))
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
