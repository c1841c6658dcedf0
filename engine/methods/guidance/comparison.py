"""Directions of guidance's gradients through several decodings of the same predictions, compared as samples are made.

Legend: B samples, K criteria, D decodings, C channels, H x W size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.rules import unit
from engine.methods.guidance.scene import Decoding
from engine.methods.sampling.denoiser import Prediction, Step


class ComparedDenoiser:
    """A guided denoiser that moves as it does, and takes every gradient through other decodings as well.

    Args:
        guided: its gradients are followed, and are the reference.
        decodings: the other ones, at least one.
    """

    def __init__(self, guided: GuidedDenoiser, decodings: Sequence[Decoding]) -> None:
        self._guided, self._others = guided, [guided.through(decoding) for decoding in decodings]
        self._cosines: list[Tensor] = []

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W], moved where the step is guided."""
        if not self._guided.guides(step):
            return self._guided(latents, step)
        prediction = self._guided.predict(latents, step)
        losses, gradients = self._guided.gradients(prediction, step)
        others = [other.gradients(prediction, step)[1] for other in self._others]
        # In one call, as each waits for the GPU.
        found = cosines(torch.cat([gradients] * len(others)).flatten(0, 1), torch.cat(others).flatten(0, 1))
        self._cosines.append(found.reshape(len(others), -1))
        return self._guided.moved(losses, gradients, prediction, step)

    def cosines(self) -> Tensor:
        """Cosine of every sample at every guided step and of every criterion, [D, n], on the CPU; see `cosines`."""
        return torch.cat(self._cosines, dim=1).cpu() if self._cosines else torch.empty(len(self._others), 0)


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


def in_8_bits(decoding: Decoding) -> Decoding:
    """A decoding whose images [B, 3, H, W] are clamped and rounded as stored ones are; gradients pass the rounding."""

    def decode(latents: Tensor) -> Tensor:
        images = decoding.decode(latents).clamp(0, 1)
        return images + ((images * 255).round() / 255 - images).detach()

    return dataclasses.replace(decoding, decode=decode)
