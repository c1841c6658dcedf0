"""Directions of guidance's gradients through two decodings of the same predictions, compared while samples are made.

Legend: B samples, K criteria, C channels, H x W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.rules import unit
from engine.methods.guidance.scene import Decoding
from engine.methods.sampling.denoiser import Prediction, Step


class ComparedDenoiser:
    """A guided denoiser that moves as it does, and takes every gradient through another decoding as well.

    Args:
        guided: its gradients are followed, and are the reference.
        decoding: the other one.
    """

    def __init__(self, guided: GuidedDenoiser, decoding: Decoding) -> None:
        self._guided, self._other = guided, guided.through(decoding)
        self._cosines: list[Tensor] = []

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W], moved where the step is guided."""
        if not self._guided.guides(step):
            return self._guided(latents, step)
        prediction = self._guided.predict(latents, step)
        losses, gradients = self._guided.gradients(prediction, step)
        _, others = self._other.gradients(prediction, step)
        self._cosines.append(cosines(gradients.flatten(0, 1), others.flatten(0, 1)))
        return self._guided.moved(losses, gradients, prediction, step)

    def cosines(self) -> Tensor:
        """Cosine of every sample at every guided step and of every criterion, [n], on the CPU; see `cosines`."""
        return torch.cat(self._cosines).cpu() if self._cosines else torch.empty(0)


def cosines(exact: Tensor, other: Tensor) -> Tensor:
    """Cosines [n] of the gradients [N, C, H, W] that guidance can follow: finite, and not zero, in `exact`.

    NaN where `other` is not finite; 0 where it is zero.
    """
    flat = exact.flatten(1)
    usable = flat.isfinite().all(1) & (flat != 0).any(1)
    exact, other = exact[usable].double(), other[usable].double()
    vanished = (other == 0).flatten(1).all(1)
    overlap = (unit(exact) * unit(other)).flatten(1).sum(1)
    return torch.where(vanished, torch.zeros_like(overlap), overlap)
