"""What the arms of real images alone do to their batches: shifting, mirroring and mixing them, or attacking them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from engine.studies.retrain.finetune import Samples

PGD_EPS, PGD_STEPS = 8 / 255, 3
MAX_ATTACK_STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random shifts, mirror images, and mixup (Zhang et al. 2018) of the shifted images.

    Attributes:
        shift: largest shift along each side, a share of it; what comes in repeats the border.
        alpha: of the Beta distribution that the share of an image in its mixture is drawn from.
        flips: whether half of the images are mirrored; a digit or a word would be another one.
    """

    shift: float = 0.125
    alpha: float = 0.2
    flips: bool = False

    def of(self, batch: Samples, rng: np.random.Generator) -> Samples:
        """A changed batch, on its device; targets are mixed as the images are."""
        pixels = self._shifted(batch.pixels, rng)
        if self.flips:
            chosen = torch.from_numpy(rng.random(len(batch)) < 0.5).to(pixels.device)
            pixels = torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)
        share = torch.from_numpy(rng.beta(self.alpha, self.alpha, len(batch))).to(pixels)
        others = torch.from_numpy(rng.permutation(len(batch))).to(pixels.device)
        image_share = share[:, None, None, None]
        return Samples(
            image_share * pixels + (1 - image_share) * pixels[others],
            share[:, None] * batch.targets + (1 - share[:, None]) * batch.targets[others],
        )

    def _shifted(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Images [B, 3, h, w], each moved by whole pixels."""
        count, _, height, width = pixels.shape
        most = (round(self.shift * height), round(self.shift * width))
        padded = pad(pixels, (most[1], most[1], most[0], most[0]), mode="replicate")
        places = []
        for size, limit in zip((height, width), most, strict=True):
            starts = rng.integers(0, 2 * limit + 1, count)
            places.append(torch.from_numpy(starts[:, None] + np.arange(size)).to(pixels.device))
        images = torch.arange(count, device=pixels.device)[:, None, None]
        moved = padded.movedim(1, -1)[images, places[0][:, :, None], places[1][:, None, :]]
        return moved.movedim(-1, 1).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Projected gradient descent within a maximum norm (Madry et al. 2018), in the pixels that a network is given.

    Attributes:
        eps: largest change of a pixel value, whose range is 1.
        num_steps: of the attack, each of 2.5 eps / num_steps; it starts at random.
    """

    eps: float = PGD_EPS
    num_steps: int = PGD_STEPS

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each."""
        problems = []
        if not (math.isfinite(self.eps) and 0 < self.eps <= 1):
            problems.append(
                f"--pgd-eps: {self.eps:g} is not above 0 and up to 1, the range of a pixel; give one, as 0.03"
            )
        if not 1 <= self.num_steps <= MAX_ATTACK_STEPS:
            problems.append(f"--pgd-steps: {self.num_steps} is not between 1 and {MAX_ATTACK_STEPS}")
        return problems

    def of(self, bounds: tuple[Tensor, Tensor], network: Any, batch: Samples, rng: np.random.Generator) -> Samples:
        """A batch whose images raise the loss of a network in evaluation mode, which is left in training mode.

        Args:
            bounds: values of black and of white in the network's input, each [1, 3, 1, 1].
        """
        low, high = (bound.to(batch.pixels) for bound in bounds)
        reach = self.eps * (high - low)
        noise = torch.from_numpy(rng.uniform(-1, 1, batch.pixels.shape)).to(batch.pixels)
        pixels = _clamped(batch.pixels + reach * noise, low, high)
        # Statistics of batches must come from the training alone.
        network.eval()
        for _ in range(self.num_steps):
            pixels.requires_grad_()
            loss = cross_entropy(network(pixels).float(), batch.targets, reduction="sum")
            [gradient] = torch.autograd.grad(loss, pixels)
            moved = pixels.detach() + 2.5 / self.num_steps * reach * gradient.sign()
            near = torch.maximum(torch.minimum(moved, batch.pixels + reach), batch.pixels - reach)
            pixels = _clamped(near, low, high)
        network.train()
        return Samples(pixels, batch.targets)


def _clamped(pixels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(pixels, high), low)
