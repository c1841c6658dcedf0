"""A denoiser with guidance around it: at chosen steps the prediction moves against the gradients of some criteria."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from engine.methods.guidance.arrivals import Arrivals
from engine.methods.guidance.precision import pulled_back
from engine.methods.guidance.rules import GradientHealth, Update
from engine.methods.guidance.scene import Decoding, GuidanceScene, Rows
from engine.methods.guidance.slices import even_slices
from engine.methods.sampling.denoiser import (
    Denoiser,
    Prediction,
    PredictionType,
    Step,
    placed,
    predicted_eps,
    predicted_x0,
)

# Latents without signal (zero terminal SNR) have no x0 to differentiate at.
MIN_SIGNAL = 1e-3

Source = Literal["conditional", "combined", "unet", "conditional-unet", "combined-unet"]


class Criteria(Protocol):
    """K differentiable objectives to descend."""

    def __call__(self, images: Tensor, scene: GuidanceScene) -> Tensor:
        """Objectives [K, B] of images [B, 3, H, W] in [0, 1], which are the samples of the scene."""


class ConditionalDenoiser(Denoiser, Protocol):
    """A denoiser whose conditional half can be differentiated."""

    def attached(self, latents: Tensor, step: Step, rows: Tensor | None = None) -> Prediction:
        """As calling it, with a `conditional` that is differentiable in the latents, a leaf; of some rows or of all."""

    def conditional_output(self, latents: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
        """The conditional half [b, C, H, W] alone, of some rows or of all, differentiable in the latents."""


class GuidedDenoiser:
    """Wrap a denoiser so that guided steps descend criteria of the predicted image.

    Args:
        denoiser: the denoiser to wrap.
        criteria: objectives of decoded images; called with the rows of a slice and their scene, for each target.
        scene: of all B samples; its decoding says how many rows are decoded and differentiated at a time.
        update: how the prediction moves.
        is_guided: whether a step is guided.
        source: which prediction of x0 is scored: the conditional half's or the combined one, both detached from the
            UNet, or either of them through the UNet's conditional half. The halves' weights in the combined one sum to
            1, so that its gradient is that of the conditional half where both answer alike. At the last step, after
            which nothing is denoised, `conditional-unet` and `combined-unet` are `combined`: the gradient of the sample
            itself; `unet` goes through the UNet there, too, as published.
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        *,
        criteria: Criteria,
        scene: GuidanceScene,
        update: Update,
        is_guided: Callable[[Step], bool],
        source: Source,
    ) -> None:
        self._denoiser = denoiser
        self._criteria = criteria
        self._scene = scene
        self._update = update
        self._is_guided = is_guided
        self._source = source
        self.health = GradientHealth.of(scene.num_samples)
        self._arrivals = Arrivals(scene.num_samples, scene.row_multiple)

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W], moved where the step is guided."""
        if not self.guides(step):
            return self._denoiser(latents, step)
        moving, resting = self._arrivals.split()
        if len(resting):
            prediction, losses, gradients = self._where_moving(latents, step, moving, resting)
        else:
            prediction = self.predict(latents, step)
            losses, gradients = self.gradients(prediction, step)
        self._arrivals.note(losses)
        return self.moved(losses, gradients, prediction, step)

    def _where_moving(
        self, latents: Tensor, step: Step, moving: Tensor, resting: Tensor
    ) -> tuple[Prediction, Tensor, Tensor]:
        """Prediction, criteria [K, B] and gradients [K, B, C, H, W], which are zero where a sample still rests.

        Args:
            moving: numbers of the samples that are expected to move.
            resting: those of the others, which are looked at first, without a graph.
        """
        prediction = self.predict(latents, step, moving)
        seen = self._values(prediction, step, resting)
        # No longer within the tolerance; a value that is not finite is for the step rule to count.
        left = self._arrivals.filled(resting[(seen != 0).any(0).cpu()], resting)
        losses = seen.new_zeros(len(seen), len(latents))
        gradients = latents.new_zeros(len(seen), *latents.shape)
        for rows, graph in ((moving, prediction), (left, self._again(prediction, step, left))):
            if len(rows):
                losses[:, rows], gradients[:, rows] = self.gradients(graph, step, rows)
        return prediction, losses, gradients

    def _again(self, prediction: Prediction, step: Step, rows: Tensor) -> Prediction:
        """A prediction with a graph for the samples of these numbers, where gradients go through the UNet."""
        if not self._is_through_unet(step) or not len(rows):
            return prediction
        latents = prediction.latents.detach().requires_grad_(True)
        with torch.enable_grad():
            output = self._denoiser.conditional_output(latents, step, rows)
            conditional = placed(output, rows, len(latents))
        return dataclasses.replace(prediction, conditional=conditional, latents=latents)

    def guides(self, step: Step) -> bool:
        """Whether a step moves the prediction."""
        return self._is_guided(step) and step.signal >= MIN_SIGNAL

    def _is_through_unet(self, step: Step) -> bool:
        """Whether gradients go through the UNet."""
        return self._source == "unet" or (self._source.endswith("-unet") and step.index < step.total)

    def through(self, decoding: Decoding) -> Self:
        """The same with another decoding; what it counts is counted with this one's."""
        other = copy.copy(self)
        other._scene = dataclasses.replace(self._scene, decoding=decoding)
        return other

    def predict(self, latents: Tensor, step: Step, rows: Tensor | None = None) -> Prediction:
        """The prediction that `gradients` differentiates, not moved; with a graph where that goes through the UNet.

        Args:
            rows: numbers of the samples that have a graph; None for all.
        """
        if self._is_through_unet(step) and (rows is None or len(rows)):
            return self._denoiser.attached(latents.detach().requires_grad_(True), step, rows)
        return self._denoiser(latents, step)

    def moved(self, losses: Tensor, gradients: Tensor, prediction: Prediction, step: Step) -> Prediction:
        """The prediction moved by what `gradients` gave for it."""
        return self._update(losses, gradients, prediction.detached(), step, self.health)

    def gradients(self, prediction: Prediction, step: Step, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Criteria [K, B] and their gradients in the latents [K, B, C, H, W], sample by sample.

        Args:
            prediction: from `predict`, at the same step.
            rows: numbers of the B samples that it is for; None for all.
        """
        scored = self._scored(prediction, step).detach()
        parts = [self._of_slice(prediction, scored, step, part) for part in self._slices(rows)]
        losses, direct, of_output = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        if not self._is_through_unet(step):
            return losses, direct
        if rows is None:
            through = [pulled_back(cotangent, prediction.conditional, prediction.latents) for cotangent in of_output]
        else:
            cotangents = [placed(cotangent, rows, len(scored)) for cotangent in of_output]
            through = [pulled_back(one, prediction.conditional, prediction.latents)[rows] for one in cotangents]
        return losses, direct + torch.stack(through)

    @torch.no_grad()
    def _values(self, prediction: Prediction, step: Step, rows: Tensor) -> Tensor:
        """Criteria [K, B] of the samples of these numbers."""
        scored = self._scored(prediction, step)
        parts = [
            self._scene.rows(part).over_targets(
                self._criteria, self._images(scored[part], prediction.latents[part], step, prediction)
            )
            for part in self._slices(rows)
        ]
        return torch.cat(parts, dim=1)

    def _images(self, output: Tensor, latents: Tensor, step: Step, prediction: Prediction) -> Tensor:
        """Images [b, 3, H, W] in [0, 1] of rows of what `_scored` gives, at these latents."""
        kind: PredictionType = prediction.prediction if self._is_through_unet(step) else "epsilon"
        return self._scene.decoding.decode(predicted_x0(output, latents, step, kind)).clamp(0, 1)

    def _slices(self, rows: Tensor | None) -> list[Rows]:
        """The samples of these numbers, or all, in parts that are decoded and differentiated at a time."""
        num_rows = self._scene.num_samples if rows is None else len(rows)
        slices = even_slices(num_rows, self._scene.decoding.slice_rows)
        return [part if rows is None else rows[part] for part in slices]

    def _of_slice(
        self, prediction: Prediction, scored: Tensor, step: Step, part: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Criteria [K, b] of some samples, their gradients in the latents and in what x0 is predicted from.

        One image serves all criteria; its graph ends with the slice.
        """
        with torch.enable_grad():
            latents = prediction.latents[part].detach().requires_grad_(True)
            output = scored[part].requires_grad_(True)
            images = self._images(output, latents, step, prediction)
            losses = self._scene.rows(part).over_targets(self._criteria, images)
            # Sums keep every sample's gradient its own; a mean would scale it by the batch.
            gradients = [
                torch.autograd.grad(loss.sum(), [latents, output], retain_graph=place + 1 < len(losses))
                for place, loss in enumerate(losses)
            ]
        of_latents, of_output = zip(*gradients, strict=True)
        return losses.detach(), torch.stack(of_latents), torch.stack(of_output)

    def _scored(self, prediction: Prediction, step: Step) -> Tensor:
        """What the scored x0 is predicted from: the network's output, or a noise that is held fixed."""
        is_own = self._source == "conditional-unet" and step.index == step.total
        is_combined = self._source.startswith("combined") or is_own
        output = prediction.output if is_combined else prediction.conditional
        if self._is_through_unet(step):
            return output
        return predicted_eps(output, prediction.latents, step, prediction.prediction)


class Guide(Protocol):
    """Wraps a denoiser in the guidance of a method: `guide` of a record of `engine.methods.registry`."""

    def __call__(self, denoiser: ConditionalDenoiser, spec: Any, scene: GuidanceScene) -> GuidedDenoiser:
        """Wrap a denoiser.

        Args:
            denoiser: the denoiser to guide.
            spec: the parameters, of the class that the record names.
            scene: of the samples of a batch.
        """
